"""The ways to train that bench/train.py compares, the model that they train, and its optimizer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import (
    AttentionInterface,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from bench.answering.models import CLIP_TINY, SPECS, Spec, build_config, build_model
from bench.training.data import Batch
from voco_kernels import MaskLayout
from voco_model.vlm.attach import attach

SMALL = Spec(
    "a small LLaVA",
    dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=264,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    ),
    CLIP_TINY,
    std=0.1,
)
"""For checks and tests; heads of 64, which every backend takes."""

LARGE = SPECS["llava-1.5-7b"]

Q_FORMER_SMALL = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
)

BYTES_A_WEIGHT = 16
"""Bytes per trained weight: in fp32 weight, gradient and AdamW's two moments; in bf16 2 each for weight
and gradient, and 12 for the weight's fp32 copy and the moments."""

ROOM = 0.8
"""Share of the free memory that ``layers_that_fit`` plans with; its count of activations is rough."""


def config_of(spec: Spec, layers: int | None = None) -> LlavaConfig:
    """A LLaVA's configuration. The image's token, padding and ``<VoCo>`` are among the last 64 ids."""
    if layers is not None:
        spec = replace(spec, text={**spec.text, "num_hidden_layers": layers})
    image = spec.text["vocab_size"] - 64
    names = SimpleNamespace(
        image_token_id=image, pad_token_id=image + 1, bos_token_id=1, eos_token_id=2
    )
    return build_config(spec, names)


def voco_token_id(config: LlavaConfig) -> int:
    return config.image_token_id + 2


def build(
    spec: Spec, layers: int | None, device: torch.device, dtype: torch.dtype, *, checkpointing: bool
) -> LlavaForConditionalGeneration:
    """Random weights on the device, in training mode but for the vision tower, which is frozen.

    Raises:
        torch.OutOfMemoryError: it doesn't fit.
    """
    model = build_model(config_of(spec, layers), device, dtype, std=spec.std).train()
    model.model.vision_tower.eval().requires_grad_(False)
    if checkpointing:
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def layers_that_fit(free_bytes: int, tokens: int, *, checkpointing: bool) -> int:
    """How many of LLaVA-1.5-7B's 32 layers can be trained in bf16 with that much free memory.

    Args:
        tokens: of a padded batch.
    """
    text = LARGE.text
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    vocabulary = text["vocab_size"]
    each = BYTES_A_WEIGHT
    layer = each * (4 * hidden**2 + 3 * hidden * inner)
    # Kept for the backward pass, in bytes a token: both norms with their fp32 copies (20 a channel), q,
    # k, v, out and rotated q and k (12), the residual stream (4); four tensors of the MLP.
    kept = 36 * hidden + 8 * inner
    layer += tokens * (2 * hidden if checkpointing else kept)
    fixed = each * (2 * vocabulary + 2 * hidden) * hidden  # embeddings, head, projector
    fixed += 2 * 304 * 10**6  # the vision tower, frozen
    fixed += each * 105 * 10**6  # a Q-Former
    fixed += 16 * tokens * vocabulary  # logits, their fp32 copy, log-softmax and gradients
    fixed += tokens * kept if checkpointing else 0  # of the layer that is computed again
    return max(1, min(text["num_hidden_layers"], int((ROOM * free_bytes - fixed) // layer)))


class Optimizer:
    """AdamW on all trained weights. Weights in bf16 have fp32 copies, which are what is updated;
    gradients become fp32 block by block, so that one block's are in memory twice at most.
    """

    def __init__(self, model: nn.Module, learning_rate: float = 2e-5) -> None:
        blocks: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                blocks.setdefault(_block(name), []).append(parameter)
        self._blocks = []
        for own in blocks.values():
            masters = own
            if own[0].dtype != torch.float32:
                masters = [nn.Parameter(parameter.detach().float()) for parameter in own]
            adam = torch.optim.AdamW(masters, lr=learning_rate, fused=True)
            self._blocks.append((own, masters, adam))

    def step(self) -> None:
        """Update, and drop the gradients."""
        for own, masters, adam in self._blocks:
            if masters is not own:
                for parameter, master in zip(own, masters, strict=True):
                    if parameter.grad is not None:
                        master.grad, parameter.grad = parameter.grad.float(), None
            adam.step()
            adam.zero_grad(set_to_none=True)
            if masters is not own:
                with torch.no_grad():
                    for parameter, master in zip(own, masters, strict=True):
                        parameter.copy_(master)


def _block(name: str) -> str:
    """``"...layers.3"``; everything else by its first three parts."""
    head, found, tail = name.partition(".layers.")
    return f"{head}.{tail.split('.')[0]}" if found else ".".join(name.split(".")[:3])


# ---- the methods; each makes its mask from the batch's token ids once a step, inside the time


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: for options and records.
        packed: takes all documents in one row.
        attached: a context in which the model is what ``forward`` needs.
        forward: ``(model, batch)`` -> an output with ``loss`` and ``logits``.
        missing: ``(device)`` -> why it can't be trained there, or None.
    """

    name: str
    packed: bool
    attached: Callable
    forward: Callable
    missing: Callable[[torch.device], str | None] = lambda device: None


def dense_forward(model: LlavaForConditionalGeneration, batch: Batch):
    """Transformers' SDPA under a dense mask ``[B, 1, S, S]``, as the authors' code has it."""
    mask = dense_mask(layout_of(model, batch), next(model.parameters()).dtype)
    return model(**_inputs(batch), attention_mask=mask, use_cache=False)


def dense_mask(layout: MaskLayout, dtype: torch.dtype) -> Tensor:
    """0 where visible and -inf where not, its rows padded to a multiple of 8 elements as SDPA's kernels
    want them: the fastest form that they take. Padding sees itself: a row of -inf would be NaN."""
    length = layout.length
    itself = torch.eye(length, dtype=torch.bool, device=layout.device)
    visible = layout.materialize() | (itself & (layout.visible_until == 0)[:, :, None])
    aligned = -(-length // 8) * 8
    mask = torch.empty(layout.batch, 1, length, aligned, dtype=dtype, device=layout.device)
    mask = mask[..., :length]
    mask.zero_().masked_fill_(~visible[:, None], float("-inf"))
    return mask


class Flex:
    """Compiled FlexAttention under a ``BlockMask``. Its mask_mod reads two tensors that are written
    again for each batch: it stays the same function, and nothing is compiled twice."""

    NAME = "bench-flex"

    def __init__(self) -> None:
        self._bounds: tuple[Tensor, Tensor] | None = None
        self._visible = None

    def forward(self, model: LlavaForConditionalGeneration, batch: Batch):
        layout = layout_of(model, batch)
        bounds = (layout.visible_from, layout.visible_until)
        if self._bounds is None or self._bounds[0].shape != bounds[0].shape:
            self._bounds = tuple(bound.clone() for bound in bounds)
            start, stop = self._bounds

            def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return (start[b, q] <= k) & (k <= q) & (q < stop[b, k])

            self._visible = visible
        for kept, new in zip(self._bounds, bounds, strict=True):
            kept.copy_(new)
        length = layout.length
        mask = create_block_mask(
            self._visible, layout.batch, None, length, length, device=layout.device
        )
        return model(**_inputs(batch), attention_mask=mask, use_cache=False)

    @staticmethod
    def missing(device: torch.device) -> str | None:
        if device.type == "cpu":
            return "FlexAttention has no backward pass on a CPU"
        return None


compiled_flex = torch.compile(flex_attention, dynamic=False)


def _flex_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """An ``AttentionInterface`` function. Uncompiled on a CPU, where only tests call it."""
    attend = compiled_flex if query.is_cuda else flex_attention
    grouped = query.shape[1] != key.shape[1]
    out = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(Flex.NAME, _flex_attention)


def masked_forward(model: LlavaForConditionalGeneration, batch: Batch):
    """An enabled model derives its layout from the token ids; a packed row needs its positions."""
    if batch.position_ids is not None:
        return model(**_inputs(batch), position_ids=batch.position_ids)
    return model(**_inputs(batch), attention_mask=batch.real)


@contextmanager
def enabled(num_voco: int, model: LlavaForConditionalGeneration) -> Iterator[None]:
    with attach(model, num_voco=num_voco, voco_token_id=voco_token_id(model.config)):
        yield


@contextmanager
def nothing(model: nn.Module) -> Iterator[None]:
    """Leave the model as it is."""
    yield


@contextmanager
def switched(attention: str, model: LlavaForConditionalGeneration) -> Iterator[None]:
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": attention})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


def masked_methods(num_voco: int) -> dict[str, Method]:
    """Those that train one model on the same tokens, the one that others are compared with first."""
    flex = Flex()
    ours = partial(enabled, num_voco)
    methods = [
        Method("dense", False, partial(switched, "sdpa"), dense_forward),
        Method("flex", False, partial(switched, Flex.NAME), flex.forward, flex.missing),
        Method("padded", False, ours, masked_forward),
        Method("packed", True, ours, masked_forward),
    ]
    return {method.name: method for method in methods}


def layout_of(model: LlavaForConditionalGeneration, batch: Batch) -> MaskLayout:
    return MaskLayout.from_input_ids(
        batch.input_ids,
        voco_token_id=voco_token_id(model.config),
        image_token_id=model.config.image_token_id,
        attention_mask=batch.real,
        position_ids=batch.position_ids,
    )


def _inputs(batch: Batch) -> dict[str, Tensor | None]:
    return {
        "input_ids": batch.input_ids,
        "pixel_values": batch.pixel_values,
        "labels": batch.labels,
    }


# ---- the Q-Former


class QFormerLlava(nn.Module):
    """The rival of the paper's Table 5 (supplement, section 3.4): a Q-Former of BLIP-2's architecture
    (BERT-base, cross-attention in every other layer) reads the vision tower's features into query
    tokens, a linear layer takes them to the language model's width, and the language model reads
    ``[query | text]``, plain causal.

    Takes the vision tower and the language model of a LLaVA, whose projector it drops.

    Args:
        queries: an image.
        small: two narrow layers, for tests.
    """

    def __init__(
        self, llava: LlavaForConditionalGeneration, queries: int, *, small: bool = False
    ) -> None:
        super().__init__()
        config = llava.config
        self.q_former_config = Blip2QFormerConfig(
            encoder_hidden_size=config.vision_config.hidden_size,
            **(Q_FORMER_SMALL if small else {}),
        )
        weight = llava.lm_head.weight
        self.q_former = Blip2QFormerModel(self.q_former_config)
        width = self.q_former_config.hidden_size
        self.projection = nn.Linear(width, config.text_config.hidden_size)
        self.query = nn.Parameter(torch.randn(1, queries, width) * 0.02)
        self.to(weight.device, weight.dtype)
        self.llava = llava
        llava.model.multi_modal_projector = None

    def forward(self, batch: Batch):
        """No mask is needed: padding is on the right, where no token looks."""
        embeddings = self.llava.get_input_embeddings()(batch.input_ids)
        if batch.pixel_values is not None:
            base = self.llava.model
            with torch.no_grad():
                states = base.vision_tower(batch.pixel_values, output_hidden_states=True)
            features = states.hidden_states[self.llava.config.vision_feature_layer][:, 1:]
            read = self.q_former(
                query_embeds=self.query.expand(len(features), -1, -1),
                encoder_hidden_states=features,
            ).last_hidden_state
            place = (batch.input_ids == self.llava.config.image_token_id)[..., None]
            embeddings = embeddings.masked_scatter(place, self.projection(read))
        return self.llava(inputs_embeds=embeddings, labels=batch.labels, use_cache=False)


def free(device: torch.device) -> None:
    """Free what the step or model before has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""``attention``: attention weights of VoCo tokens and text, for one question about one image.

A fused kernel doesn't materialize attention weights. One masked pass over prompt and answer runs
unchanged, while a dispatch mode reads the queries and keys of each call of ``masked_attention``'s
operator; the model is never modified. From these, the softmax is computed again for the rows of
interest: the VoCo tokens and the text after them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaForConditionalGeneration

from voco_kernels import MaskLayout
from voco_model.pictures import as_images, decode, ground_of
from voco_model.vlm.attach import check_ready
from voco_model.vlm.devices import execution_device
from voco_model.vlm.prompt import prompt, style_in


@dataclass(frozen=True, eq=False)
class Explanation:
    """Attention weights, averaged over a layer's heads, float32 on the CPU.

    Shapes use ``L`` layers, ``n`` VoCo tokens, ``C`` tokens before these that aren't image tokens, and
    ``T`` tokens of text, including the answer. The weights of a token sum to 1 in each layer:
    ``voco_over_image`` with ``voco_over_tiles``, ``voco_over_context`` and ``voco_over_voco``;
    ``text_over_voco`` with ``text_over_text``.

    Attributes:
        picture: uint8 ``[height, width, 3]``, as the model saw it, resized and cropped.
        voco_over_image: ``[L, n, rows, columns]``, over the patches of ``picture``.
        voco_over_tiles: ``[L, n]``, over LLaVA-NeXT's further tiles and the ends of their rows; 0 for
            LLaVA-1.5.
        voco_over_context: ``[L, n, C]``, over ``context_tokens``: BOS, often a sink, and the newline.
        voco_over_voco: ``[L, n, n]``, over the VoCo tokens up to and including itself.
        text_over_voco: ``[L, T, n]``.
        text_over_text: ``[L, T]``, over the text up to and including itself. Text sees nothing else.
        context_tokens: C decoded tokens.
        text_tokens: T decoded tokens: the text after the VoCo tokens, then the answer.
        answer_start: index of the answer's first token in ``text_tokens``. The token before predicted
            it, so ``text_tokens[answer_start - 1 :]`` predicted the answer and its end.
        question, answer: as text.
    """

    picture: Tensor
    voco_over_image: Tensor
    voco_over_tiles: Tensor
    voco_over_context: Tensor
    voco_over_voco: Tensor
    text_over_voco: Tensor
    text_over_text: Tensor
    context_tokens: tuple[str, ...]
    text_tokens: tuple[str, ...]
    answer_start: int
    question: str
    answer: str

    @property
    def num_layers(self) -> int:
        return self.voco_over_image.shape[0]

    @property
    def num_voco(self) -> int:
        return self.voco_over_image.shape[1]


@torch.no_grad()
def attention(
    model, image: Any, question: str, *, processor, max_new_tokens: int = 32
) -> Explanation:
    """Answer a question, and return where attention went meanwhile.

    The answer is greedy. It ends before a ``<VoCo>`` or image token, which would change the mask of the
    whole sequence.

    Args:
        model: enabled, in eval mode. Neither it nor its config is changed.
        image: one image, in any form that ``voco_model.pictures.decode`` takes.
        processor: the one given to ``enable``.
        max_new_tokens: most tokens of the answer, at least 1.

    Returns:
        the weights; for LLaVA-NeXT, maps are over the first tile, which shows the whole picture.

    Raises:
        PictureError: an image that isn't one, or that can't be read.
        ValueError: a model that isn't enabled or is in training mode, several images, a processor of
            another model, or image tokens that aren't the patches of a picture, row by row.
        RuntimeError: the attention of some layers couldn't be read: they are compiled or replaced.
    """
    check_ready(model)
    if max_new_tokens < 1:
        raise ValueError(f"expected max_new_tokens >= 1, got {max_new_tokens}")
    asked, vision = _prepare(model, image, question, processor)
    patches = _patches(model, asked, vision["pixel_values"])
    said = _answer(model, asked, vision, max_new_tokens)
    ids = torch.cat([asked, asked.new_tensor(said)[None]], dim=1)
    first = int((ids[0] == model.config.voco_token_id).int().argmax())
    weights = _read(model, ids, vision, first)

    ids, stop, tokenizer = ids[0].cpu(), first + model.config.num_voco, processor.tokenizer
    is_image = ids == model.config.image_token_id
    is_context = ~is_image & (torch.arange(len(ids)) < first)
    of_voco, of_text = weights[:, : stop - first], weights[:, stop - first :]
    over_map, over_tiles = of_voco[..., is_image].tensor_split([math.prod(patches)], dim=-1)
    return Explanation(
        picture=_picture(vision["pixel_values"], processor.image_processor),
        voco_over_image=over_map.unflatten(-1, patches),
        voco_over_tiles=over_tiles.sum(-1),
        voco_over_context=of_voco[..., is_context],
        voco_over_voco=of_voco[..., first:stop],
        text_over_voco=of_text[..., first:stop],
        text_over_text=of_text[..., stop:].sum(-1),
        context_tokens=_decoded(tokenizer, ids[is_context]),
        text_tokens=_decoded(tokenizer, ids[stop:]),
        answer_start=asked.shape[1] - stop,
        question=question,
        answer=tokenizer.decode(said, skip_special_tokens=True).strip(),
    )


class ReadAttention(TorchDispatchMode):
    """Records attention weights of each ``masked_attention`` call on one row, while it is active.

    Args:
        first: first query to record; all later ones are recorded too.

    Attributes:
        layers: float32 ``[S - first, S]`` on the CPU for each call: the softmax, averaged over heads.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.layers: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.voco_kernels.attention_forward.default:
            q, k, _, *layout, scale, _, _ = args
            visible = MaskLayout.from_tensors(*layout).materialize()[0, self.first :]
            weights = _softmax(q[0, :, self.first :], k[0], visible, scale)
            self.layers.append(weights.mean(0).cpu())
        return func(*args, **(kwargs or {}))


def _softmax(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """float32 ``[Hq, Q, K]`` of q ``[Hq, Q, D]``, k ``[Hkv, K, D]``, visible ``[Q, K]``."""
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    scores = scale * (q.float() @ k.float().transpose(-1, -2))
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def _prepare(model, image: Any, question: str, processor) -> tuple[Tensor, dict[str, Tensor]]:
    """Token ids ``[1, S]`` of the prompt, and the vision tower's inputs, on the model's device."""
    config = model.config
    written = prompt(question, config.num_voco, style=style_in(config))
    images = list(as_images(image))
    if len(images) != 1:
        raise ValueError(f"expected one image, got {len(images)}; explain each by itself")
    picture = decode(images[0], ground=ground_of(config), processor=processor)
    inputs = processor(images=picture, text=written, return_tensors="pt")
    found = int((inputs["input_ids"] == config.voco_token_id).sum())
    if found != config.num_voco:
        raise ValueError(
            f"expected {config.num_voco} VoCo tokens (id {config.voco_token_id}) in the prompt, got "
            f"{found}; pass the processor that was given to enable"
        )
    device = execution_device(model.get_input_embeddings())
    vision = {
        name: inputs[name].to(device, model.dtype if name == "pixel_values" else None)
        for name in ("pixel_values", "image_sizes")
        if name in inputs
    }
    return inputs["input_ids"].to(device), vision


def _patches(model, asked: Tensor, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of the patches that the first image tokens represent."""
    config = model.config
    rows, columns = (side // config.vision_config.patch_size for side in pixels.shape[-2:])
    found = int((asked == config.image_token_id).sum())
    whole = isinstance(model, LlavaForConditionalGeneration)
    fits = found == rows * columns if whole else found >= rows * columns
    strategy = config.vision_feature_select_strategy
    if strategy != "default" or not fits:
        raise ValueError(
            f"expected image tokens that are {rows} x {columns} patches, without a class token, got "
            f"{found} and vision_feature_select_strategy {strategy!r}; such a model has no map"
        )
    return rows, columns


def _read(model, ids: Tensor, vision: dict[str, Tensor], first: int) -> Tensor:
    """float32 ``[L, S - first, S]``: the attention weights of all queries from ``first`` on."""
    with ReadAttention(first) as read:
        model.model(input_ids=ids, use_cache=False, **vision)
    layers = model.config.text_config.num_hidden_layers
    if len(read.layers) != layers:
        raise RuntimeError(
            f"reading attention failed: {len(read.layers)} of {layers} layers called masked_attention; "
            "explain the model as enable left it, not compiled, with all of its layers"
        )
    return torch.stack(read.layers)


def _answer(model, asked: Tensor, vision: dict[str, Tensor], max_new_tokens: int) -> list[int]:
    """Token ids of the greedy answer, without its end."""
    sequences = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=False,
        **vision,
    )
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    ends = {*ends, model.config.voco_token_id, model.config.image_token_id}
    return list(takewhile(lambda token: token not in ends, sequences[0, asked.shape[1] :].tolist()))


def _picture(pixels: Tensor, image_processor) -> Tensor:
    """uint8 ``[height, width, 3]``: the processed picture with its normalization undone."""
    shown = pixels[0].float().cpu()
    shown = shown[0] if shown.dim() == 4 else shown  # the first tile is the whole picture
    if image_processor.do_normalize:
        mean, std = (
            torch.tensor(getattr(image_processor, name))[:, None, None]
            for name in ("image_mean", "image_std")
        )
        shown = shown * std + mean
    if image_processor.do_rescale:
        shown = shown / image_processor.rescale_factor
    return shown.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()


def _decoded(tokenizer, ids: Tensor) -> tuple[str, ...]:
    return tuple(tokenizer.decode([token]) for token in ids.tolist())

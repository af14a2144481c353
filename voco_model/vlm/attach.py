"""``enable``: VoCo attention in a LLaVA, and ``undo``."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakSet

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.processing_utils import ProcessorMixin

from voco_model.arguments import whole_number
from voco_model.vlm.attention import ATTENTION_NAME, hand_out_layout
from voco_model.vlm.control_tokens import control_tokens, prepare_tokenizer
from voco_model.vlm.devices import is_offloaded
from voco_model.vlm.embeddings import name_of_row, number_rows
from voco_model.vlm.enabled_processor import extend_processor
from voco_model.vlm.processor_check import check_processor, checked_tokenizer
from voco_model.vlm.prompt import VOCO_TOKEN, chat_template, style_of
from voco_model.vlm.undo import put, remember
from voco_model.vlm.warn import training_gap, warn_once

SUPPORTED = (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)
IN_USE: WeakSet = WeakSet()  # models with a method of voco_model.baselines applied


class Enabled:
    """What ``enable`` did; as a context manager, undoes it at the end.

    Attributes:
        model: the same object.
        voco_token_id: id of ``<VoCo>``.
        num_voco: VoCo tokens per image.
    """

    def __init__(
        self, model: PreTrainedModel, voco_token_id: int, num_voco: int, steps: ExitStack
    ) -> None:
        self.model = model
        self.voco_token_id = voco_token_id
        self.num_voco = num_voco
        self._steps = steps

    def undo(self) -> None:
        """Restore attention, hooks, config, embedding rows, tokenizer and chat template.

        Weights keep their current values (an added embedding row is cut off). Caches filled while the
        model was enabled must not be used afterwards. A second call does nothing.
        """
        self._steps.close()

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.undo()

    def __repr__(self) -> str:
        return (
            f"Enabled({type(self.model).__name__}, {VOCO_TOKEN} = {self.voco_token_id}, "
            f"num_voco={self.num_voco})"
        )


def enable(
    model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration,
    processor: ProcessorMixin | None = None,
    num_voco: int | None = None,
    *,
    voco_token_id: int | None = None,
    isolated: bool | None = None,
    distinct: bool | None = None,
    prompt: str | None = None,
) -> Enabled:
    """Switch a LLaVA's language model to VoCo attention; see ``docs/llava.md``.

    From now on every forward pass derives its mask from ``input_ids``: in training, in evaluation and in
    ``model.generate``. Prompts without VoCo tokens run as before. ``model.config`` records the number of
    VoCo tokens, the token's id, ``isolated``, ``distinct`` and ``prompt``, and ``save_pretrained``
    writes them.

    A loaded checkpoint has to be enabled again: ``from_pretrained`` alone gives a model whose text sees
    the image past the VoCo tokens.

    Args:
        model: LLaVA-1.5 or LLaVA-NeXT, with any text model that has full attention.
        processor: its tokenizer gets the token ``<VoCo>`` (embeddings grow only if they have no spare
            row), reads control tokens spelled in text as text, and appends nothing to a prompt; its chat
            template becomes that of Listing 1.
        num_voco: VoCo tokens per image; by default the config's number, else 1.
        voco_token_id: the token's id, if there is no processor; by default the config's.
        isolated: whether, in a prompt with several images, each is compressed as if it stood alone: its
            tokens see nothing before its first image token. Its entry then doesn't depend on the images
            shown with it. A model must be trained as it is used. By default what the config says, else
            False. With one image it makes no difference.
        distinct: whether each VoCo token of an image has its own embedding row, from the token's id on,
            instead of the paper's single shared row. Prompts stay the same. On a small model, distinct
            rows kept much more of the image (``docs/quality.md``). By default what the config says, else
            False.
        prompt: the prompt style, a name in ``vlm.prompt.STYLES``: ``"vicuna"`` (Listing 1),
            ``"mistral"``, ``"chatml"`` or ``"authors"``. By default what the config says, else
            ``"vicuna"``.

    Returns:
        a handle whose ``undo()`` restores everything.

    Raises:
        TypeError: another model class, or not a processor.
        ValueError: a model that is enabled already, has a method of ``voco_model.baselines`` applied or
            the projector of one; sliding-window attention, attention dropout or soft-capping; an unknown
            token id, or conflicting ids; a processor that counts image tokens differently from the
            model, or whose tokenizer lacks the token that ends an answer. Nothing is changed then.

    Warns:
        VoCoWarning: once per model, if its config says that it wasn't trained with VoCo tokens, or with
            another number of them.
    """
    gap = training_gap(getattr(model, "config", None), num_voco)
    handle = attach(
        model,
        processor,
        num_voco,
        voco_token_id=voco_token_id,
        isolated=isolated,
        distinct=distinct,
        prompt=prompt,
    )
    if gap is not None:
        warn_once(model, gap)
    return handle


def attach(
    model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration,
    processor: ProcessorMixin | None = None,
    num_voco: int | None = None,
    *,
    voco_token_id: int | None = None,
    isolated: bool | None = None,
    distinct: bool | None = None,
    prompt: str | None = None,
) -> Enabled:
    """``enable`` without its warnings, for models that are to be trained or measured untrained."""
    _check_model(model)
    tokenizer = None if processor is None else checked_tokenizer(model, processor)
    num_voco = _first_given(num_voco, getattr(model.config, "num_voco", None), 1)
    num_voco = whole_number("num_voco", num_voco, at_least=1)
    isolated = _first_given(isolated, getattr(model.config, "voco_isolated", None), False)
    if not isinstance(isolated, bool):
        raise ValueError(f"expected isolated as True or False, got {isolated!r}")
    distinct = _first_given(distinct, getattr(model.config, "voco_distinct", None), False)
    if not isinstance(distinct, bool):
        raise ValueError(f"expected distinct as True or False, got {distinct!r}")
    style = _first_given(prompt, getattr(model.config, "voco_prompt", None), "vicuna")
    style_of(style)
    if processor is not None:
        check_processor(processor, model.config, style)
    rows = num_voco if distinct else 1
    with ExitStack() as steps:  # an error undoes what was done
        if tokenizer is not None:
            name_tokens(tokenizer, rows, steps)
            template = chat_template(num_voco, style, control_tokens(tokenizer))
            put(steps, processor, "chat_template", template)
            extend_processor(processor, steps)
        token_id = _agreed_token_id(model, tokenizer, voco_token_id)
        _make_room(steps, model, tokenizer, token_id, rows)
        facts = {
            "voco_token_id": token_id,
            "num_voco": num_voco,
            "voco_isolated": isolated,
            "voco_distinct": distinct,
            "voco_prompt": style,
        }
        # The config of an upper bound says so; trained or saved from here on, it is a VoCo model.
        if getattr(model.config, "voco_baseline", None) is not None:
            facts["voco_baseline"] = None
        for name, value in facts.items():
            put(steps, model.config, name, value)
        _switch_attention(steps, model)
        if rows > 1:
            embeddings = model.get_input_embeddings()
            steps.callback(
                embeddings.register_forward_pre_hook(partial(number_rows, token_id, rows)).remove
            )
        steps.callback(
            model.model.register_forward_pre_hook(hand_out_layout, with_kwargs=True).remove
        )
        return Enabled(model, token_id, num_voco, steps.pop_all())


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether this model is enabled, or a copy of an enabled one."""
    hooks = getattr(getattr(model, "model", None), "_forward_pre_hooks", {})
    return hand_out_layout in hooks.values()


def check_ready(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` unless the model is enabled and in eval mode."""
    if not is_enabled(model):
        raise ValueError(
            f"expected an enabled model, got a {type(model).__name__} that isn't; call "
            "voco_model.enable(model, processor) first"
        )
    if model.training:
        raise ValueError("expected a model in eval mode, got one in training; call model.eval()")
    for name, module in model.named_modules():
        # Adapters added later may be in training mode although the model isn't.
        if module.training and isinstance(module, _DropoutNd | _BatchNorm):
            if getattr(module, "p", 1):
                raise ValueError(
                    f"expected a model in eval mode, got {name} in training mode, which makes answers "
                    "random; call model.eval()"
                )


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, SUPPORTED):
        names = " or ".join(cls.__name__ for cls in SUPPORTED)
        raise TypeError(
            f"expected a {names}, got {type(model).__name__}; enable the model itself, before it "
            "is wrapped (PEFT, DDP, torch.compile)"
        )
    if is_enabled(model):
        raise ValueError(
            "expected a model that is not enabled, got one that is, with "
            f"num_voco={model.config.num_voco}; call undo() on what enable returned (after load: "
            "load(...).handle.undo())"
        )
    baseline = (getattr(model.config, "voco_baseline", None) or {}).get("name", "full")
    if baseline != "full":
        raise ValueError(
            f"expected a LLaVA with its own projector, got one made for {baseline!r}; call undo() on "
            "what apply returned, or load it with voco_model.baselines.load"
        )
    if model in IN_USE:
        raise ValueError(
            "expected a model as it was loaded, got one that a method of voco_model.baselines is "
            "applied to; call undo() on what apply returned first"
        )
    text = model.config.text_config
    check_full_attention(text)
    dropout = getattr(text, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"expected attention_dropout 0, got {dropout}; masked_attention has no dropout: set "
            "model.config.text_config.attention_dropout = 0.0 before the model is built"
        )


def check_full_attention(text: PreTrainedConfig) -> None:
    """Raise ``ValueError`` for a language model with windows or soft-capping.

    Args:
        text: its config.
    """
    window = getattr(text, "sliding_window", None)
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if window is not None or others:
        raise ValueError(
            "expected a text model with full attention in all layers, got sliding_window="
            f"{window} and layer types {sorted(others)}; tokens outside a window would be lost. If "
            "prompts are shorter than the window, set config.text_config.sliding_window = None before "
            "the model is built"
        )
    softcap = getattr(text, "attn_logit_softcapping", None)
    if softcap is not None:
        raise ValueError(
            f"expected a text model without attention soft-capping, got attn_logit_softcapping="
            f"{softcap}; masked_attention has none"
        )


def name_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: int = 1, steps: ExitStack | None = None
) -> None:
    """Make ``<VoCo>`` the special token ``tokenizer.voco_token``, if it isn't yet, and prepare the
    tokenizer for prompts.

    Args:
        rows: embedding rows of VoCo tokens; each one after the first is a token of its own.
        steps: receives the callbacks that undo it.

    Raises:
        ValueError: the ids after ``<VoCo>`` are taken, or as ``prepare_tokenizer``. The tokenizer stays
            changed unless ``steps`` are closed.
    """
    _add_tokens(tokenizer, rows, steps)
    prepare_tokenizer(tokenizer, steps)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, rows: int, steps: ExitStack | None) -> None:
    others = [name_of_row(row) for row in range(1, rows)]
    known = getattr(tokenizer, "voco_token", None) == VOCO_TOKEN
    if known and set(others) <= set(tokenizer.get_vocab()):
        return
    if steps is not None:
        # The tokenizers library can't remove a token, so keep a copy of the whole state.
        before = copy.deepcopy(tokenizer.__dict__)

        def restore() -> None:
            tokenizer.__dict__.clear()
            tokenizer.__dict__.update(before)

        steps.callback(restore)
    if not known:
        tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, "voco_token"]
        tokenizer.add_special_tokens({"voco_token": VOCO_TOKEN})
    if others:
        tokenizer.add_tokens(others, special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(others)
        first = tokenizer.voco_token_id + 1
        if ids != list(range(first, first + len(ids))):
            raise ValueError(
                f"expected ids {first} to {first + len(ids) - 1} to be free for the rows of "
                f"{VOCO_TOKEN}, got {ids[0]} to {ids[-1]}; distinct=True needs a tokenizer without "
                f"tokens after {VOCO_TOKEN}"
            )


def _agreed_token_id(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, voco_token_id: int | None
) -> int:
    """The id on which argument, config and tokenizer agree, as far as they give one."""
    known = {
        "voco_token_id": voco_token_id,
        "model.config": getattr(model.config, "voco_token_id", None),
        "the tokenizer": None if tokenizer is None else tokenizer.voco_token_id,
    }
    given = {where: value for where, value in known.items() if value is not None}
    if not given:
        raise ValueError(
            f"expected the id of {VOCO_TOKEN}, got neither processor nor voco_token_id, and none in the "
            "model's config; pass enable(model, processor) to add the token, or "
            "enable(model, voco_token_id=...)"
        )
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{value} ({where})" for where, value in given.items())
        raise ValueError(f"expected one id for {VOCO_TOKEN}, got {listed}")
    token_id = next(iter(given.values()))
    if token_id == model.config.image_token_id:
        raise ValueError(
            f"expected a voco_token_id other than the image token's, got {token_id} for both"
        )
    return token_id


def _make_room(
    steps: ExitStack,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_id: int,
    rows: int,
) -> None:
    """Grow the embeddings if the tokenizer has outgrown them; many checkpoints have spare rows."""
    there = model.get_input_embeddings().num_embeddings
    if 0 <= token_id and token_id + rows <= there:
        return
    if tokenizer is None:
        needed = str(token_id) if rows == 1 else f"{token_id} to {token_id + rows - 1}"
        raise ValueError(
            f"expected a voco_token_id among the model's {there} embedding rows, got {needed}; "
            "pass the processor, so that enable can add a row"
        )
    if is_offloaded(model.get_input_embeddings()) or is_offloaded(model.get_output_embeddings()):
        raise ValueError(
            f"expected embeddings in memory, to add a row for {VOCO_TOKEN}, got offloaded ones; keep "
            "embed_tokens and lm_head out of what device_map offloads, or enable the model without "
            "device_map, save it, and load that"
        )
    remember(steps, model, "vocab_size")
    steps.callback(partial(model.resize_token_embeddings, there))
    model.resize_token_embeddings(max(len(tokenizer), token_id + rows), mean_resizing=False)


def _switch_attention(steps: ExitStack, model: PreTrainedModel) -> None:
    before = model.config.text_config._attn_implementation
    steps.callback(partial(model.set_attn_implementation, {"text_config": before}))
    model.set_attn_implementation({"text_config": ATTENTION_NAME})
    if model.config.text_config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            "expected a text model whose attention can be switched, got "
            f"{type(model.model.language_model).__name__}, which doesn't use transformers' "
            "AttentionInterface"
        )


def _first_given(*values: Any) -> Any:
    return next(value for value in values if value is not None)

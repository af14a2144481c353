"""``enable``: VoCo attention in a LLaVA, and everything back as it was with ``undo``."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from weakref import WeakSet

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.processing_utils import ProcessorMixin

from voco_model.arguments import whole_number
from voco_model.vlm.answer_mask import mark_answers
from voco_model.vlm.attention import ATTENTION_NAME, hand_out_layout
from voco_model.vlm.control_tokens import control_tokens, prepare_tokenizer
from voco_model.vlm.devices import is_offloaded
from voco_model.vlm.embeddings import name_of_row, number_rows
from voco_model.vlm.processor_check import check_processor
from voco_model.vlm.prompt import VOCO_TOKEN, chat_template, style_of

SUPPORTED = (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)
IN_USE: WeakSet = WeakSet()  # models that a method of voco_model.baselines is applied to


class Enabled:
    """What ``enable`` did. Also a context manager that undoes it at the end.

    Attributes:
        model: the model, still the same object.
        voco_token_id: id of ``<VoCo>``.
        num_voco: number of VoCo tokens an image.
    """

    def __init__(self, model, voco_token_id: int, num_voco: int, steps: ExitStack) -> None:
        self.model = model
        self.voco_token_id = voco_token_id
        self.num_voco = num_voco
        self._steps = steps

    def undo(self) -> None:
        """Restore attention, hooks, config, embedding rows, tokenizer and chat template.

        Weights stay as they are now (an added embedding row is cut off); caches made in between
        must not be used any more. A second call does nothing.
        """
        self._steps.close()

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception) -> None:
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

    From now on every forward pass derives its mask from ``input_ids``: in training, in evaluation
    and in ``model.generate``. Prompts without VoCo tokens run as before. The number of VoCo tokens,
    the token's id, ``isolated``, ``distinct`` and ``prompt`` are kept in ``model.config``, so that
    ``save_pretrained`` carries them.

    Args:
        model: LLaVA-1.5 or LLaVA-NeXT, with any text model that has plain full attention.
        processor: its tokenizer gets the token ``<VoCo>`` (the model's embeddings grow only where
            they have no row left for it), keeps text that spells a control token text, and puts nothing
            behind a prompt; its chat template becomes that of Listing 1.
        num_voco: VoCo tokens an image; by default what the model's config says, else 1.
        voco_token_id: the token's id, where there is no processor to ask. By default what the
            model's config says.
        isolated: whether, in a prompt with several images, each is compressed as if it stood alone: its
            tokens don't see what stands before its first image token. So an image has one entry,
            whatever images it is shown with. A model must be trained as it is used. By default what the
            model's config says, else False. With one image it makes no difference.
        distinct: whether the VoCo tokens of an image have an embedding row each, from the token's id on,
            in place of the paper's one row for all. Prompts stay the same. On a small model that kept
            much more (``docs/quality.md``). By default what the model's config says, else False.
        prompt: the style of prompts, a name of ``vlm.prompt.STYLES``: ``"vicuna"`` (Listing 1),
            ``"mistral"``, ``"chatml"`` or ``"authors"``. By default what the model's config says, else
            ``"vicuna"``.

    Returns:
        a handle whose ``undo()`` restores everything.

    Raises:
        TypeError: another model class, or no processor where one is expected.
        ValueError: a model that is enabled already, has a method of ``voco_model.baselines`` applied or
            the projector of one, sliding-window attention, attention dropout or soft-capping, an unknown
            token id, or ids that don't fit together; a processor that counts image tokens otherwise than
            the model, or whose tokenizer lacks the token that ends an answer. Nothing is changed then.
    """
    _check_model(model)
    tokenizer = _checked_tokenizer(model, processor)
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
    with ExitStack() as steps:  # on an error, what was done is undone
        if tokenizer is not None:
            name_tokens(tokenizer, rows, steps)
            _remember(steps, processor, "chat_template")
            processor.chat_template = chat_template(num_voco, style, control_tokens(tokenizer))
            mark_answers(processor, steps)
        token_id = _agreed_token_id(model, tokenizer, voco_token_id)
        _make_room(steps, model, tokenizer, token_id, rows)
        facts = {
            "voco_token_id": token_id,
            "num_voco": num_voco,
            "voco_isolated": isolated,
            "voco_distinct": distinct,
            "voco_prompt": style,
        }
        # A model tuned as the upper bound says so; tuned or saved from here on, it is a VoCo model.
        if getattr(model.config, "voco_baseline", None) is not None:
            facts["voco_baseline"] = None
        for name, value in facts.items():
            _remember(steps, model.config, name)
            setattr(model.config, name, value)
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


def is_enabled(model) -> bool:
    """Whether ``enable`` was called on this model, or on the one that it is a copy of."""
    hooks = getattr(getattr(model, "model", None), "_forward_pre_hooks", {})
    return hand_out_layout in hooks.values()


def check_ready(model) -> None:
    """Raise ``ValueError`` unless the model is enabled and in eval mode."""
    if not is_enabled(model):
        raise ValueError(
            f"expected an enabled model, got a {type(model).__name__} that isn't; call "
            "voco_model.enable(model, processor) first"
        )
    if model.training:
        raise ValueError("expected a model in eval mode, got one in training; call model.eval()")
    for name, module in model.named_modules():
        # Adapters that were added since may be in training mode by themselves.
        if module.training and isinstance(module, _DropoutNd | _BatchNorm):
            if getattr(module, "p", 1):
                raise ValueError(
                    f"expected a model in eval mode, got {name} in training, whose answers are random; "
                    "call model.eval()"
                )


def _check_model(model) -> None:
    if not isinstance(model, SUPPORTED):
        names = " or ".join(cls.__name__ for cls in SUPPORTED)
        raise TypeError(
            f"expected a {names}, got {type(model).__name__}; enable the model itself, before it "
            "is wrapped (PEFT, DDP, torch.compile)"
        )
    if is_enabled(model):
        raise ValueError(
            "expected a model that is not enabled, got one that is, with "
            f"num_voco={model.config.num_voco}; call undo() on what enable returned first"
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
    window = getattr(text, "sliding_window", None)
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if window is not None or others:
        raise ValueError(
            "expected a text model with full attention in all layers, got sliding_window="
            f"{window} and layer types {sorted(others)}; VoCo tokens outside a window would be "
            "lost. Where the prompts are shorter than the window, set "
            "config.text_config.sliding_window = None before the model is built"
        )
    softcap = getattr(text, "attn_logit_softcapping", None)
    if softcap is not None:
        raise ValueError(
            f"expected a text model without attention soft-capping, got attn_logit_softcapping="
            f"{softcap}; masked_attention has none"
        )
    dropout = getattr(text, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"expected attention_dropout 0, got {dropout}; masked_attention has no dropout: set "
            "model.config.text_config.attention_dropout = 0.0 before the model is built"
        )


def _checked_tokenizer(model, processor):
    if processor is None:
        return None
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(processor, ProcessorMixin) or tokenizer is None:
        raise TypeError(
            f"expected a processor with a tokenizer (LlavaProcessor, LlavaNextProcessor), got "
            f"{type(processor).__name__}"
        )
    image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    if image_id != model.config.image_token_id:
        raise ValueError(
            "expected the processor's image token to be the model's "
            f"{model.config.image_token_id}, got {processor.image_token} = {image_id}; they come "
            "from different checkpoints"
        )
    return tokenizer


def name_tokens(tokenizer, rows: int = 1, steps: ExitStack | None = None) -> None:
    """Make ``<VoCo>`` the special token ``tokenizer.voco_token``, if it isn't yet, and prepare the
    tokenizer for prompts.

    Args:
        rows: embedding rows of VoCo tokens; each behind the first has a name of its own.
        steps: gets the way back.

    Raises:
        ValueError: ids behind ``<VoCo>``'s that are taken, or as ``prepare_tokenizer``. The tokenizer is
            changed then, if ``steps`` isn't closed.
    """
    _add_tokens(tokenizer, rows, steps)
    prepare_tokenizer(tokenizer, steps)


def _add_tokens(tokenizer, rows: int, steps: ExitStack | None) -> None:
    others = [name_of_row(row) for row in range(1, rows)]
    known = getattr(tokenizer, "voco_token", None) == VOCO_TOKEN
    if known and set(others) <= set(tokenizer.get_vocab()):
        return
    if steps is not None:
        # The tokenizers library can't remove a token: keep a copy of the whole state instead.
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
                f"{VOCO_TOKEN}, got {ids[0]} to {ids[-1]}; a tokenizer with tokens behind {VOCO_TOKEN} "
                "can't have distinct=True"
            )


def _agreed_token_id(model, tokenizer, voco_token_id: int | None) -> int:
    """The one id that the argument, the config and the tokenizer give, where they give one."""
    known = {
        "voco_token_id": voco_token_id,
        "model.config": getattr(model.config, "voco_token_id", None),
        "the tokenizer": None if tokenizer is None else tokenizer.voco_token_id,
    }
    given = {where: value for where, value in known.items() if value is not None}
    if not given:
        raise ValueError(
            f"expected the id of {VOCO_TOKEN}, got neither processor nor voco_token_id, and the "
            "model's config has none; pass enable(model, processor) to add the token, or "
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


def _make_room(steps: ExitStack, model, tokenizer, token_id: int, rows: int) -> None:
    """Grow the embeddings if the tokenizer has outgrown them; many checkpoints have spare rows."""
    there = model.get_input_embeddings().num_embeddings
    if 0 <= token_id and token_id + rows <= there:
        return
    if tokenizer is None:
        wanted = str(token_id) if rows == 1 else f"{token_id} to {token_id + rows - 1}"
        raise ValueError(
            f"expected a voco_token_id among the model's {there} embedding rows, got {wanted}; "
            "pass the processor, so that enable can add a row"
        )
    if is_offloaded(model.get_input_embeddings()) or is_offloaded(model.get_output_embeddings()):
        raise ValueError(
            f"expected embeddings in memory, for a row of {VOCO_TOKEN} more, got offloaded ones; leave "
            "embed_tokens and lm_head out of what device_map offloads, or enable the model without "
            "device_map, save it, and load that"
        )
    _remember(steps, model, "vocab_size")
    steps.callback(partial(model.resize_token_embeddings, there))
    model.resize_token_embeddings(max(len(tokenizer), token_id + rows), mean_resizing=False)


def _switch_attention(steps: ExitStack, model) -> None:
    before = model.config.text_config._attn_implementation
    steps.callback(partial(model.set_attn_implementation, {"text_config": before}))
    model.set_attn_implementation({"text_config": ATTENTION_NAME})
    if model.config.text_config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            "expected a text model whose attention can be switched, got "
            f"{type(model.model.language_model).__name__}, which doesn't use transformers' "
            "AttentionInterface"
        )


def _remember(steps: ExitStack, owner, name: str) -> None:
    """Restore this attribute, or its absence, on undo."""
    if hasattr(owner, name):
        steps.callback(setattr, owner, name, getattr(owner, name))
    else:
        steps.callback(delattr, owner, name)


def _first_given(*values):
    return next(value for value in values if value is not None)

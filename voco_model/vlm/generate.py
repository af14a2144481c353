"""``generate``: pass 2, answers from compressed images; ``compress`` is pass 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import ModelOutput

from voco_kernels.kv.entry import CompactKV
from voco_model.arguments import is_whole
from voco_model.flops import head_dim_of
from voco_model.vlm.attach import check_ready
from voco_model.vlm.caches import CACHE_ARGUMENT, CompactCache
from voco_model.vlm.control_tokens import control_tokens, token_ids
from voco_model.vlm.devices import execution_device
from voco_model.vlm.prompt import VOCO_TOKEN, Turns, images_in, style_in, text_part
from voco_model.vlm.rope import check_length

# Arguments of model.generate that pass 2 provides.
_OWNED = (
    "input_ids",
    "inputs",
    "inputs_embeds",
    "position_ids",
    "past_key_values",
    "cache",
    "pixel_values",
    "image_sizes",
)
# Options of model.generate that repeat its prompt.
_COPIES = ("num_beams", "num_return_sequences")
# Options of model.generate that can't be exact with a compact cache, and why.
_SPECULATIVE = "it reads several new tokens at once, with a cache that is shorter than the text"
_REFUSED = {
    "prompt_lookup_num_tokens": _SPECULATIVE,
    "assistant_early_exit": _SPECULATIVE,
    "assistant_model": _SPECULATIVE,
    "use_mtp": _SPECULATIVE,
    "prefill_chunk_size": "its chunks start with the VoCo tokens, which are in the cache already",
    "cache_implementation": "the cache is made from the compact entries",
}


def generate(
    model: PreTrainedModel,
    compact: CompactKV | Sequence[CompactKV],
    text: str | Sequence | Tensor,
    *,
    processor: ProcessorMixin | None = None,
    attention_mask: Tensor | None = None,
    **generate_kwargs: Any,
) -> Tensor | ModelOutput:
    """Pass 2: answer from compressed images, through the model's own ``generate``.

    A single entry is used for all questions, and a single question for all entries; otherwise the two
    lists are paired row by row. Entries are not modified and can be reused.

    Args:
        model: enabled, in eval mode.
        compact: from ``compress``. Entries may differ in their number of VoCo tokens.
        text: a question, a conversation (messages as in Transformers, the last one the user's), or a
            list of either. Or token ids, int64 ``[B, T]``, that follow the VoCo tokens. ``compact``
            takes the place of an image in the messages.
        processor: the one given to ``enable``; required unless ``text`` is token ids.
        attention_mask: ``[B, T]`` for token ids, 0 for padding on the left.
        generate_kwargs: as for ``model.generate``: ``max_new_tokens``, ``do_sample``, ``num_beams``,
            ``num_return_sequences``, ``streamer``, ``return_dict_in_generate``, ... ``max_length``
            counts the VoCo tokens and the text.

    Returns:
        int64 ``[B * num_return_sequences, new]``, the new tokens only; with ``return_dict_in_generate``
        the output of ``model.generate``, its ``sequences`` cut likewise.

    Raises:
        ValueError: entries of another model, lists that don't pair up, or an option that can't be exact
            with a compact cache (``prompt_lookup_num_tokens``, an assistant, ``prefill_chunk_size``,
            ``use_cache=False``); a prompt too long for a rotation that depends on the length.
    """
    check_ready(model)
    _check_options(model, generate_kwargs)
    entries = [compact] if isinstance(compact, CompactKV) else list(compact)
    _check_entries(model, entries)
    rows = _token_rows(model, text, processor, attention_mask)
    entries, rows = _pair_up(entries, rows)
    cache = CompactCache(entries, _layer_devices(model), model.dtype)
    prompt = _second_pass_prompt(model, cache, rows)
    # generate repeats the prompt for beams and samples, but not a given cache.
    copies = max(_option(model, generate_kwargs, name) or 1 for name in _COPIES)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    output = model.generate(**prompt, **{CACHE_ARGUMENT: cache}, **generate_kwargs)
    length = prompt["input_ids"].shape[1]
    if isinstance(output, Tensor):
        return output[:, length:]
    output.sequences = output.sequences[:, length:]
    return output


def _option(model: PreTrainedModel, generate_kwargs: Mapping, name: str) -> Any:
    """A generation option, looked up as in ``generate``: arguments, given config, model's config."""
    sources = (generate_kwargs.get("generation_config"), model.generation_config)
    values = (generate_kwargs.get(name), *(getattr(source, name, None) for source in sources))
    return next((value for value in values if value is not None), None)


def _check_options(model: PreTrainedModel, generate_kwargs: Mapping) -> None:
    owned = sorted(set(_OWNED) & set(generate_kwargs))
    if owned:
        raise ValueError(
            f"expected none of {', '.join(_OWNED)}, got {', '.join(owned)}; pass 2 derives them from "
            "the compact entries and the text"
        )
    if _option(model, generate_kwargs, "use_cache") is False:
        raise ValueError("expected use_cache=True, got False; the image is only in the cache")
    for name, why in _REFUSED.items():
        value = _option(model, generate_kwargs, name)
        if value:
            raise ValueError(f"expected no {name} in the second pass, got {value!r}; {why}")


def _check_entries(model: PreTrainedModel, entries: Sequence[CompactKV]) -> None:
    if not entries:
        raise ValueError("expected at least one compact entry, got none")
    text = model.config.text_config
    # Without grouped-query attention, a config may lack num_key_value_heads.
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    expected = (text.num_hidden_layers, kv_heads, head_dim_of(text))
    for index, entry in enumerate(entries):
        if not isinstance(entry, CompactKV):
            raise TypeError(
                f"expected CompactKV entries from compress, got {type(entry).__name__} at {index}"
            )
        got = (entry.num_layers, entry.num_kv_heads, entry.head_dim)
        if got != expected:
            raise ValueError(
                f"expected entries of this model, with (layers, kv_heads, head_dim) {expected}, "
                f"got {got} in entry {index}; compress the image with this model"
            )


def _token_rows(
    model: PreTrainedModel,
    text: str | Sequence | Tensor,
    processor: ProcessorMixin,
    attention_mask: Tensor | None,
) -> list[list[int]]:
    """The text's token ids, one list without padding per row."""
    if isinstance(text, Tensor):
        rows = _rows_of_ids(text, attention_mask)
        _check_text_only(rows, model.config)
        return rows
    if attention_mask is not None:
        raise ValueError("expected an attention_mask with token ids only, got one with text")
    if processor is None:
        raise ValueError("expected a processor to tokenize the text, got none; or pass token ids")
    if not isinstance(text, Sequence) or isinstance(text, bytes):
        raise TypeError(
            "expected a question, a conversation, a list of either or token ids in a tensor, got "
            f"{type(text).__name__}"
        )
    if text and is_whole(text[0]):
        raise TypeError("expected token ids as an int64 tensor [B, T], got a list of them")
    is_conversation = not isinstance(text, str) and text and isinstance(text[0], Mapping)
    questions = [text] if isinstance(text, str) or is_conversation else list(text)
    return [_tokenize(processor.tokenizer, model.config, question) for question in questions]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, turns: Turns
) -> list[int]:
    images = images_in(turns, question=0)
    if images > 1:
        raise ValueError(
            f"expected at most one image part in a conversation, got {images}; two passes don't support "
            "several images per row"
        )
    written = text_part(
        turns,
        eos_token=tokenizer.eos_token or "",
        style=style_in(config),
        control_tokens=control_tokens(tokenizer),
    )
    # After a VoCo token, as in the whole prompt: tokenizers may treat the start of a string differently.
    whole = token_ids(tokenizer, VOCO_TOKEN + written, add_special_tokens=False)
    first, *ids = whole["input_ids"]
    if first != config.voco_token_id:
        raise ValueError(
            f"expected a tokenizer that knows {VOCO_TOKEN} as {config.voco_token_id}, got {first}; pass "
            "the processor that was given to enable"
        )
    return ids


def _check_text_only(rows: list[list[int]], config: PreTrainedConfig) -> None:
    for name in ("image_token_id", "voco_token_id"):
        token_id = getattr(config, name)
        for index, row in enumerate(rows):
            if token_id in row:
                raise ValueError(
                    "expected only ids of the text after the VoCo tokens, got "
                    f"{name} {token_id} at position {row.index(token_id)} of row {index}; leave the "
                    "image and the VoCo tokens out, which are in compact"
                )


def _rows_of_ids(ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if ids.dim() != 2 or 0 in ids.shape or ids.dtype.is_floating_point:
        raise ValueError(
            f"expected integer token ids [B, T] with T >= 1, got {ids.dtype} {list(ids.shape)}"
        )
    real = torch.ones_like(ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"expected an attention_mask of the text's shape {list(ids.shape)}, got "
                f"{list(attention_mask.shape)}; the VoCo tokens are added to both"
            )
        real = attention_mask.to(ids.device) != 0
        ragged = (real[:, 1:] < real[:, :-1]).any(1) | ~real[:, -1]
        if ragged.any():
            row = int(ragged.long().argmax())
            raise ValueError(
                "expected text padded on the left, got an attention_mask with zeros after ones, "
                f"or only zeros, in row {row}: {real[row].int().tolist()}; set padding_side='left'"
            )
    return [row[mask].tolist() for row, mask in zip(ids, real, strict=True)]


def _pair_up(
    entries: list[CompactKV], rows: list[list[int]]
) -> tuple[list[CompactKV], list[list[int]]]:
    if not rows or (len(entries) != len(rows) and 1 not in (len(entries), len(rows))):
        raise ValueError(
            f"expected as many texts as entries, or a single one of either, got {len(entries)} entries "
            f"and {len(rows)} texts"
        )
    if len(entries) == 1:
        entries = entries * len(rows)
    elif len(rows) == 1:
        rows = rows * len(entries)
    return entries, rows


def _layer_devices(model: PreTrainedModel) -> list[torch.device]:
    return [execution_device(layer) for layer in model.model.language_model.layers]


def _second_pass_prompt(
    model: PreTrainedModel, cache: CompactCache, rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask``, ``position_ids``, int64 ``[B, n + T]``: the VoCo tokens in the
    cache, which ``generate`` skips, then the text, padded on the left."""
    device = execution_device(model.get_input_embeddings())
    text_length = max(map(len, rows))
    pad = model.generation_config.pad_token_id or 0
    ids = torch.tensor(
        [[pad] * (text_length - len(row)) + list(row) for row in rows], device=device
    )
    text_real = torch.tensor(
        [[0] * (text_length - len(row)) + [1] * len(row) for row in rows], device=device
    )
    prefix_real = cache.prefix_mask.to(device)
    prefix_ids = torch.where(prefix_real, model.config.voco_token_id, pad)
    first = cache.next_position.to(device)[:, None]
    text_positions = first + (text_real.cumsum(1) - 1).clamp(min=0)
    check_length(model.model.language_model, int(text_positions.max()) + 1, "a prompt")
    return {
        "input_ids": torch.cat([prefix_ids, ids], dim=1),
        "attention_mask": torch.cat([prefix_real.long(), text_real], dim=1),
        "position_ids": torch.cat([cache.prefix_positions.to(device), text_positions], dim=1),
    }

"""The forward pass of an enabled model.

``hand_out_layout`` runs before the base model (``LlavaModel``, ``LlavaNextModel``). It derives the
``MaskLayout`` once, from the token ids and the markers of packed documents, and passes it to every layer
as the keyword argument ``voco_layout``. ``voco_attention`` is the language model's attention: masked if
there is a layout, else SDPA, which is the case once a key/value cache holds the prompt.

The cache of a masked prompt still holds the image's keys. Later tokens must not see them, so the cache
carries ``voco_hidden`` (bool ``[B, S]``), and each later forward pass removes these keys from its
attention_mask, as if they were padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from voco_kernels import MaskLayout, masked_attention
from voco_kernels.layout.documents import document_positions
from voco_model.vlm.caches import CACHE_ARGUMENT, CompactCache, VoCoCollector
from voco_model.vlm.packing import refuse_markers, take_markers
from voco_model.vlm.warn import warn_once

ATTENTION_NAME = "voco"
Mask = Tensor | dict | None


def voco_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    voco_layout: MaskLayout | None = None,
    voco_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An ``AttentionInterface`` function.

    Args:
        query: ``[B, Hq, S, D]``.
        key, value: ``[B, Hkv, S, D]``; longer if they are a static cache, whose slots from S on are
            empty.
        attention_mask: unused if there is a layout, which includes the padding.
        voco_causal: set by the engine, which has its own mask: True for plain causal attention, False
            for ``attention_mask``, bool ``[B, 1, S, K]``.

    Returns:
        out ``[B, S, Hq, D]``, and None for the attention weights, which are never computed.
    """
    if voco_causal is not None:
        mask = None if voco_causal else attention_mask
        return _step_attention(query, key, value, mask, scaling), None
    if voco_layout is None:
        _check_nothing_lost(module, query, attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"expected attention_dropout 0, got {dropout}; masked_attention has no dropout: set "
            "model.config.text_config.attention_dropout = 0.0"
        )
    unknown = {"softcap", "s_aux", "position_bias", "sliding_window"} & {
        name for name, value in kwargs.items() if value is not None
    }
    if unknown:
        raise ValueError(
            f"expected plain softmax attention, got a text model that passes {sorted(unknown)}; "
            "masked_attention doesn't support these: call undo() on what enable returned"
        )
    length = voco_layout.length
    out = masked_attention(
        query, key[:, :, :length], value[:, :, :length], voco_layout, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def _check_nothing_lost(module: nn.Module, query: Tensor, mask: Tensor | None) -> None:
    """Raise ``ValueError`` if the text model dropped the layout on the way to its attention.

    The mask passed beside a layout has one row for all queries, unlike any mask of Transformers.
    """
    if mask is not None and mask.dim() == 4 and mask.shape[2] == 1 < query.shape[2]:
        raise ValueError(
            "expected a text model that passes keyword arguments on to its attention, got "
            f"{type(module).__name__} without the mask's layout; call undo() on what enable returned: "
            "this model can't be used with VoCo tokens"
        )


def _step_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """``[B, S, Hq, D]``; causal without a mask."""
    batch, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    if mask is None:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
        return out.transpose(1, 2)
    # With a mask, SDPA would repeat grouped keys. Concatenating the queries that share a key head avoids
    # that: [B, Hkv, groups * S, D].
    query = query.reshape(batch, key.shape[1], groups * length, head_dim)
    if length > 1 and groups > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, length, head_dim).transpose(1, 2)


AttentionInterface.register(ATTENTION_NAME, voco_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def hand_out_layout(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook (``with_kwargs=True``) of the base model; it depends on the model's config alone.

    Raises:
        TypeError, ValueError: inputs from which the mask can't be derived, or whose output would be
            silently wrong.
    """
    if len(args) > 1:
        raise TypeError(
            f"expected keyword arguments after input_ids, got {len(args)} positional arguments"
        )
    attention = module.config.text_config._attn_implementation
    if attention != ATTENTION_NAME or kwargs.get("output_attentions"):
        raise ValueError(
            f"expected attention {ATTENTION_NAME!r} and output_attentions=False, got {attention!r} "
            f"and {bool(kwargs.get('output_attentions'))}; the mask and its attention go together, "
            "and attention weights are never computed: call undo() on what enable returned first"
        )
    kwargs = dict(kwargs)
    input_ids = args[0] if args else kwargs.get("input_ids")
    # A caller may still use the old name, which forward accepts as well.
    cache = kwargs.setdefault(CACHE_ARGUMENT, kwargs.pop("past_key_values", None))
    new_tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
    if new_tokens is None:
        raise ValueError("expected input_ids, got neither input_ids nor inputs_embeds")
    # One token on a cache is a decoding step; reading the cache's length might cost a host sync.
    if cache is not None and (new_tokens.shape[1] == 1 or cache.get_seq_length() > 0):
        _continue_from_cache(module.config, cache, input_ids, new_tokens.shape[1], kwargs)
    else:
        _mask_whole_prompt(module, cache, input_ids, kwargs)
    return args, kwargs


def _mask_whole_prompt(
    module: nn.Module, cache: Cache | None, input_ids: Tensor | None, kwargs: dict
) -> None:
    config = module.config
    if input_ids is None:
        raise ValueError(
            "expected input_ids, from which an enabled model derives its mask, got inputs_embeds "
            "only; pass input_ids, or call undo() on what enable returned to run without VoCo "
            "tokens"
        )
    if kwargs.get("pixel_values") is not None:
        _check_image_sizes(config, kwargs)
    # Reading the ids costs a host sync on a GPU; filling a cache needs one anyway (below).
    readable = input_ids.device.type == "cpu" or cache is not None
    if readable and not torch.compiler.is_compiling():
        _check_images_first(input_ids, config)
        _warn_of_images_alone(module, input_ids, config)
    mask = _padding_mask(kwargs.get("attention_mask"), input_ids, cache)
    real = mask != 0
    position_ids = _document_positions(module, cache, input_ids, mask, kwargs)
    kwargs["voco_layout"] = MaskLayout.from_input_ids(
        input_ids,
        voco_token_id=config.voco_token_id,
        image_token_id=config.image_token_id,
        attention_mask=mask,
        position_ids=position_ids,
        isolated=getattr(config, "voco_isolated", False),
    )
    # Transformers passes a 4D mask on as it is, but expands a 2D one to [B, 1, S, S]. No layer reads it:
    # the layout includes the padding.
    kwargs["attention_mask"] = real[:, None, None, :]

    if module.training and kwargs.get("use_cache") is None:
        kwargs["use_cache"] = False
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = config.text_config.use_cache
    if cache is None and use_cache:
        # The language model would create the same cache, but where it can't be given voco_hidden.
        cache = kwargs[CACHE_ARGUMENT] = DynamicCache(config=config.text_config)
    if cache is not None and not isinstance(cache, VoCoCollector):
        hidden = _hidden_from_what_follows(input_ids, mask, position_ids, config)
        cache.voco_hidden = hidden
        if not torch.compiler.is_compiling():
            if not hidden.any():
                # No VoCo tokens, one document: decoding keeps its unmasked fast path.
                cache.voco_hidden = None
            # Newer Transformers encode images before the first step and pass on their features.
            elif kwargs.get("pixel_values") is None and not kwargs.get("mm_encoder_outputs"):
                _check_no_image_expected(input_ids, config)


def _document_positions(
    module: nn.Module, cache: Cache | None, input_ids: Tensor, mask: Tensor, kwargs: dict
) -> Tensor | None:
    """int ``[B, S]``: positions that restart with each packed document, however it is marked; None if
    nothing marks one. Other markers are removed from ``kwargs`` and replaced by position_ids.
    """
    position_ids = kwargs.get("position_ids")
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, len(input_ids)):
            raise ValueError(
                f"expected position_ids of shape {list(input_ids.shape)}, got "
                f"{list(position_ids.shape)}; LLaVA's text models have one position per token: "
                "where there are several axes (mrope), pass the text's"
            )
        position_ids = position_ids.expand(len(input_ids), -1)
    markers = take_markers(kwargs)
    # On an accelerator, telling document numbers in attention_mask from plain ones needs a host sync.
    # Positions from 0 are right for both, but tokens after a cache must continue the plain ones.
    readable = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    numbered = mask.dtype != torch.bool and (
        bool((mask > 1).any()) if readable else module.training and cache is None
    )
    if markers or (numbered and position_ids is None):
        positions = document_positions(
            input_ids, attention_mask=mask, position_ids=position_ids, **markers
        )
        if position_ids is None:
            kwargs["position_ids"] = positions
        return positions
    return position_ids


def _continue_from_cache(
    config, cache: Cache, input_ids: Tensor | None, length: int, kwargs: dict
) -> None:
    if isinstance(cache, CompactCache):
        cache.check_continuation(length, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    refuse_markers(cache, length, kwargs)
    if length > 1 and input_ids is not None:
        found = int((input_ids == config.voco_token_id).sum())
        if found:
            raise ValueError(
                f"expected no VoCo tokens among the {length} tokens that follow a cache of "
                f"{int(cache.get_seq_length())}, got {found}; the mask of a prompt read in pieces "
                "(prefill_chunk_size, a new image in a later turn) can't be derived: pass the "
                "whole prompt at once, or use voco_model.compress and voco_model.generate"
            )
    hidden = getattr(cache, "voco_hidden", None)
    if hidden is not None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = hidden.new_ones(hidden.shape[0], int(cache.get_seq_length()) + length)
        kwargs["attention_mask"] = _without(mask, hidden)


def _padding_mask(mask: Mask, input_ids: Tensor, cache: Cache | None) -> Tensor:
    """bool or integer ``[B, S]``, 0 for padding; integers number packed documents."""
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if mask.dim() == 2:
        return _zeros_and_ones(mask) if mask.is_floating_point() else mask
    # For a static cache, generate builds dense masks in advance; a token that sees itself is real.
    if mask.dim() == 4 and cache is not None and cache.is_compileable:
        sees_itself = mask.diagonal(dim1=-2, dim2=-1)[:, 0]
        return sees_itself if mask.dtype == torch.bool else sees_itself == 0
    raise ValueError(
        f"expected an attention_mask of shape {list(input_ids.shape)}, 0 for padding, got "
        f"{list(mask.shape)}; an enabled model derives the rest of its mask from input_ids: for "
        "packed documents pass their numbers (1, 1, 2, 2, 2), position_ids that start again, or "
        "cu_seq_lens_q"
    )


def _check_image_sizes(config, kwargs: dict) -> None:
    # Only LLaVA-NeXT's config has grids of tiles.
    if hasattr(config, "image_grid_pinpoints") and kwargs.get("image_sizes") is None:
        raise ValueError(
            "expected image_sizes, int64 [images, 2], with pixel_values of a LLaVA-NeXT, got none; pass "
            "on all that the processor returns"
        )


def _check_images_first(input_ids: Tensor, config) -> None:
    is_voco = input_ids == config.voco_token_id
    without = is_voco & ((input_ids == config.image_token_id).cumsum(1) == 0)
    if without.any():
        row, place = without.nonzero()[0].tolist()
        raise ValueError(
            f"expected an image before every run of VoCo tokens (id {config.voco_token_id}), got "
            f"a run without one at position {place} of row {row}; build the prompt with "
            "voco_model.prompt or the processor's chat template"
        )


def _warn_of_images_alone(module: nn.Module, input_ids: Tensor, config) -> None:
    has_voco = (input_ids == config.voco_token_id).any(1)
    alone = (input_ids == config.image_token_id).any(1) & ~has_voco
    if alone.any():
        warn_once(
            module,
            f"a prompt (row {int(alone.long().argmax())}) has an image and no VoCo token: nothing is "
            "compressed, and its text sees the image itself, which this model may not be trained for; "
            "write prompts with voco_model.prompt or processor.apply_chat_template",
        )


def _zeros_and_ones(mask: Tensor) -> Tensor:
    """bool ``[B, S]``, from floats. An additive mask is refused: it would be read inverted."""
    message = (
        "expected a float attention_mask of 0 for padding and 1 for tokens, with tokens in each row"
    )
    plain = ((mask == 0) | (mask == 1)).all() & (mask == 1).any(1).all()
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(plain, message)
    elif not plain:
        raise ValueError(f"{message}, got {mask}; pass an integer or bool mask")
    return mask != 0


def _check_no_image_expected(input_ids: Tensor, config) -> None:
    found = int((input_ids == config.image_token_id).sum())
    if found:
        raise ValueError(
            f"expected pixel_values for the {found} image tokens that VoCo tokens compress, got "
            "none; generate drops them when prefill_chunk_size is set: leave that out"
        )


def _hidden_from_what_follows(
    input_ids: Tensor, mask: Tensor, position_ids: Tensor | None, config
) -> Tensor:
    """bool ``[B, S]``: the keys that a text token following this prompt doesn't see."""
    real = mask != 0
    text_id = min({0, 1, 2} - {config.voco_token_id, config.image_token_id})
    if position_ids is not None:
        position_ids = _with_one_more(position_ids, real, 1)
    one_more = _with_one_more(mask, real, 0)
    layout = MaskLayout.from_input_ids(
        F.pad(input_ids.masked_fill(~real, text_id), (0, 1), value=text_id),
        voco_token_id=config.voco_token_id,
        image_token_id=config.image_token_id,
        attention_mask=one_more,
        position_ids=position_ids,
    )
    stop = torch.where(one_more != 0, layout.visible_until, 0).amax(dim=1, keepdim=True)
    return real & (layout.visible_until[:, :-1] < stop)


def _with_one_more(values: Tensor, real: Tensor, step: int) -> Tensor:
    """``[B, S + 1]``: each row with a value after its last real one, larger by ``step``."""
    after_last = F.pad(real, (1, 0)) & ~F.pad(real, (0, 1))
    before = F.pad(values, (1, 0))
    before = before + step if step else before
    return torch.where(after_last, before, F.pad(values, (0, 1)))


def _without(mask: Mask, hidden: Tensor) -> Mask:
    """The mask without the hidden keys: 2D ``[B, K]``, 4D ``[B, 1, Q, K]``, or a dict of 4D."""
    if isinstance(mask, dict):
        return {kind: _without(dense, hidden) for kind, dense in mask.items()}
    if mask.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"expected an attention_mask for the {hidden.shape[0]} rows whose prompt is in the "
            f"cache, got {list(mask.shape)}; don't repeat or select rows of a cache after its "
            "prompt was read"
        )
    # The cache may have been cropped since; its remaining slots haven't moved.
    hidden = F.pad(hidden, (0, mask.shape[-1] - hidden.shape[1])).to(mask.device)
    if mask.dim() == 4:
        hidden = hidden[:, None, None, :]
    additive = mask.dtype.is_floating_point and mask.dim() == 4
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min if additive else 0)

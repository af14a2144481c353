"""Checks of the model, processor, store and options that an engine is made of."""

from __future__ import annotations

import torch

from voco_model.arguments import whole_number
from voco_model.kv_store.base import Store
from voco_model.vlm.attach import check_ready
from voco_model.vlm.control_tokens import check_appends_nothing
from voco_model.vlm.devices import is_offloaded
from voco_model.vlm.rope import depends_on_length, length_limit

MODES = ("voco", "full_cache", "uncached")
# Options of a model's generation_config that the engine doesn't implement, and their values that have no
# effect.
_UNSUPPORTED = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None,),
    "guidance_scale": (None, 1.0),
    "num_beams": (None, 1),
    "stop_strings": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "remove_invalid_values": (None, False),
    "forced_decoder_ids": (None,),
    "max_time": (None,),
}


def check_parts(model, processor, store: Store | None, mode: str) -> None:
    """Raises TypeError or ValueError unless an engine can be made of these."""
    check_ready(model)
    if is_offloaded(model):
        raise ValueError(
            "expected a model in one device's memory, got one with offloaded weights; load it "
            "without device_map, or use voco_model.compress and voco_model.generate"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"expected a model on one device, got one on {sorted(map(str, devices))}; make an engine "
            "on each device, sharing one store"
        )
    if getattr(processor, "tokenizer", None) is None:
        raise TypeError(
            f"expected the processor that was given to enable, got {type(processor).__name__}"
        )
    check_appends_nothing(processor.tokenizer)
    if store is not None and not isinstance(store, Store):
        raise TypeError(
            f"expected a store or None, got {type(store).__name__}; use voco_model.open_store(url)"
        )
    if mode not in MODES:
        raise ValueError(f"expected mode to be one of {', '.join(MODES)}, got {mode!r}")
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(model.generation_config, name, None)
        if value not in neutral:
            raise ValueError(
                f"expected no {name} in model.generation_config, got {value!r}, which the engine would "
                "ignore; set it to None, or use voco_model.generate"
            )


def cast(model, dtype: torch.dtype) -> None:
    """``model.to(dtype)``, except for the rotary frequencies: rounded to 16 bits, they would rotate
    distant tokens by wrong angles."""
    kept = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.to(dtype)
    for name, buffer in kept.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)


def check_rotary(model) -> None:
    """Raises ValueError for a model whose rotation depends on the length of its input."""
    language = model.model.language_model
    if depends_on_length(language):
        raise ValueError(
            "expected a rotation with fixed frequencies, got rope_type "
            f"{language.rotary_emb.rope_type!r}: answers would depend on the length of other prompts in "
            f"the batch; use voco_model.generate, which takes prompts of up to {length_limit(language)} "
            "tokens"
        )


def check_store(store: Store | None, fingerprint: str) -> None:
    """Raises ValueError for a store that doesn't accept this model's entries."""
    if store is not None and store.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"expected a store for the model with fingerprint {fingerprint!r}, got one for "
            f"{store.fingerprint!r}; open it with fingerprint=voco_model.fingerprint(model)"
        )


def suppressed_ids(model) -> list[int]:
    """The token ids that the model's generation_config suppresses, validated."""
    ids = list(model.generation_config.suppress_tokens or ())
    rows = model.get_output_embeddings().weight.shape[0]
    invalid = [token for token in ids if not isinstance(token, int) or not 0 <= token < rows]
    if invalid:
        raise ValueError(
            f"expected suppress_tokens from 0 to {rows - 1} in model.generation_config, got "
            f"{invalid[0]!r}; remove it there"
        )
    return ids


def check_counts(**counts: int | None) -> None:
    """Raises ValueError for a value that is neither None nor an int of at least 1."""
    for name, value in counts.items():
        if value is not None:
            whole_number(name, value, at_least=1)

"""What an engine asks of a model, a processor and a store before it takes them."""

from __future__ import annotations

import torch

from voco_model.arguments import whole_number
from voco_model.kv_store.base import Store
from voco_model.vlm.attach import check_ready
from voco_model.vlm.control_tokens import check_appends_nothing
from voco_model.vlm.devices import is_offloaded
from voco_model.vlm.rope import depends_on_length, length_limit

MODES = ("voco", "full_cache", "uncached")
# Options of a model's generation_config that the engine would ignore, and what they are when they do
# nothing.
_UNHEEDED = {
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
    """Raise ``TypeError`` or ``ValueError`` for parts that an engine can't be made of."""
    check_ready(model)
    if is_offloaded(model):
        raise ValueError(
            "expected a model in the memory of one device, got one with offloaded weights; load it "
            "without device_map, or use voco_model.compress and voco_model.generate"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"expected a model on one device, got one on {sorted(map(str, devices))}; an engine drives "
            "one device: for several, run one engine on each, with one store"
        )
    if getattr(processor, "tokenizer", None) is None:
        raise TypeError(
            f"expected the processor that was given to enable, got {type(processor).__name__}"
        )
    check_appends_nothing(processor.tokenizer)
    if store is not None and not isinstance(store, Store):
        raise TypeError(
            f"expected a store or None, got {type(store).__name__}; open one with KVStore.open(url)"
        )
    if mode not in MODES:
        raise ValueError(f"expected mode to be one of {', '.join(MODES)}, got {mode!r}")
    for name, harmless in _UNHEEDED.items():
        value = getattr(model.generation_config, name, None)
        if value not in harmless:
            raise ValueError(
                f"expected no {name} in model.generation_config, got {value!r}, which the engine would "
                "not heed; set it to None, or use voco_model.generate"
            )


def cast(model, dtype: torch.dtype) -> None:
    """``model.to(dtype)``, but for the frequencies of rotations: rounded to 16 bits, they would turn
    distant tokens by the wrong angle."""
    kept = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.to(dtype)
    for name, buffer in kept.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)


def check_rotary(model) -> None:
    """Raise ``ValueError`` for a model whose rotation depends on the length of what it reads."""
    language = model.model.language_model
    if depends_on_length(language):
        raise ValueError(
            "expected a rotation with fixed frequencies, got rope_type "
            f"{language.rotary_emb.rope_type!r}: an answer would depend on the length of the prompts "
            f"beside it; use voco_model.generate, which takes prompts of up to {length_limit(language)} "
            "tokens"
        )


def check_store(store: Store | None, fingerprint: str) -> None:
    """Raise ``ValueError`` for a store that wouldn't take this model's entries."""
    if store is not None and store.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"expected a store for the model with fingerprint {fingerprint!r}, got one for "
            f"{store.fingerprint!r}; open it with fingerprint=voco_model.fingerprint(model)"
        )


def suppressed_ids(model) -> list[int]:
    """The token ids that the model's generation_config forbids, checked."""
    ids = list(model.generation_config.suppress_tokens or ())
    rows = model.get_output_embeddings().weight.shape[0]
    strange = [token for token in ids if not isinstance(token, int) or not 0 <= token < rows]
    if strange:
        raise ValueError(
            f"expected suppress_tokens from 0 to {rows - 1} in model.generation_config, got "
            f"{strange[0]!r}"
        )
    return ids


def check_counts(**counts: int | None) -> None:
    """Raise ``ValueError`` for a number that is given and isn't an int of 1 or more."""
    for name, value in counts.items():
        if value is not None:
            whole_number(name, value, at_least=1)

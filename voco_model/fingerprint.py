"""``fingerprint``: which model made an entry, told from its weights, not from its name."""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# What a config says of where it came from and how it is run. Weights tell their dtype themselves.
_NOT_IN_CONFIG = (
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
)
# Bytes hashed at a time: of a model on a GPU, this much comes to the CPU at once.
_AT_ONCE = 64 << 20

_known: WeakKeyDictionary[Any, tuple[tuple, str]] = WeakKeyDictionary()


def fingerprint(model, *, refresh: bool = False) -> str:
    """BLAKE3 over a model's config, parameters and buffers: 64 hexadecimal digits.

    It takes as long as reading the weights (for 7B in bf16 13.5 GB), once: the result is kept with the
    model and made anew when a tensor was replaced or written in place, as far as PyTorch counts that.
    It doesn't count what is written through ``.data``, in inference mode or by other libraries: after
    such a change, say ``refresh=True``.

    Two copies of a checkpoint under different names have one fingerprint; another dtype, another number
    of VoCo tokens or a single changed weight gives another one.

    Args:
        model: a Transformers model, on any device.

    Raises:
        ValueError: weights on the meta device (not loaded, or offloaded).
    """
    from blake3 import blake3  # here: everything but keys works without it

    config = _config(model)
    state = (config, _versions(model))
    known = _known.get(model)
    if known is not None and known[0] == state and not refresh:
        return known[1]
    digest = blake3(max_threads=blake3.AUTO)
    _update(digest, config.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected tensors in the model's state_dict, got {type(tensor).__name__} as {name}"
            )
        if tensor.device.type == "meta":
            raise ValueError(
                f"expected weights that are loaded, got {name} on the meta device; load the model whole"
            )
        _update(digest, f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        step = _AT_ONCE // tensor.element_size()
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy())
    found = digest.hexdigest()
    _known[model] = (state, found)
    return found


def _update(digest, text: bytes) -> None:
    """With its length in front: no two sequences of texts have the same bytes."""
    digest.update(len(text).to_bytes(8, "little"))
    digest.update(text)


def _config(model) -> str:
    def without_origin(value):
        if isinstance(value, dict):
            return {k: without_origin(v) for k, v in value.items() if k not in _NOT_IN_CONFIG}
        return value

    return json.dumps(without_origin(model.config.to_dict()), sort_keys=True, default=str)


def _versions(model) -> tuple:
    """Changes whenever PyTorch notes a write to a tensor of the model, or another one in its place."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple(
        (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
        for tensor in tensors
    )

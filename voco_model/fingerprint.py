"""``fingerprint``: which model made an entry, told from its weights, not from its name."""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from voco_model.hash_threads import hash_threads

# What a config says of where it came from and how it is run. Weights tell their dtype themselves.
_NOT_IN_CONFIG = (
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "voco_isolated",
    "voco_prompt",
)
# Bytes hashed at a time: of a model on a GPU, this much comes to the CPU at once.
_AT_ONCE = 64 << 20
_SAMPLED = 64

# By model: its tensors, what was seen of them, and the fingerprint.
_known: WeakKeyDictionary[Any, tuple[list[ref], tuple, str]] = WeakKeyDictionary()


def fingerprint(model, *, refresh: bool = False) -> str:
    """BLAKE3 over a model's config, parameters and buffers: 64 hexadecimal digits.

    It takes as long as reading the weights (for 7B in bf16 13.5 GB), once: the result is kept with the
    model and made anew when a tensor was replaced, or written in place as far as PyTorch counts that, or
    when one of 64 numbers of it has changed. So an optimizer's step is noticed, fused or not; a few
    numbers written through ``.data``, in inference mode or by other libraries may not be: after such a
    change, say ``refresh=True``.

    Two copies of a checkpoint under different names have one fingerprint; another dtype, another number
    of VoCo tokens or a single changed weight gives another one.

    Args:
        model: a Transformers model, on any device.

    Raises:
        ValueError: weights on the meta device (not loaded, or offloaded).
    """
    from blake3 import blake3  # here: everything but keys works without it

    config = _config(model)
    tensors = [*model.parameters(), *model.buffers()]
    state = (config, [_version(tensor) for tensor in tensors], _sample(tensors))
    known = _known.get(model)
    if known is not None and not refresh:
        references, before, found = known
        same = len(references) == len(tensors) and all(
            reference() is tensor for reference, tensor in zip(references, tensors, strict=True)
        )
        if same and before == state:
            return found
    digest = blake3(max_threads=hash_threads())
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
    _known[model] = ([ref(tensor) for tensor in tensors], state, found)
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


def _version(tensor: Tensor) -> tuple[int, int | None]:
    """Changes whenever PyTorch notes a write to the tensor."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _sample(tensors: list[Tensor]) -> list[bytes]:
    """Some numbers of each tensor, from all over it: on each device one copy to the CPU."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_contiguous() and tensor.numel() and tensor.device.type != "meta":
            flat = tensor.detach().view(-1)
            step = max(1, flat.numel() // _SAMPLED)
            by_device.setdefault(tensor.device, []).append(flat[::step][:_SAMPLED].double())
    return [torch.cat(samples).cpu().numpy().tobytes() for samples in by_device.values()]

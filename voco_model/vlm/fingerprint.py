"""``fingerprint``: identifies the model that made an entry, by everything that it computes with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from voco_model.vlm.hash_threads import hash_threads
from voco_model.vlm.model_state import describe, difference, plain_tensors

if TYPE_CHECKING:
    from blake3 import blake3
    from transformers import PreTrainedModel

# Bytes hashed at a time, and copied to the CPU at once if the model is on a GPU.
_AT_ONCE = 64 << 20
_SAMPLED = 64

# By model: its tensors, their observed state, and the digest of their bytes.
_known: WeakKeyDictionary[Any, tuple[list[ref], tuple, bytes]] = WeakKeyDictionary()


def fingerprint(model: PreTrainedModel, *, refresh: bool = False) -> str:
    """BLAKE3 of everything that a model computes with: 64 hexadecimal digits.

    This includes its parameters and buffers, its config, and each module's class and attributes: scales,
    rotation, and which adapters are active, merged or disabled. ``docs/keys.md`` lists what is included,
    what is refused and what is left out.

    Reading the weights takes a while (13.5 GB for 7B in bf16), so their digest is cached with the model.
    It is computed again after a tensor was replaced, after PyTorch counted a write to one, or after one
    of 64 sampled elements changed. That covers optimizer steps, fused or not. Writes to a few elements
    through ``.data``, in inference mode or by another library may go unnoticed: pass ``refresh=True``
    after them. Switching an adapter doesn't read the weights again.

    Two copies of a checkpoint under different names have the same fingerprint. Another dtype, another
    number of VoCo tokens or a single changed weight changes it.

    Args:
        model: a Transformers model, on any device.
        refresh: read the weights even if their digest is cached.

    Raises:
        ValueError: incomplete weights (on the meta device, or sharded by FSDP, DeepSpeed ZeRO-3 or
            tensor parallelism), or a hook or replaced function with an unknown effect.
        TypeError: something in the model's ``state_dict`` that is not a tensor.
    """
    from blake3 import blake3  # imported here, because only keys need it

    texts, tensors = describe(model)
    digest = blake3(json.dumps(texts, sort_keys=True).encode())
    digest.update(_weights_digest(model, _plain(tensors), refresh))
    return digest.hexdigest()


class Unchanged:
    """Records a model's state, and detects changes.

    Args:
        model: the model.
        strict: as needed for stored entries: refuse functions with unknown effects and incomplete
            weights, and compare sampled elements of each weight, to detect writes that PyTorch doesn't
            count.
    """

    def __init__(self, model: PreTrainedModel, *, strict: bool = True) -> None:
        self._model = model
        self._strict = strict
        self._texts, self._references, self._state = self._look()

    def check(self) -> None:
        """Raise ``ValueError`` if the model computes something else now."""
        texts, references, state = self._look()
        changed = difference(self._texts, texts)
        if changed is None and (state != self._state or not _same(references, self._references)):
            changed = "weights that were written or replaced"
        if changed is not None:
            raise ValueError(
                f"expected the model as it was when the engine was made, got {changed}; make a new "
                "engine for the changed model, or undo the change"
            )

    def _look(self) -> tuple[dict[str, str], list[ref], tuple]:
        texts, tensors = describe(self._model, strict=self._strict)
        if self._strict:
            return texts, *_state(list(_plain(tensors).values()))
        counts = [None if each.is_inference() else each._version for each in tensors.values()]
        return texts, [ref(each) for each in tensors.values()], tuple(counts)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: plain
        for path, tensor in tensors.items()
        for name, plain in plain_tensors(path, tensor)
    }


def _weights_digest(model: PreTrainedModel, tensors: dict[str, Tensor], refresh: bool) -> bytes:
    """Digest of all tensors, including those only in the ``state_dict`` (bitsandbytes)."""
    from blake3 import blake3

    references, state = _state(list(tensors.values()))
    known = _known.get(model)
    if known is not None and not refresh:
        before, seen, found = known
        if seen == state and _same(before, references):
            return found
    digest = blake3(max_threads=hash_threads())
    saved = model.state_dict()
    for name, tensor in saved.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected tensors in the model's state_dict, got {type(tensor).__name__} as {name}"
            )
    for name, tensor in sorted({**_plain(saved), **tensors}.items()):
        _update(digest, f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        step = _AT_ONCE // tensor.element_size()
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().data)
    found = digest.digest()
    _known[model] = (references, state, found)
    return found


def _update(digest: blake3, text: bytes) -> None:
    """Length-prefixed, so that no two sequences of texts give the same bytes."""
    digest.update(len(text).to_bytes(8, "little"))
    digest.update(text)


def _state(tensors: list[Tensor]) -> tuple[list[ref], tuple]:
    """References to the tensors, and a state that changes when they are written to."""
    versions = [_version(tensor) for tensor in tensors]
    return [ref(tensor) for tensor in tensors], (versions, _sample(tensors))


def _same(before: list[ref], now: list[ref]) -> bool:
    return len(before) == len(now) and all(
        old() is new() for old, new in zip(before, now, strict=True)
    )


def _version(tensor: Tensor) -> tuple[int, int | None]:
    """Changes whenever PyTorch counts a write to the tensor."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _sample(tensors: list[Tensor]) -> list[bytes]:
    """Evenly spaced elements of each tensor, with one copy to the CPU per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_contiguous() and tensor.numel():
            flat = tensor.detach().view(-1)
            step = max(1, flat.numel() // _SAMPLED)
            by_device.setdefault(tensor.device, []).append(flat[::step][:_SAMPLED].double())
    return [torch.cat(samples).cpu().numpy().tobytes() for samples in by_device.values()]

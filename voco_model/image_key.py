"""``image_key``: the address of an image's entry, told from everything that the entry depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import load_image

from voco_model.fingerprint import fingerprint
from voco_model.hash_threads import hash_threads
from voco_model.prompt import image_part

# Of a processor, beside its image processor's parameters: what decides an image's tokens.
_PROCESSOR = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
_SALT_CONTEXT = "voco-kernels 2026-11 image key, salt of a tenant"


def image_key(
    image: Any,
    *,
    model,
    processor,
    num_voco: int | None = None,
    salt: str | bytes | None = None,
) -> str:
    """The key of the entry that ``compress(model, image, processor=processor)`` makes.

    BLAKE3 over the decoded pixels with their mode, shape and dtype, the preprocessing parameters, the
    token ids and positions of what the first pass reads, the number of VoCo tokens and the model's
    ``fingerprint``. So two files with the same pixels have one key, and whatever would give another
    entry gives another key.

    Args:
        image: what the processor takes: a PIL image, a path or URL, an array or a tensor.
        model: the model that compresses.
        processor: its processor.
        num_voco: VoCo tokens an image; by default the number given to ``enable``.
        salt: of a tenant. With it the hash is keyed: nobody without the salt can tell the key of an
            image that he has, and no two tenants share an entry.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError, ValueError: something that is no image, or an empty salt.
    """
    from blake3 import blake3  # here: everything but keys works without it

    if salt is not None and not salt:
        raise ValueError(
            "expected a salt of at least one byte, got an empty one; None is for no salt"
        )
    pixels, described = _decoded(image)
    num_voco = model.config.num_voco if num_voco is None else num_voco
    prefix_ids = processor.tokenizer(image_part(num_voco))["input_ids"]
    facts = {
        "version": 1,
        "pixels": described,
        "preprocessing": _preprocessing(processor),
        # The image's token stands for as many as the preprocessing makes of it.
        "prefix_ids": prefix_ids,
        "first_position": 0,
        "num_voco": num_voco,
        "fingerprint": fingerprint(model),
        "autocast": _autocast(model.device.type),
    }
    if salt is None:
        digest = blake3(max_threads=hash_threads())
    else:
        salt = salt.encode() if isinstance(salt, str) else salt
        tenant = blake3(salt, derive_key_context=_SALT_CONTEXT).digest()
        digest = blake3(key=tenant, max_threads=hash_threads())
    text = json.dumps(facts, sort_keys=True, default=str).encode()
    digest.update(len(text).to_bytes(8, "little"))
    digest.update(text)
    digest.update(pixels)
    return digest.hexdigest()


def pixel_digest(image: Any) -> str:
    """64 hexadecimal digits that tell an image's pixels, whatever model reads them.

    Raises:
        TypeError, ValueError, OSError: something that is no image.
    """
    pixels, described = _decoded(image)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    digest.update(pixels)
    return digest.hexdigest()


def _decoded(image: Any) -> tuple[bytes | np.ndarray, dict]:
    """The pixels' bytes, and what they are."""
    if isinstance(image, Tensor):
        array = image.detach().cpu().contiguous()
        kind = {"mode": "tensor", "shape": list(array.shape), "dtype": str(array.dtype)}
        return array.reshape(-1).view(torch.uint8).numpy(), kind
    if isinstance(image, np.ndarray):
        kind = {"mode": "array", "shape": list(image.shape), "dtype": image.dtype.str}
        return np.ascontiguousarray(image).reshape(-1).view(np.uint8), kind
    if not isinstance(image, str | Image.Image):
        raise TypeError(
            f"expected a PIL image, a path or URL, an array or a tensor, got {type(image).__name__}"
        )
    if isinstance(image, str):
        image = load_image(image)  # as the processor does: turned as its EXIF data says, in RGB
    kind = {"mode": image.mode, "shape": [image.height, image.width]}
    if image.mode in ("P", "PA"):
        kind["palette"] = image.getpalette("RGBA")
    return image.tobytes(), kind


def _autocast(device_type: str) -> str | None:
    """The dtype that torch.autocast makes a model on this device compute in."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type))


def _preprocessing(processor) -> dict:
    images = processor.image_processor
    parameters = {"class": type(images).__name__, **images.to_dict()}
    parameters.update({name: getattr(processor, name, None) for name in _PROCESSOR})
    return parameters

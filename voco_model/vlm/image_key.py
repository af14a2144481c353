"""``image_key``: the address of an image's entry, computed from everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from PIL import Image

from voco_model.arguments import whole_number
from voco_model.pictures import PictureLimits, decode, ground_of
from voco_model.vlm.fingerprint import fingerprint as fingerprint_of
from voco_model.vlm.hash_threads import hash_threads
from voco_model.vlm.prompt import image_part

# Of a processor, beside its image processor's parameters: what decides an image's tokens.
_PROCESSOR = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
_SALT_CONTEXT = "voco-kernels 2026-11 image key, salt of a tenant"
# How pixels are made of what a caller gives (voco_model.pictures). Whoever changes a rule there counts
# this up, so that entries made from other pixels are not found any more.
_PIXELS = "rgb8 v2"
_LIMITS = PictureLimits()


def image_key(
    image: Any,
    *,
    model,
    processor,
    num_voco: int | None = None,
    salt: str | bytes | None = None,
    ground: tuple[int, int, int] | None = None,
    limits: PictureLimits = _LIMITS,
    fingerprint: str | None = None,
) -> str:
    """The key of the entry that ``compress(model, image, processor=processor)`` makes.

    BLAKE3 over the decoded pixels (8-bit RGB, upright, transparency composited on its ground), the
    preprocessing parameters, the token ids and positions of what the first pass reads, the number of
    VoCo tokens and the model's ``fingerprint``. So two files with the same pixels have one key, and
    whatever would give another entry gives another key.

    Args:
        image: as ``voco_model.pictures.decode`` takes it. However a picture is given, it has one key.
            What ``decode`` returned is not decoded again.
        model: the model that compresses.
        processor: its processor.
        num_voco: VoCo tokens an image; by default the number given to ``enable``.
        salt: of a tenant. With it the hash is keyed: nobody without the salt can tell the key of an
            image that he has, and no two tenants share an entry.
        ground, limits: as for ``compress``.
        fingerprint: the model's ``fingerprint``, if it was computed already. Computing it looks at each
            module and samples every weight.

    Returns:
        64 hexadecimal digits.

    Raises:
        PictureError: not a picture, one that can't be read, or one beyond the limits.
        ValueError: an empty salt.
    """
    from blake3 import blake3  # here: everything but keys works without it

    if salt is not None and not salt:
        raise ValueError(
            "expected a salt of at least one byte, got an empty one; None is for no salt"
        )
    ground = ground_of(model.config, ground)
    picture = decode(image, ground=ground, limits=limits, processor=processor)
    if num_voco is None:
        num_voco = model.config.num_voco
    num_voco = whole_number("num_voco", num_voco, at_least=1)
    prefix_ids = processor.tokenizer(image_part(num_voco))["input_ids"]
    facts = {
        "version": 2,
        "pixels": _described(picture),
        "preprocessing": _preprocessing(processor),
        # The image's token stands for as many as the preprocessing makes of it.
        "prefix_ids": prefix_ids,
        "first_position": 0,
        "num_voco": num_voco,
        "fingerprint": fingerprint_of(model) if fingerprint is None else fingerprint,
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
    digest.update(picture.tobytes())
    return digest.hexdigest()


def pixel_digest(image: Any) -> str:
    """64 hexadecimal digits that tell an image's pixels, whatever model reads them.

    Raises:
        PictureError: as ``image_key``.
    """
    picture = decode(image)
    digest = hashlib.sha256(json.dumps(_described(picture), sort_keys=True).encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def _described(picture: Image.Image) -> dict:
    # Not the ground: a picture without transparency is the same on any.
    return {"made": _PIXELS, "shape": [picture.height, picture.width]}


def _autocast(device_type: str) -> str | None:
    """The dtype that torch.autocast makes a model on this device compute in."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type))


def _preprocessing(processor) -> dict:
    images = processor.image_processor
    kind = type(images)
    parameters = {"class": f"{kind.__module__}.{kind.__qualname__}", **images.to_dict()}
    parameters.update({name: getattr(processor, name, None) for name in _PROCESSOR})
    return parameters

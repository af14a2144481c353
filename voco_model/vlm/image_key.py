"""``image_key``: the key of an image's entry, a hash of everything that the entry depends on."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from voco_model.arguments import whole_number
from voco_model.pictures import PictureLimits, decode, ground_of
from voco_model.vlm.fingerprint import fingerprint as fingerprint_of
from voco_model.vlm.hash_threads import hash_threads
from voco_model.vlm.prompt import image_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.processing_utils import ProcessorMixin

# Attributes of a processor, besides its image processor's parameters, that affect an image's tokens.
_PROCESSOR = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
_SALT_CONTEXT = "voco-kernels 2026-11 image key, salt of a tenant"
# The version of the rules by which voco_model.pictures turns any image into pixels. Increase it when a
# rule changes, so that entries made from other pixels are no longer found.
_PIXELS = "rgb8 v2"
_LIMITS = PictureLimits()


def image_key(
    image: Any,
    *,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    num_voco: int | None = None,
    salt: str | bytes | None = None,
    ground: tuple[int, int, int] | None = None,
    limits: PictureLimits = _LIMITS,
    fingerprint: str | None = None,
) -> str:
    """The key of the entry that ``compress(model, image, processor=processor)`` makes.

    BLAKE3 of the decoded pixels (8-bit RGB, upright, transparency composited on ``ground``), the
    preprocessing parameters, the token ids and positions that pass 1 reads, the number of VoCo tokens
    and the model's ``fingerprint``. Two files with the same pixels have the same key; anything that
    would change the entry changes the key.

    Args:
        image: in any form that ``voco_model.pictures.decode`` accepts; the key doesn't depend on the
            form. An image returned by ``decode`` is not decoded again.
        model: the model that compresses.
        processor: its processor.
        num_voco: VoCo tokens per image; by default the number given to ``enable``.
        salt: a tenant's secret. It keys the hash: without it, the key can't be computed even from the
            image, and no two tenants share an entry.
        ground: as for ``compress``.
        limits: as for ``compress``.
        fingerprint: the model's ``fingerprint``, if it is known. Computing it visits each module and
            samples every weight.

    Returns:
        64 hexadecimal digits.

    Raises:
        PictureError: not an image, an unreadable one, or one over the limits.
        ValueError: an empty salt.
    """
    from blake3 import blake3  # here: everything but keys works without it

    if salt is not None and not salt:
        raise ValueError(
            "expected a salt of at least one byte, got an empty one; pass None for no salt"
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
        # With one image token; the preprocessing parameters determine how many it expands to.
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
    """64 hexadecimal digits that identify an image's pixels, independent of any model.

    Raises:
        PictureError: as ``image_key``.
    """
    picture = decode(image)
    digest = hashlib.sha256(json.dumps(_described(picture), sort_keys=True).encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def _described(picture: Image.Image) -> dict:
    # Without the ground: the pixels of an opaque image don't depend on it.
    return {"made": _PIXELS, "shape": [picture.height, picture.width]}


def _autocast(device_type: str) -> str | None:
    """The dtype of an active ``torch.autocast`` on this device, else None."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type))


def _preprocessing(processor: ProcessorMixin) -> dict:
    images = processor.image_processor
    kind = type(images)
    parameters = {"class": f"{kind.__module__}.{kind.__qualname__}", **images.to_dict()}
    parameters.update({name: getattr(processor, name, None) for name in _PROCESSOR})
    return parameters

"""Pass 1 with a store behind it: what was compressed before is not compressed again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import Store

logger = logging.getLogger(__name__)


def compress_stored(
    images: Iterable[Any],
    compress: Callable[[list[Any]], list[CompactKV]],
    key_of: Callable[[Any], str],
    fingerprint: str,
    store: Store,
) -> list[CompactKV]:
    """``compress(images)``, each image once, and not those whose entries the store has.

    Args:
        key_of: an image's key.
        fingerprint: of the model, written into the new entries.
    """
    images = list(images)
    keys = [key_of(image) for image in images]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    found = dict(zip(first, store.get_many(list(first)), strict=True))
    missing = [key for key, entry in found.items() if entry is None]
    made = compress([images[first[key]] for key in missing]) if missing else []
    for key, entry in zip(missing, made, strict=True):
        found[key] = replace(entry, key=key, fingerprint=fingerprint)
        try:
            store.put(found[key])
        except (
            OSError,
            ValueError,
        ) as error:  # ValueError: too large, or for another model's store
            logger.warning("the entry of image %s could not be stored: %s", key, error)
    return [found[key] for key in keys]

"""Keys and fingerprints in a forked child."""

from __future__ import annotations

import voco_model
from tests.support.forks import in_child, needs_fork
from tests.voco_model import tiny
from voco_model import fingerprint, image_key


@needs_fork
def test_what_is_large_is_hashed_after_a_fork():
    """BLAKE3 hashes large inputs with a pool of threads, which don't run in the child."""
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    large = tiny.picture(0, (900, 900))
    with voco_model.enable(model, processor):
        key = image_key(large, model=model, processor=processor)
        name = fingerprint(model, refresh=True)

        def hash_again() -> None:
            assert image_key(large, model=model, processor=processor) == key
            assert fingerprint(model, refresh=True) == name

        in_child(hash_again, seconds=30)

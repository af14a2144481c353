"""``Images``: finds each image's entry in the store, or has pass 1 make it once for all requests."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from PIL import Image

from voco_kernels.kv.entry import CompactKV
from voco_model.engine.first_pass import Pixels
from voco_model.engine.image_job import ImageJob
from voco_model.engine.plan import ImageSlot
from voco_model.engine.request import RequestError
from voco_model.engine.store_writer import StoreWriter
from voco_model.kv_store.base import Store, after_fork
from voco_model.pictures import PictureError
from voco_model.vlm.image_key import pixel_digest


class Images:
    """The images that requests are waiting for.

    Args:
        store: of entries, or None.
        decode: decodes an image; its result is the input of the next two.
        key_of: an image's key, if the request has none for it.
        prepare: an image's input for pass 1.
        variant: added to the keys of entries that differ from those of ``compress``.
        fingerprint: of the model, written into entries.
        num_tokens: that an entry from the store must have; None accepts any number.
        shared: whether requests share an image's job. If not, each reads the image again, and no store
            is used.
    """

    def __init__(
        self,
        store: Store | None,
        decode: Callable[[Any], Image.Image],
        key_of: Callable[[Any], str],
        prepare: Callable[[Any], Pixels],
        variant: str,
        fingerprint: str,
        *,
        num_tokens: int | None = None,
        shared: bool = True,
    ) -> None:
        self._store = store if shared else None
        self._shared = shared
        self._decode = decode
        self._key_of = key_of if store is not None else pixel_digest
        self._prepare = prepare
        self._variant = variant
        self._fingerprint = fingerprint
        self._num_tokens = num_tokens
        self._writer = None if self._store is None else StoreWriter(self._store)
        self._renew()
        after_fork(self, Images._renew)

    def _renew(self) -> None:
        # Also after a fork: the threads that were preparing images don't exist in the child.
        self._jobs: weakref.WeakValueDictionary[str, ImageJob] = weakref.WeakValueDictionary()
        # Reentrant: a signal handler may submit a request while its thread is in here.
        self._lock = threading.RLock()

    @property
    def put_failures(self) -> int:
        """Entries that were not stored."""
        return 0 if self._writer is None else self._writer.failures

    def job(self, image: Any, slot: ImageSlot, *, first: bool, key: str | None) -> ImageJob:
        """The job of an image, perhaps one that other requests are waiting for already.

        Raises:
            RequestError: the image can't be read, or the store raised an error.
        """
        # Decoded once: if a file were replaced between key and pixels, its entry would get a wrong key.
        if key is None or not self._shared:
            image = self._of_image(image, self._decode)
        if not self._shared:
            return ImageJob("", slot, self._of_image(image, self._prepare), prepared=True)
        if key is None:
            key = self._of_image(image, self._key_of)
        key = self._placed(key, first)
        job = None
        try:
            with self._lock:
                known = self._jobs.get(key)
                if known is not None and known.failure is None:
                    return known
                job = self._jobs[key] = ImageJob(key, slot)
            if self._writer is not None:  # here and not in a step of the engine
                self._writer.catch_up()
            job.entry = self._look_up(key)
            job.from_store = job.entry is not None
            if job.entry is None:
                picture = self._of_image(image, self._decode)  # returns decoded ones as they are
                job.pixels = self._of_image(picture, self._prepare)
        except RequestError as error:
            self.fail(job, error)
            raise
        finally:  # even if this thread is interrupted: others may be waiting for the job
            if job is not None:
                job.prepared = True
        return job

    def keep(self, job: ImageJob, entry: CompactKV) -> None:
        """Gives a job its entry, and queues that for the store."""
        job.entry = replace(entry, key=job.key, fingerprint=self._fingerprint)
        job.pixels = None
        if self._writer is not None and job.key:
            self._writer.write(job)

    def fail(self, job: ImageJob, error: RequestError) -> None:
        job.error = error
        self.forget(job)

    def forget(self, job: ImageJob) -> None:
        """Makes the next request for this image look it up again."""
        with self._lock:
            if self._jobs.get(job.key) is job:
                del self._jobs[job.key]

    def flush(self, timeout: float | None = None) -> bool:
        """See ``StoreWriter.flush``."""
        return self._writer is None or self._writer.flush(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """See ``StoreWriter.close``."""
        return self._writer is None or self._writer.close(timeout)

    def _placed(self, key: str, first: bool) -> str:
        # The first image follows BOS, so its entry differs from those of later ones.
        suffix = self._variant + ("" if first else " later")
        return hashlib.sha256(f"{key}{suffix}".encode()).hexdigest() if suffix else key

    def _look_up(self, key: str) -> CompactKV | None:
        if self._store is None:
            return None
        try:
            entry = self._store.get(key)
        except Exception as error:
            raise RequestError(
                "store",
                f"{type(self._store).__name__}.get({key!r}) failed with {type(error).__name__}: {error}",
            ) from error
        if entry is not None and entry.fingerprint != self._fingerprint:
            raise RequestError(
                "store",
                f"expected an entry of the model with fingerprint {self._fingerprint!r}, got one of "
                f"{entry.fingerprint!r} under key {key}; use other keys or another store for each model",
            )
        expected = self._num_tokens
        if entry is not None and expected is not None and entry.num_tokens != expected:
            raise RequestError(
                "store",
                f"expected an entry with {expected} VoCo tokens, got one with {entry.num_tokens} under "
                f"key {key}; use different keys for different numbers of VoCo tokens",
            )
        return entry

    def _of_image(self, image: Any, function: Callable[[Any], Any]) -> Any:
        try:
            return function(image)
        except PictureError as error:
            raise RequestError("image", str(error)) from error
        except Exception as error:  # an image processor may raise anything
            raise RequestError(
                "image",
                f"processing the image {image!r} failed: {type(error).__name__}: {error}",
            ) from error

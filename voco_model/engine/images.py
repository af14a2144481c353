"""An image on its way to its entry: looked up, read once for all who ask, written behind."""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from voco_kernels.kv import CompactKV
from voco_model.engine.first_pass import Pixels
from voco_model.engine.plan import ImageSlot
from voco_model.engine.request import RequestError
from voco_model.image_key import pixel_digest
from voco_model.kv_store.base import Store
from voco_model.pictures import PictureError

logger = logging.getLogger("voco_model.engine")

# Entries that wait to be written, at most: one more is not kept. New images wait for the store, but not
# for ever, when half as many do.
_MAX_UNWRITTEN = 64
_PATIENCE = 5.0


@dataclass(eq=False)
class ImageJob:
    """One image in one kind of place; shared by all requests that have it there.

    Attributes:
        key: of its entry; an empty one is not stored.
        slot: the ids around it.
        pixels: what the first pass reads, once it is known that it must.
        entry: once it is there. Of a plain LLaVA: ``features``, its embeddings ``[tokens, H]``.
        error: why it will never be there.
        prepared: whether its creator has found the entry, the pixels or an error.
        from_store: whether the entry was there before.
    """

    key: str
    slot: ImageSlot
    pixels: Pixels | None = None
    entry: CompactKV | None = None
    features: Tensor | None = None
    error: RequestError | None = None
    prepared: bool = False
    from_store: bool = False

    @property
    def ready(self) -> bool:
        return self.entry is not None or self.features is not None

    @property
    def missing(self) -> bool:
        """Whether the first pass has to read it."""
        return self.prepared and not self.ready and self.error is None


class Images:
    """The images that some request is waiting for.

    Args:
        store: looked up first, and written behind; None without.
        decode: an image's picture, which the next two take.
        key_of: an image's key where the request brings none.
        prepare: an image's pixels for the first pass.
        variant: told into the keys of entries that ``compress`` wouldn't make.
        shared: whether requests share an image's job; otherwise each reads it anew, and there is no
        store. fingerprint: of the model, written into entries.
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
        shared: bool = True,
    ) -> None:
        self._store = store if shared else None
        self._shared = shared
        self._decode = decode
        self._key_of = key_of if store is not None else pixel_digest
        self._prepare = prepare
        self._variant = variant
        self._fingerprint = fingerprint
        self._jobs: weakref.WeakValueDictionary[str, ImageJob] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._writer: ThreadPoolExecutor | None = None
        self._unwritten: list[Future] = []
        self._closed = False
        self.put_failures = 0

    def job(self, image: Any, slot: ImageSlot, *, first: bool, key: str | None) -> ImageJob:
        """The job of an image, perhaps one that others wait for already.

        Raises:
            RequestError: an image that can't be read, or a store that raised.
        """
        # Decoded once: what replaces a file between key and pixels would be kept under a wrong key.
        if key is None or not self._shared:
            image = self._of_image(image, self._decode)
        if not self._shared:
            return ImageJob("", slot, self._of_image(image, self._prepare), prepared=True)
        if key is None:
            key = self._of_image(image, self._key_of)
        key = self._placed(key, first)
        with self._lock:
            job = self._jobs.get(key)
            if job is not None:
                return job
            job = self._jobs[key] = ImageJob(key, slot)
        try:
            self._let_writer_catch_up()
            job.entry = self._look_up(key)
            job.from_store = job.entry is not None
            if job.entry is None:
                picture = self._of_image(image, self._decode)  # at once where it is decoded
                job.pixels = self._of_image(picture, self._prepare)
        except RequestError as error:
            self.fail(job, error)
            raise
        finally:
            job.prepared = True
        return job

    def keep(self, job: ImageJob, entry: CompactKV) -> None:
        """Gives a job its entry, and writes it to the store behind the answer."""
        job.entry = replace(entry, key=job.key, fingerprint=self._fingerprint)
        job.pixels = None
        if self._store is None or not job.key:
            return
        with self._lock:
            self._unwritten = [future for future in self._unwritten if not future.done()]
            if self._closed or len(self._unwritten) >= _MAX_UNWRITTEN:
                self._not_kept(
                    job, "the engine is closed" if self._closed else "the store is behind"
                )
                return
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, thread_name_prefix="voco-store-writer")
            # The job goes along: until its entry is written, it must be found here.
            self._unwritten.append(self._writer.submit(self._write, job))

    def fail(self, job: ImageJob, error: RequestError) -> None:
        job.error = error
        self.forget(job)

    def forget(self, job: ImageJob) -> None:
        """Who asks for this image next looks it up again."""
        with self._lock:
            if self._jobs.get(job.key) is job:
                del self._jobs[job.key]

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until every entry is written, or couldn't be; whether that was within ``timeout``."""
        with self._lock:
            pending = [future for future in self._unwritten if not future.done()]
        return not wait(pending, timeout).not_done

    def close(self, timeout: float | None = None) -> bool:
        """Writes what there is; whether that was done within ``timeout``."""
        with self._lock:
            self._closed = True
        done = self.flush(timeout)
        if self._writer is not None:
            self._writer.shutdown(wait=done, cancel_futures=True)
        given_up = sum(future.cancelled() for future in self._unwritten)
        if given_up:
            self.put_failures += given_up
            logger.warning("%d entries could not be stored: the store hangs", given_up)
        return done

    def _let_writer_catch_up(self) -> None:
        # Here, in the thread of who brings a new image: the engine itself waits for no store.
        with self._lock:
            pending = [future for future in self._unwritten if not future.done()]
        if len(pending) >= _MAX_UNWRITTEN // 2:
            wait(pending[:1], _PATIENCE)

    def _placed(self, key: str, first: bool) -> str:
        # What stands first has BOS before it: what stands later has another entry.
        told = self._variant + ("" if first else " later")
        return hashlib.sha256(f"{key}{told}".encode()).hexdigest() if told else key

    def _look_up(self, key: str) -> CompactKV | None:
        if self._store is None:
            return None
        try:
            entry = self._store.get(key)
        except Exception as error:
            raise RequestError(
                "store",
                f"expected a store that serves or misses, got {type(error).__name__}: {error} from "
                f"{type(self._store).__name__}.get({key!r})",
            ) from error
        if entry is not None and entry.fingerprint != self._fingerprint:
            raise RequestError(
                "store",
                f"expected an entry of the model with fingerprint {self._fingerprint!r}, got one of "
                f"{entry.fingerprint!r} under key {key}; use other keys for another model, or a store "
                "of its own",
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
                f"expected an image that the processor takes, got {image!r}: "
                f"{type(error).__name__}: {error}",
            ) from error

    def _write(self, job: ImageJob) -> None:
        try:
            self._store.put(job.entry)
        except Exception as error:  # the answer stands; the next request compresses again
            self._not_kept(job, error)

    def _not_kept(self, job: ImageJob, why: Any) -> None:
        self.put_failures += 1
        logger.warning("the entry of image %s could not be stored: %s", job.key, why)

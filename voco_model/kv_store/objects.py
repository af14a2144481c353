"""``ObjectStore``: entries in S3, GCS, Azure or whatever else fsspec can write to."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import (
    Store,
    StoreStats,
    StoreUnavailable,
    Tally,
    VerifyReport,
    key_of,
    logger,
    may_serve,
)
from voco_model.kv_store.bounded import Breaker, BusyError, Deadline, Workers
from voco_model.kv_store.format import VERSION, EntryError, check_key, decode, encode

_SUFFIX = ".safetensors"
# Where a put is all or nothing, and a rename would be a copy.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "tos", "memory"}
_SECRET = re.compile(r"pass|secret|token|key|credential|sas", re.IGNORECASE)


class ObjectStore(Store):
    """A store in a bucket or a folder that fsspec writes to: one object an entry.

    The objects are ``<url>/v1/ab/<key>.safetensors``, with the bytes and names of the files of a
    ``KVStore``. On object stores a put is atomic; elsewhere an entry is written to ``<url>/tmp/`` and
    moved, which is atomic where renaming is. Bad objects are moved to ``<url>/quarantine/``;
    another model's entry stays.

    Whatever is wrong with the other side, a call ends in time: within ``timeout`` seconds and what its
    bytes take at ``min_bandwidth``. A call that is given up goes on in its thread until the file system
    itself gives up; ``connections`` of them at most. After a failure nobody asks for ``back_off[0]``
    seconds; then one call probes, and the time doubles up to ``back_off[1]`` with each probe that fails.
    Meanwhile ``get`` is a miss and every other call raises StoreUnavailable, at once. ``stats`` counts
    these misses as "unavailable" and "backing off".

    ``put`` returns when the file system has said that the entry is written. There is no ``max_bytes``:
    a bucket's lifecycle rules know how to expire objects.

    Args:
        url: any that fsspec knows: ``s3://bucket/path``, ``gs://``, ``abfs://``, ``sftp://``, ...
        fingerprint: of the model whose entries are kept and served; None: of any.
        timeout: seconds for one call, besides what its bytes take.
        min_bandwidth: bytes a second; a transfer that is slower counts as stalled.
        connections: calls at a time.
        back_off: seconds to stay away, after the first failure and at most.
        clock: monotonic seconds, for the back-off.
        storage_options: for the file system: credentials, endpoint, region, ...

    Raises:
        ImportError: fsspec, or the package for this kind of URL, isn't installed.
        ValueError, TypeError: a URL of no known kind; options that don't fit.
    """

    def __init__(
        self,
        url: str,
        *,
        fingerprint: str | None = None,
        timeout: float = 2.0,
        min_bandwidth: float = 20e6,
        connections: int = 8,
        back_off: tuple[float, float] = (1.0, 60.0),
        clock: Callable[[], float] = time.monotonic,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (("timeout", timeout), ("min_bandwidth", min_bandwidth)):
            if not 0 < value < float("inf"):
                raise ValueError(f"expected {name} above 0, got {value!r}")
        if "://" not in url:
            raise ValueError(f"expected a URL such as s3://bucket/path, got {url!r}")
        self._fsspec = _import_fsspec()
        self._protocol = url.split("://", 1)[0]
        try:
            self._fsspec.get_filesystem_class(self._protocol)
        except ImportError as error:
            raise ImportError(
                f"expected the package that fsspec opens {self._protocol}:// with, got none: {error}"
            ) from error
        self._url = url.rstrip("/")
        self._storage_options = dict(storage_options or {})
        self._secrets = _secrets(url, self._storage_options)
        self.fingerprint = fingerprint
        self._timeout = timeout
        self._min_bandwidth = min_bandwidth
        self._breaker = Breaker(*back_off, clock=clock)
        self._workers = Workers(connections, "voco-kv-objects")
        # A file system each, because not all can be shared: SFTP's and FTP's have one connection.
        self._of_thread = threading.local()
        self._tally = Tally(StoreStats())
        self._closed = False
        self._try_out()

    def _try_out(self) -> None:
        """Options that the file system doesn't know are an error now; one out of reach may come back."""
        try:
            self._workers.run(self._file_system, Deadline(self._timeout))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"expected storage_options for {self._protocol}://, got ones that don't fit: "
                f"{self._without_secrets(error)}"
            ) from None
        except Exception as error:
            logger.warning("%s: %s", self, self._without_secrets(error))

    def __repr__(self) -> str:
        return f"ObjectStore({without_password(self._url)!r})"

    def put(self, entry: CompactKV, key: str | None = None) -> None:
        key = key_of(entry, key, self.fingerprint)
        data = b"".join(encode(entry, key))
        try:
            self._run(lambda fs, root, _: self._write(fs, root, key, data), len(data))
        except StoreUnavailable as error:
            self._tally.add(put_failures=1)
            logger.warning("put of %s (%d bytes) failed: %s", key, len(data), error)
            raise
        self._tally.add(puts=1, bytes_written=len(data))

    def get(self, key: str) -> CompactKV | None:
        check_key(key)
        try:
            data = self._run(lambda *call: self._fetch(*call, key))
        except StoreUnavailable as error:
            backing_off = isinstance(error, _BackingOffError)
            self._tally.add("backing off" if backing_off else "unavailable", misses=1)
            return None
        entry = None
        if data is not None:
            try:
                entry = self._decode(key, data)
            except EntryError as error:
                self._tally.add(error.reason)
                entry = self._quarantine(key, error)
        if entry is None or not may_serve(self, entry, key, self._tally):
            entry = None
            self._tally.add(misses=1)
        else:
            self._tally.add(hits=1, bytes_read=entry.nbytes)
        return entry

    def delete(self, key: str) -> bool:
        """As ``Store.delete``. Raises StoreUnavailable where nobody can say."""
        check_key(key)

        def delete(fs, root, _):
            path = _path(root, key)
            try:
                fs.info(path)  # object stores delete what isn't there, too
                fs.rm_file(path)
            except FileNotFoundError:
                return False
            return True

        deleted = self._run(delete)
        self._tally.add(deletes=deleted)
        return deleted

    def stats(self) -> StoreStats:
        """What this handle did; how much there is, ``len`` counts."""
        return self._tally.read()

    def verify(self) -> VerifyReport:
        """Reads every entry; those that may not be served are set aside.

        Raises:
            StoreUnavailable: before all were read.
        """
        report = VerifyReport()
        for key in self:
            data = self._run(lambda *call, key=key: self._fetch(*call, key))
            if data is None:
                continue
            try:
                self._decode(key, data)
            except EntryError as error:
                report.bad[key] = str(error)
                self._quarantine(key, error)
            else:
                report.entries += 1
                report.bytes += len(data)
        return report

    def __contains__(self, key: object) -> bool:
        """Whether there is something; False where nobody can say."""
        check_key(key)
        try:
            return self._run(lambda fs, root, _: fs.exists(_path(root, key)))
        except StoreUnavailable:
            return False

    def __iter__(self) -> Iterator[str]:
        """As ``Store.__iter__``, folder by folder. Raises StoreUnavailable where it ends early."""

        def names(fs, root, _, *folders):
            fs.invalidate_cache()
            try:
                return [
                    name.rstrip("/").rsplit("/", 1)[-1]
                    for name in fs.ls("/".join((root, f"v{VERSION}", *folders)), detail=False)
                ]
            except FileNotFoundError:
                return []

        for folder in self._run(names):
            for name in self._run(lambda *call, folder=folder: names(*call, folder)):
                key = name.removesuffix(_SUFFIX)
                try:
                    check_key(key)
                except ValueError:
                    continue  # somebody else's
                yield key

    def close(self) -> None:
        self._closed = True

    def _file_system(self) -> tuple[Any, str]:
        """This thread's file system, and the path of the store in it."""
        opened = getattr(self._of_thread, "opened", None)
        if opened is None:
            opened = self._of_thread.opened = self._fsspec.core.url_to_fs(
                self._url, skip_instance_cache=True, **self._storage_options
            )
        return opened

    def _write(self, fs, root: str, key: str, data: bytes) -> None:
        path = _path(root, key)
        if self._protocol in _ATOMIC:
            fs.pipe_file(path, data)
            return
        temporary = f"{root}/tmp/{key}.{secrets.token_hex(8)}"
        fs.makedirs(f"{root}/tmp", exist_ok=True)
        try:
            fs.pipe_file(temporary, data)
            self._move(fs, temporary, path)
        except BaseException:
            try:
                fs.rm_file(temporary)
            except Exception:  # whatever was wrong before is what matters
                pass
            raise

    def _move(self, fs, path: str, target: str) -> None:
        if self._protocol not in _ATOMIC:
            fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        fs.mv(path, target)

    def _fetch(self, fs, root: str, deadline: Deadline, key: str) -> bytes | EntryError | None:
        path = _path(root, key)
        try:
            info = fs.info(path)
            if info["type"] != "file":
                return EntryError("foreign", f"expected an object at {path}, got a {info['type']}")
            deadline.extend((info["size"] or 0) / self._min_bandwidth)
            return fs.cat_file(path)
        except FileNotFoundError:
            return None

    def _decode(self, key: str, data: bytes | EntryError) -> CompactKV:
        if isinstance(data, EntryError):
            raise data
        return decode(data, key=key)

    def _quarantine(self, key: str, error: EntryError) -> CompactKV | None:
        """Sets a bad object aside; or returns the good entry that has replaced it meanwhile."""

        def quarantine(fs, root, deadline):
            path = _path(root, key)
            aside = f"{root}/quarantine/{key}.{secrets.token_hex(8)}{_SUFFIX}"
            data = self._fetch(fs, root, deadline, key)
            if data is None:
                return None, "gone by now"
            try:
                return self._decode(key, data), "replaced by a good one"
            except EntryError:
                pass
            try:
                self._move(fs, path, aside)
            except FileNotFoundError:
                return None, "gone by now"
            if not isinstance(data, EntryError):
                # No file system moves a file on condition that it is still the same.
                moved = fs.cat_file(aside)
                if moved != data:
                    try:
                        entry = self._decode(key, moved)
                    except EntryError:
                        pass
                    else:
                        self._move(fs, aside, path)
                        return entry, "replaced by a good one"
            return None, f"now {aside}"

        try:
            entry, fate = self._run(quarantine)
        except StoreUnavailable as unavailable:
            entry, fate = None, f"left where it is ({unavailable})"
        logger.warning("%s: object of %s not served, %s; it is %s", self, key, error, fate)
        return entry

    def _run(self, operation: Callable[[Any, str, Deadline], Any], nbytes: int = 0) -> Any:
        """``operation(file system, path, deadline)``, or StoreUnavailable in time."""
        if self._closed:
            raise ValueError("expected an open store, got a closed one")
        if not self._breaker.allow():
            raise _BackingOffError(
                f"{self} has failed; it is asked again in {self._breaker.left():.3g} s"
            )
        deadline = Deadline(self._timeout + nbytes / self._min_bandwidth)
        try:
            result = self._workers.run(lambda: operation(*self._file_system(), deadline), deadline)
        except BusyError as error:
            self._breaker.asked_nothing()
            logger.warning("%s: %s", self, error)
            raise StoreUnavailable(f"{self}: {error}") from error
        except Exception as error:  # each file system has its own kinds
            seconds = self._breaker.failed()
            text = self._without_secrets(error)
            logger.warning("%s: %s; staying away for %.3g s", self, text, seconds)
            raise StoreUnavailable(f"{self}: {text}") from None
        except BaseException:  # an interrupt, say; the next one finds out
            self._breaker.asked_nothing()
            raise
        self._breaker.succeeded()
        return result

    def _without_secrets(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class _BackingOffError(StoreUnavailable):
    """Nobody was asked."""


def without_password(url: str) -> str:
    """A URL as it may be printed: no password, and no value of a query that may be a secret."""
    url = re.sub(r"(://[^/@:]*):.*@", r"\1:***@", url)
    return re.sub(
        r"([?&])([^=&]+)=([^&]*)",
        lambda match: f"{match[1]}{match[2]}={'***' if _SECRET.search(match[2]) else match[3]}",
        url,
    )


def _secrets(url: str, options: dict[str, Any]) -> list[str]:
    """What must not be printed, however it comes into a message."""
    password = urlsplit(url).password
    found = [password, unquote(password)] if password else []
    found += [
        value
        for name, value in options.items()
        if isinstance(value, str) and len(value) > 3 and _SECRET.search(name)
    ]
    return found


def _path(root: str, key: str) -> str:
    return f"{root}/v{VERSION}/{key[:2]}/{key}{_SUFFIX}"


def _import_fsspec():
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(
            "expected fsspec, which ObjectStore writes through, got none; pip install -e '.[objects]'"
        ) from error
    return fsspec

"""``ObjectStore``: entries in S3, GCS, Azure, or anything else that fsspec can write to."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.base import key_of, logger
from voco_model.kv_store.bounded import Deadline
from voco_model.kv_store.files import SUFFIX
from voco_model.kv_store.format import VERSION, EntryError, decode, encode, is_key
from voco_model.kv_store.remote import RemoteStore

# Protocols whose puts are all or nothing, and whose renames are copies.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "tos", "memory"}
_SECRET = re.compile(r"pass|secret|token|key|credential|sas", re.IGNORECASE)


class ObjectStore(RemoteStore):
    """A store in a bucket or folder that fsspec writes to: one object an entry.

    The objects are ``<url>/v1/ab/<key>.safetensors``, with the bytes and names of a ``KVStore``'s files.
    On object stores a put is atomic; elsewhere an entry is written to ``<url>/tmp/`` and moved, which is
    atomic wherever renaming is. Objects that aren't intact entries are moved to ``<url>/quarantine/``;
    another model's entry stays.

    Calls end in time and back off after failures, as described in ``RemoteStore``. A call that was given
    up continues in its thread until the file system itself gives up; at most ``connections`` of them.

    ``put`` returns once the file system reports the entry as written. There is no ``max_bytes``: use the
    bucket's lifecycle rules to expire objects.

    Args:
        url: any that fsspec knows: ``s3://bucket/path``, ``gs://``, ``abfs://``, ``sftp://``, ...
        fingerprint: of the model whose entries are stored and served; None accepts any.
        timeout: seconds for a call, besides what its bytes take.
        min_bandwidth: bytes a second, as a number or text such as "20MB"; a slower transfer counts as
            stalled.
        connections: calls at a time.
        back_off: seconds to stay away, after the first failure and at most.
        clock: monotonic seconds, for the back-off.
        storage_options: for the file system: credentials, endpoint, region, ...

    Raises:
        ImportError: fsspec, or the package for this kind of URL, isn't installed.
        ValueError, TypeError: a URL of an unknown kind, or invalid options.
    """

    def __init__(
        self,
        url: str,
        *,
        fingerprint: str | None = None,
        timeout: float = 2.0,
        min_bandwidth: float | str = 20e6,
        connections: int = 8,
        back_off: tuple[float, float] = (1.0, 60.0),
        clock: Callable[[], float] = time.monotonic,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            fingerprint=fingerprint,
            timeout=timeout,
            min_bandwidth=min_bandwidth,
            connections=connections,
            back_off=back_off,
            clock=clock,
            name="voco-kv-objects",
        )
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
        # One a thread, because not all can be shared: those of SFTP and FTP have one connection.
        self._of_thread = threading.local()
        self._try_out()

    def _try_out(self) -> None:
        """Raises for options that the file system doesn't know. One that is out of reach may come
        back."""
        try:
            self._workers.run(self._file_system, Deadline(self._timeout))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"expected storage_options that {self._protocol}:// accepts, got others: "
                f"{self._without_secrets(error)}"
            ) from None
        except Exception as error:
            logger.warning("%s: %s", self, self._without_secrets(error))

    def __repr__(self) -> str:
        return f"ObjectStore({without_password(self._url)!r})"

    def put(self, entry: CompactKV, key: str | None = None) -> None:
        key = key_of(entry, key, self.fingerprint)
        data = b"".join(encode(entry, key))
        with self._counted_put(key, len(data)):
            self._run(lambda fs, root, _: self._write(fs, root, key, data), len(data))

    def __iter__(self) -> Iterator[str]:
        """As ``Store.__iter__``, one folder at a time.

        Raises:
            StoreUnavailable: before the end.
        """

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
                key = name.removesuffix(SUFFIX)
                if is_key(key):  # otherwise not one of ours
                    yield key

    def _file_system(self) -> tuple[Any, str]:
        """This thread's file system, and the path of the store in it."""
        opened = getattr(self._of_thread, "opened", None)
        if opened is None:
            opened = self._of_thread.opened = self._fsspec.core.url_to_fs(
                self._url, skip_instance_cache=True, **self._storage_options
            )
        return opened

    def _bind(self, operation: Callable[..., Any], deadline: Deadline):
        def call() -> Any:
            try:
                return operation(*self._file_system(), deadline)
            except Exception as error:  # each file system has its own kinds
                raise OSError(self._without_secrets(error)) from None

        return call, None

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
            except Exception:  # the first error is the one to raise
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

    def _exists(self, fs, root: str, _: Deadline, key: str) -> bool:
        return fs.exists(_path(root, key))

    def _remove(self, fs, root: str, _: Deadline, key: str) -> bool:
        path = _path(root, key)
        try:
            fs.info(path)  # object stores report success for deleting what isn't there
            fs.rm_file(path)
        except FileNotFoundError:
            return False
        return True

    def _set_aside(
        self, fs, root: str, deadline: Deadline, key: str
    ) -> tuple[CompactKV | None, str]:
        data = self._fetch(fs, root, deadline, key)
        if data is None:
            return None, "it was removed meanwhile"
        if (entry := self._decoded(key, data)) is not None:
            return entry, "a good one has replaced it"
        path, aside = _path(root, key), f"{root}/quarantine/{key}.{secrets.token_hex(8)}{SUFFIX}"
        try:
            self._move(fs, path, aside)
        except FileNotFoundError:
            return None, "it was removed meanwhile"
        # No file system can move an object on condition that it is unchanged, so look at what was moved.
        if not isinstance(data, EntryError):
            moved = fs.cat_file(aside)
            if moved != data and (entry := self._decoded(key, moved)) is not None:
                self._move(fs, aside, path)
                return entry, "a good one has replaced it"
        return None, f"it was moved to {aside}"

    def _decoded(self, key: str, data: bytes | EntryError) -> CompactKV | None:
        try:
            return self._decode(key, data)
        except EntryError:
            return None

    def _without_secrets(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def without_password(url: str) -> str:
    """A URL that may be printed: without its password and without secrets in its query."""
    url = re.sub(r"(://[^/@:]*):.*@", r"\1:***@", url)
    return re.sub(
        r"([?&])([^=&]+)=([^&]*)",
        lambda match: f"{match[1]}{match[2]}={'***' if _SECRET.search(match[2]) else match[3]}",
        url,
    )


def _secrets(url: str, options: dict[str, Any]) -> list[str]:
    """Strings that must never be printed, not even as part of another's message."""
    password = urlsplit(url).password
    found = [password, unquote(password)] if password else []
    found += [
        value
        for name, value in options.items()
        if isinstance(value, str) and len(value) > 3 and _SECRET.search(name)
    ]
    return found


def _path(root: str, key: str) -> str:
    return f"{root}/v{VERSION}/{key[:2]}/{key}{SUFFIX}"


def _import_fsspec():
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(
            "expected fsspec, which ObjectStore needs, got none; pip install -e '.[objects]'"
        ) from error
    return fsspec

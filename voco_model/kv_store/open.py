"""``open_store``: opens the store that a URL names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from voco_model.kv_store.base import Store
from voco_model.kv_store.disk import KVStore
from voco_model.kv_store.memory_store import MemoryStore
from voco_model.kv_store.objects import ObjectStore, without_password
from voco_model.kv_store.redis_store import RedisStore
from voco_model.kv_store.sizes import parse_size
from voco_model.kv_store.tiered import TieredStore


def open_store(url: str | os.PathLike | Sequence, **options: Any) -> Store:
    """Opens the store that a URL names.

    | URL | store |
    |---|---|
    | a path, ``file:///path`` | ``KVStore``, in a folder |
    | ``memory://`` | ``MemoryStore``, in this process |
    | ``redis://[user:password@]host[:port][/db]``, ``rediss://``, ``unix://path`` | ``RedisStore`` |
    | ``s3://``, ``gs://``, ``abfs://``, ``sftp://``, ... | ``ObjectStore``, by fsspec |
    | several, joined by ``|`` or in a sequence | ``TieredStore``, the first one uppermost |

    Options of the store's constructor go into the query of the URL, as in
    ``memory://?max_bytes=1GB|file:///var/cache/voco?max_bytes=100GB|redis://cache/0?ttl=86400``, or are
    keyword arguments. Sizes may be text: ``10GB`` is 10 * 10**9 bytes, ``10GiB`` 10 * 2**30.

    Args:
        url: as above; a sequence may also contain open stores. Pass a path that contains ``?``, ``|`` or
            ``://`` as a ``pathlib.Path``.
        options: for the store; with several, ``fingerprint`` is for each and the rest for
            ``TieredStore``.

    Raises:
        ValueError, TypeError: an unknown scheme or option, or an invalid value.
        ImportError: a package that the store needs isn't installed.
        OSError: a folder can't be created.
    """
    if isinstance(url, os.PathLike):
        return KVStore(Path(url), **_keywords("a path", options, _DISK))
    if isinstance(url, str):
        if "|" not in url:
            return _open_one(url, options)
        url = url.split("|")
    return _open_tiers(list(url), options)


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if str(value).lower() not in words:
        raise ValueError("true or false")
    return words[str(value).lower()]


def _seconds(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError("a number of seconds") from None


def _count(value: Any) -> int:
    if not re.fullmatch(r"\d+", str(value)):
        raise ValueError("an integer")
    return int(value)


def _pair(value: Any) -> tuple[float, float]:
    try:
        first, most = value.split(",") if isinstance(value, str) else value
        return float(first), float(most)
    except (TypeError, ValueError):
        raise ValueError("two numbers of seconds such as 1,30") from None


def _as_it_is(value: Any) -> Any:
    return value


_MEMORY: dict[str, Callable[[Any], Any]] = {
    "max_bytes": parse_size,
    "fingerprint": str,
    "pin": _switch,
}
_DISK: dict[str, Callable[[Any], Any]] = {
    "max_bytes": parse_size,
    "fingerprint": str,
    "fsync": _switch,
    "quarantine_bytes": parse_size,
    "index_timeout": _seconds,
    "buffers": _as_it_is,
}
_REMOTE: dict[str, Callable[[Any], Any]] = {
    "fingerprint": str,
    "timeout": _seconds,
    "min_bandwidth": parse_size,
    "connections": _count,
    "back_off": _pair,
}
_REDIS: dict[str, Callable[[Any], Any]] = {
    **_REMOTE,
    "ttl": _seconds,
    "prefix": str,
    "quarantine_ttl": _seconds,
}
# Options in a URL's query that are for redis-py.
_REDIS_PY = re.compile(r"db|username|password|client_name|ssl_\w+")
_OBJECTS: dict[str, Callable[[Any], Any]] = {**_REMOTE, "storage_options": _as_it_is}
_TIERED = {"max_waiting_bytes": parse_size, "close_timeout": _seconds}
_NOT_IN_A_URL = {"buffers", "storage_options"}


def _open_one(url: str, options: dict[str, Any]) -> Store:
    scheme, separator, _ = url.partition("://")
    if not separator:
        if "?" in url or not url:
            raise ValueError(
                f"expected a path, got {url!r}; with options write file:///path?max_bytes=10GB, and "
                "pass a path that contains ? as a pathlib.Path"
            )
        return KVStore(url, **_keywords("a path", options, _DISK))
    if scheme == "file":
        parts, query = _split(url)
        if parts.netloc not in ("", "localhost") or not parts.path.strip("/"):
            raise ValueError(
                f"expected an absolute path as in file:///path, got {url!r}; or pass a path alone"
            )
        return KVStore(unquote(parts.path), **_keywords(scheme, options, _DISK, query))
    if scheme == "memory":
        parts, query = _split(url)
        if parts.netloc or parts.path:
            raise ValueError(
                f"expected memory:// without a name, got {url!r}; each call opens a store of its own"
            )
        return MemoryStore(**_keywords(scheme, options, _MEMORY, query))
    if scheme in ("redis", "rediss", "unix"):
        parts, query = _split(url)
        theirs = {name: query.pop(name) for name in list(query) if _REDIS_PY.fullmatch(name)}
        keywords = _keywords(scheme, options, _REDIS, query)
        return RedisStore(_join(parts, urlencode(theirs)), **keywords)
    parts, query = _split(url)
    keywords = _keywords(scheme, options, _OBJECTS, query)
    try:
        return ObjectStore(_join(parts), **keywords)
    except ValueError as error:
        if "not known" not in str(error):
            raise
        raise ValueError(
            "expected a path, file, memory, redis, rediss, unix or a scheme of fsspec, got "
            f"{scheme}://"
        ) from None


def _open_tiers(urls: list, options: dict[str, Any]) -> TieredStore:
    fingerprint = {k: options.pop(k) for k in list(options) if k == "fingerprint"}
    keywords = _keywords("several tiers", options, _TIERED)
    tiers: list[Store] = []
    try:
        for url in urls:
            if isinstance(url, Store):
                tiers.append(url)
            elif isinstance(url, str):
                tiers.append(_open_one(url.strip(), fingerprint))
            else:
                tiers.append(open_store(url, **fingerprint))
        return TieredStore(tiers, **keywords)
    except BaseException:
        for tier in tiers:
            if tier not in urls:
                tier.close()
        raise


def _split(url: str) -> tuple[Any, dict[str, str]]:
    """A URL split into its parts, and its query, without duplicate names."""
    parts = urlsplit(url)
    if parts.scheme in ("redis", "rediss") and "@" in url and "@" not in parts.netloc:
        # The message must not quote a password that looks like a port, path or query.
        raise ValueError(
            f"expected {parts.scheme}://user:password@host with /, ? and # of the password "
            "percent-encoded, got a URL whose host ends before its @"
        )
    query: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in query:
            raise ValueError(f"expected {name} once, got it twice in {without_password(url)!r}")
        query[name] = value
    if parts.fragment:
        raise ValueError(
            f"expected a URL without #, got {without_password(url)!r}; percent-encode it as %23"
        )
    return parts, query


def _join(parts: Any, query: str = "") -> str:
    """A URL with another query. (urlunsplit would remove the // of one without a host.)"""
    return f"{parts.scheme}://{parts.netloc}{parts.path}{query and '?' + query}"


def _keywords(
    scheme: str,
    options: dict[str, Any],
    known: Mapping[str, Callable[[Any], Any]],
    query: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Arguments for a store's constructor, from a URL's query and from keyword arguments."""
    query = query or {}
    unknown = sorted({*options, *query} - set(known)) + sorted(_NOT_IN_A_URL & set(query))
    if unknown:
        raise ValueError(
            f"expected options of {scheme} among {', '.join(known)}, got {', '.join(unknown)}"
            + "; limit a server by its own maxmemory" * (unknown == ["max_bytes"])
        )
    if twice := sorted(set(options) & set(query)):
        raise ValueError(
            f"expected {', '.join(twice)} either in the URL or as an argument, got both"
        )
    keywords = {}
    for name, value in {**query, **options}.items():
        try:
            keywords[name] = None if value is None else known[name](value)
        except ValueError as error:
            raise ValueError(f"expected {name} as {error}, got {value!r}") from None
    if "max_bytes" in known and keywords.get("max_bytes") is None:
        raise ValueError(
            f"expected max_bytes with {scheme}, got none; add ?max_bytes=10GB to its URL"
        )
    return keywords

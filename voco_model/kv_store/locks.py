"""Lock files with a timeout, between threads and processes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from voco_model.kv_store.base import StoreUnavailable

_FIRST_PAUSE, _LONGEST_PAUSE = 1e-4, 1e-2  # seconds between two attempts
_held: dict[object, int] = {}  # descriptors of the locks that this process holds


@contextmanager
def alone(path: Path, mode: int = fcntl.LOCK_EX, *, timeout: float) -> Iterator[None]:
    """Holds the lock file ``path``, exclusively, or shared with ``fcntl.LOCK_SH``.

    The kernel releases it when its process dies. A stopped process keeps it, hence the timeout.

    Args:
        timeout: seconds.

    Raises:
        StoreUnavailable: others held it for that long.
        OSError: the file can't be opened or created.
    """
    token = object()
    _held[token] = _acquire(path, mode, timeout)
    try:
        yield
    finally:
        fd = _held.pop(token, None)
        if fd is not None:  # None in a child forked in this context: the lock is the parent's
            close_locked(fd)


def close_locked(fd: int) -> None:
    """Unlocks and closes a file. Closing alone isn't enough: a forked child's copy would keep the
    lock."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _acquire(path: Path, mode: int, timeout: float) -> int:
    end = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while True:
        fd = _open(path)
        try:
            fcntl.flock(fd, mode | fcntl.LOCK_NB)
            if _is_at(path, fd):
                return fd
        except BlockingIOError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() >= end:
            raise StoreUnavailable(
                f"others held the lock {path} for {timeout} s; check for a stopped process"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:  # its folder was removed
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def _is_at(path: Path, fd: int) -> bool:
    """Whether the lock file is still in place: if it was removed, others lock another one."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _let_go_in_child() -> None:
    # Close without unlocking: the lock belongs to the open file, which parent and child share. If the
    # child kept it open, the lock would outlive a parent that is killed.
    for fd in _held.values():
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)

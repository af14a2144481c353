"""The number of threads for BLAKE3, also after a fork."""

from __future__ import annotations

import os

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def hash_threads() -> int:
    """``max_threads`` for ``blake3``: -1, its ``AUTO``, or 1 in a forked process.

    BLAKE3's thread pool is created in the process that first hashes something large. A forked child
    inherits the pool without its threads, and would wait for them forever.
    """
    return 1 if _forked else -1

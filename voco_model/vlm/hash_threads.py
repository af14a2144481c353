"""How many threads BLAKE3 may use."""

from __future__ import annotations

import os

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def hash_threads() -> int:
    """``max_threads`` for ``blake3``: -1, its ``AUTO``; 1 in a process that was forked.

    BLAKE3's pool of threads belongs to the process that first hashed something large. A child has the
    pool but not its threads, and would wait for them without end.
    """
    return 1 if _forked else -1

"""Run part of a test in a forked child process."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def in_child(function: Callable[[], None], seconds: int = 60) -> None:
    """Call ``function`` in a forked child, and fail if it raises or hangs for ``seconds``."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills the child wherever it hangs
            signal.alarm(seconds)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended != -signal.SIGALRM, f"the child hung for {seconds} seconds"
    assert ended == 0, "the child raised; its traceback is above"

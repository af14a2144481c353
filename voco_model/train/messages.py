"""What a run prints: lines on stderr from rank 0, without the noise of the libraries under it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

# Accelerate's own setting is 1 wherever DeepSpeed accumulates, which is how the Trainer sets both up.
_ACCUMULATION = "Gradient accumulation steps mismatch"


class Messages:
    """Prints lines on stderr on rank 0 and nothing on the others."""

    def __init__(self, rank: int) -> None:
        self._silent = rank != 0

    def __call__(self, text: str) -> None:
        if not self._silent:
            print(text, file=sys.stderr, flush=True)

    def progress(self, done: int, of: int) -> None:
        """Report how many samples have been checked, every 8,192 of them."""
        if not self._silent and (done == of or done % 8192 == 0):
            self(f"checked {done:,} of {of:,} samples")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``counted(1, "step")`` is ``"1 step"``, ``counted(2000, "step")`` is ``"2,000 steps"``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


@contextmanager
def quiet() -> Iterator[None]:
    """Show each warning of a library once, and no progress bars but the run's own.

    DeepSpeed calls deprecated functions of torch.distributed in every step, and torch changes the
    filters of warnings in between, so that Python would print the same lines thousands of times.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate.accelerator")
    with warnings.catch_warnings():
        show, shown = warnings.showwarning, set()

        def show_once(message, category, filename, lineno, file=None, line=None) -> None:
            if (str(message), category) not in shown:
                shown.add((str(message), category))
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_once
        transformers_logging.disable_progress_bar()
        accelerate.addFilter(_is_news)
        try:
            yield
        finally:
            accelerate.removeFilter(_is_news)
            if bars:
                transformers_logging.enable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return _ACCUMULATION not in record.getMessage()

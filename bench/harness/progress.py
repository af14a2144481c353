"""Progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressReport:
    """A bar on a terminal, a line for each measurement elsewhere.

    Args:
        total: measurements in all.
        done: how many of them were there before.
    """

    def __init__(self, total: int, done: int) -> None:
        self.console = Console(stderr=True)
        self.total, self.done = total, done
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.task = self.progress.add_task("", total=total, completed=done)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar meanwhile."""
        with self.progress:
            yield

    def measure(self, what: str, function: Callable[[], dict], say: Callable[[dict], str]) -> dict:
        """Run one measurement under its name; returns what it returns, which ``say`` puts in words."""
        self.progress.update(self.task, description=what)
        found = function()
        self.skip(1)
        if not self.console.is_terminal:
            print(f"[{self.done}/{self.total}] {what}: {say(found)}", file=sys.stderr, flush=True)
        return found

    def skip(self, count: int) -> None:
        """Count measurements that are not run."""
        self.done += count
        self.progress.advance(self.task, count)

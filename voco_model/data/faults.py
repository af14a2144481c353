"""Faults of samples: their kinds, the policy for each kind, and the log."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

# Kinds of fault with the actions that each allows; the first one is the default.
KINDS: dict[str, tuple[str, ...]] = {
    "bad_record": ("fatal", "skip"),  # not JSON, or without conversations
    "unknown_role": ("fatal", "skip"),
    "empty_answer": ("fatal", "skip"),  # or no answer at all
    "misplaced_images": (
        "fatal",
        "skip",
    ),  # the numbers of <image> and of images differ, or a text has <VoCo>
    "missing_file": ("fatal", "skip"),
    "broken_image": ("fatal", "skip"),
    "loose_turns": (
        "trim",
        "skip",
        "fatal",
    ),  # an answer before the first question, or a last question without an answer
    "over_long": ("truncate", "skip", "fatal"),  # more tokens than max_length
}
_SHOWN = 5


@dataclass(frozen=True)
class Fault:
    """One sample that can't be used as it is.

    Attributes:
        kind: a key of ``KINDS``.
        where: file and line, or data set and row.
    """

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}: {self.message}"


class DataError(ValueError):
    """A fault as an exception; the policy decides whether it ends the run."""

    def __init__(self, kind: str, where: str, message: str) -> None:
        # All three in args, so that the exception can be pickled by a worker process.
        super().__init__(kind, where, message)
        self.fault = Fault(kind, where, message)

    def __str__(self) -> str:
        return str(self.fault)


class FaultPolicy:
    """The action for each kind of fault.

    Args:
        actions: actions by kind, or one action for every kind except ``over_long``. Other kinds have
            their default, the first action in ``KINDS``.

    Raises:
        ValueError: an unknown kind, or an action that its kind doesn't allow.
    """

    def __init__(self, actions: Mapping[str, str] | str | None = None) -> None:
        if isinstance(actions, str):
            actions = {kind: actions for kind in KINDS if kind != "over_long"}
        self._actions = {kind: choices[0] for kind, choices in KINDS.items()}
        for kind, action in (actions or {}).items():
            if kind not in KINDS:
                raise ValueError(f"expected kinds of fault among {', '.join(KINDS)}, got {kind!r}")
            if action not in KINDS[kind]:
                raise ValueError(f"expected {' or '.join(KINDS[kind])} for {kind}, got {action!r}")
            self._actions[kind] = action

    def __getitem__(self, kind: str) -> str:
        return self._actions[kind]

    def check(self, faults: Iterable[Fault]) -> None:
        """Raise ``ValueError`` if any of these is fatal; the message shows the first of each kind."""
        fatal = [fault for fault in faults if self[fault.kind] == "fatal"]
        if fatal:
            raise ValueError(
                f"expected samples that can be used, got {len(fatal)} that can't:\n{listed(fatal)}\n"
                "fix them, or skip them with data.faults: {KIND: skip}"
            )


def listed(faults: Iterable[Fault]) -> str:
    """A line for each kind with its count, and its first samples."""
    faults = list(faults)
    lines = []
    for kind, count in Counter(fault.kind for fault in faults).most_common():
        lines.append(f"{kind}: {count}")
        shown = [fault for fault in faults if fault.kind == kind][:_SHOWN]
        lines += [f"    {fault.where}: {fault.message}" for fault in shown]
        if count > _SHOWN:
            lines.append(f"    and {count - _SHOWN} more")
    return "\n".join(lines)


class FaultLog:
    """Counts faults, and writes each of them once to a JSON Lines file.

    Args:
        path: the file; None for none.
        resume: continue the counts of the file that is there; else it is replaced.
    """

    def __init__(self, path: str | os.PathLike | None = None, *, resume: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self._path = None if path is None else Path(path)
        self._seen: set[tuple[str, str]] = set()
        if self._path is not None and self._path.exists():
            if resume:
                self._read(self._path)
            else:
                self._path.unlink()

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # killed while writing the last line
            path.write_text(complete, encoding="utf-8")
        for line in complete.splitlines():
            fault = Fault(**json.loads(line))
            self._seen.add((fault.kind, fault.where))
            self.counts[fault.kind] += 1

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Record faults and return the new ones: a sample returns in every epoch."""
        new = [fault for fault in faults if (fault.kind, fault.where) not in self._seen]
        for fault in new:
            self._seen.add((fault.kind, fault.where))
            self.counts[fault.kind] += 1
        if new and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(fault)) + "\n" for fault in new)
        return new

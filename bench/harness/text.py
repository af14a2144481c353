"""What the tables of README and docs have in common."""

from __future__ import annotations

NOT_MEASURED = "not measured"


def table(header: list[str], rows: list[list[str]], *, left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are words, the others figures."""
    rule = [*["---"] * left, *["---:"] * (len(header) - left)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def short(commit: str) -> str:
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")

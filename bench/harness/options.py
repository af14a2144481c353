"""Command-line options that several commands take, and their exit statuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Annotated

import torch
import typer

EXIT_RED = 1
"""Something of ours was wrong or failed."""

EXIT_DEVICE_LOST = 3
"""A kernel broke the CUDA context: run again, with --resume where there is one."""

CONTEXT = {"help_option_names": ["-h", "--help"]}
"""Settings of every command."""


class Device(str, Enum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


DeviceOption = Annotated[Device, typer.Option(help="Where to run; auto is CUDA if available.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few repeats: for a look, not for figures.")]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which no new measurement starts; the rest is recorded as skipped.",
        show_default="none",
        min=0,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue the record at --out; rows that it has are kept."),
]


def app() -> typer.Typer:
    """A command's application, which is given ``CONTEXT``, too."""
    return typer.Typer(add_completion=False, rich_markup_mode=None)


def pick(names: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    """The named ones, in the order of ``known``; all of them if none are named.

    Raises:
        typer.BadParameter: a name is unknown; the message lists the known ones.
    """
    names = names or []
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"expected {what} among {', '.join(known)}, got {', '.join(unknown)}"
        )
    return [name for name in known if name in names] if names else list(known)


def pick_device(device: Device) -> torch.device:
    """The device to run on.

    Raises:
        typer.BadParameter: there is no CUDA device, and one was asked for.
    """
    has_cuda = torch.cuda.is_available()
    if device is Device.cuda and not has_cuda:
        raise typer.BadParameter(
            "expected a CUDA device for --device cuda, got none; use --device cpu"
        )
    on_cuda = has_cuda and device is not Device.cpu
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def parse_heads(text: str) -> tuple[int, int]:
    """``"32/8"`` -> ``(32, 8)``.

    Raises:
        typer.BadParameter: not two positive integers, the second a divisor of the first.
    """
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdigit() and int(part) > 0 for part in parts):
        num_heads, num_kv_heads = map(int, parts)
        if num_heads % num_kv_heads == 0:
            return num_heads, num_kv_heads
    raise typer.BadParameter(
        f"expected heads as 32/8, key/value heads dividing heads, got {text!r}"
    )


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn what is raised about arguments into wrong usage, exit status 2."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error

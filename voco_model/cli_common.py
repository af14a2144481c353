"""What the commands of ``voco`` share. Imports nothing heavy, so that help and errors are fast."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

# The extra that installs a package, by the name under which the package is imported.
EXTRAS = {
    "accelerate": "train",
    "av": "video",
    "datasets": "train",
    "deepspeed": "deepspeed",
    "filelock": "train",
    "fsspec": "objects",
    "liger_kernel": "liger",
    "lmms_eval": "eval",
    "matplotlib": "miniature",
    "peft": "train",
    "pydantic": "train",
    "redis": "redis",
    "sentencepiece": "convert",
    "sklearn": "miniature",
    "yaml": "train",
}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class _PlainFlags:
    """Help that shows a flag as ``--flag``; Typer would write ``--flag <bool>``."""

    def get_params(self, ctx):
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    pass


class Group(_PlainFlags, TyperGroup):
    pass


def fail(message: str) -> NoReturn:
    """Ends the command with a message and exit status 2."""
    print(message, file=sys.stderr)
    raise typer.Exit(2)


@contextmanager
def reported_errors(*more: type[Exception], options: Sequence[str] = ()) -> Iterator[None]:
    """Ends the command with an error's message alone; with VOCO_TRACEBACK=1, with its traceback.

    Args:
        more: types of errors to report beside ValueError, TypeError, OSError and ImportError.
        options: arguments of the Python call whose names a message may hold; the command's options are
            shown instead, --num-voco for num_voco.
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError
        raise
    except (ValueError, TypeError, OSError, ImportError, *more) as error:
        if os.environ.get("VOCO_TRACEBACK"):
            raise
        message = _message(error)
        for name in options:
            # Not in a path, nor in the name of a tensor.
            message = re.sub(
                rf"(?<![\w./-]){name}(?![\w./])", f"--{name.replace('_', '-')}", message
            )
        fail(message)


def _message(error: Exception) -> str:
    # Set by a failed import; an ImportError that we raise has no name, and says what is needed for what.
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ImportError) or package not in EXTRAS:
        return str(error) or type(error).__name__
    return (
        f"{package} is not installed, or can't be imported ({error}); "
        f"pip install 'voco-kernels[{EXTRAS[package]}]'"
    )


def _check_device_name(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"expected cpu, cuda or cuda:N, got {name!r}")
    return name


Device = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda|cuda:N",
        callback=_check_device_name,
        help="Where to run; by default a GPU if there is one, otherwise the CPU.",
    ),
]


def check_device(name: str | None) -> str | None:
    """The name, once it is clear that the machine has such a device.

    Raises:
        ValueError: a GPU that PyTorch can't see.
    """
    if name not in (None, "cpu"):
        import torch

        count = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise ValueError(
                f"expected a device of this machine, got --device {name}, and PyTorch sees {count} "
                "GPUs; use --device cpu, or leave it out"
            )
    return name


def check_file(path: Path, what: str) -> None:
    """Checks that a file is there.

    Raises:
        FileNotFoundError, IsADirectoryError: it isn't.
    """
    if path.is_dir():
        raise IsADirectoryError(f"expected {what}, got the folder {path}")
    if not path.is_file():
        raise FileNotFoundError(f"expected {what}, got {path}, which does not exist")


def check_checkpoint(path: str) -> None:
    """Checks that a path is the folder of a checkpoint, or could be a name on the Hugging Face Hub.

    Raises:
        ValueError, OSError: it is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return
        inside = sorted(file.parent for file in folder.glob("*/config.json"))
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise ValueError(
            f"expected the folder of a checkpoint, got {path}, which has no config.json{hint}"
        )
    if folder.exists():
        raise NotADirectoryError(f"expected the folder of a checkpoint, got the file {path}")
    if not _HUB_NAME.fullmatch(path):
        raise FileNotFoundError(
            f"expected the folder of a checkpoint, or its name on the Hugging Face Hub, got {path}; "
            "there is no such folder"
        )

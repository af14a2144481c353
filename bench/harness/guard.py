"""Turns what a measurement raised into the status and reason of its row."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


class NotMeasuredError(Exception):
    """Why this machine can't time something: its row is "unsupported"."""


class WrongError(RuntimeError):
    """A result that isn't what it should be: its row is "red" and carries no time."""


class DeviceLostError(RuntimeError):
    """A kernel broke the CUDA context: nothing more can run in this process."""


def outcome(function: Callable[[], dict], *, out_of_memory: str = "failed") -> dict:
    """What ``function`` returns, its status "ok" unless it says otherwise; or why there is nothing.

    Args:
        out_of_memory: the status if it runs out of memory: "failed", or "unsupported" where not to
            fit is no fault.
    """
    try:
        return {"status": "ok", **function()}
    except NotMeasuredError as error:
        return {"status": "unsupported", "reason": str(error)}
    except WrongError as error:
        return {"status": "red", "reason": f"{error}; not timed"}
    except Exception as error:  # anything may break in its own way: the row says how
        reason = first_line(error)
        if ran_out_of_memory(error) and out_of_memory == "unsupported":
            return {"status": "unsupported", "reason": f"does not fit: {reason}"}
        return {"status": "failed", "reason": reason}


def ran_out_of_memory(error: Exception) -> bool:
    """Whether memory was what was missing, also where the engine reports that for a request."""
    memory_errors = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, memory_errors) or getattr(error, "reason", "") == "memory"


def check_device(device: torch.device, what: str, row: dict) -> None:
    """See that a failed row has left the device usable, and free what it held there.

    Args:
        what: the row in words.

    Raises:
        DeviceLostError: CUDA can't be used any more in this process.
    """
    if device.type != "cuda" or row["status"] != "failed":
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLostError(f"{what} broke the CUDA context: {row['reason']}") from error


def first_line(error: BaseException, limit: int = 300) -> str:
    """An exception as one line: its type, and its message up to ``limit`` characters."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:limit]

"""Progress of a run, as a bar or as lines of JSON: loss, throughput, padding, skipped samples."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from voco_model.data.collate import BatchStats
from voco_model.data.faults import DataError, FaultLog, FaultPolicy
from voco_model.train.flops import WorkPerBatch

_LEAST_BAR = 10  # characters; what doesn't fit beside them is left out
_GAPS_AND_TIME = 12  # three gaps between columns, and the remaining time


class Meter(TrainerCallback):
    """Counts what the micro-batches of all ranks hold, logs it, and shows it on rank 0.

    Adds to the Trainer's logs ``tokens_per_second`` (real tokens, over all ranks), ``padding`` (share of
    the computed tokens), ``useful_tflops`` (mean over ranks) and ``samples`` (since the run began,
    resumes included). On a terminal they are shown beside a bar; elsewhere each log is a line of JSON on
    stdout, with ``step``, ``steps`` and ``eta``.

    Args:
        policy: what to do about faults that only training finds.
        faults: where the samples with faults are written.
        samples: number of samples before the checkpoint that the run resumes from.
        bar: whether to draw a bar.
    """

    def __init__(
        self, work: WorkPerBatch, policy: FaultPolicy, faults: FaultLog, *, samples: int, bar: bool
    ) -> None:
        self._work, self._policy, self._log, self._bar = work, policy, faults, bar
        self._now = BatchStats()
        self._samples = samples
        self._since = self._began = time.perf_counter()
        self._first_step = 0
        self._progress: Progress | None = None
        self._console = Console(stderr=True)

    def add(self, stats: BatchStats) -> None:
        """Count a micro-batch.

        Raises:
            DataError: a fault that the policy calls fatal; worker processes pass all of them on.
        """
        for fault in self._log.add(stats.faults):
            if self._policy[fault.kind] == "fatal":
                raise DataError(fault.kind, fault.where, fault.message)
            self._console.print(f"skipped or cut: {fault}", markup=False, highlight=False)
        stats.faults = []
        self._now.add(stats)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        # Non-reentrant checkpointing needs no gradients of its inputs. With them, backward would run
        # through the frozen vision tower for nothing.
        if not any(p.requires_grad for n, p in model.named_parameters() if "vision_tower" in n):
            _without_input_gradients(model)
        self._since = self._began = time.perf_counter()
        self._first_step = state.global_step
        self._bar = self._bar and state.is_world_process_zero
        if self._bar:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._progress.add_task(
                _step_of(state), total=state.max_steps, completed=state.global_step, said=""
            )
            self._progress.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=state.global_step, description=_step_of(state)
            )

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if self._progress is None:
            print(json.dumps(self._line(state, logs)), flush=True)
        elif "tokens_per_second" in logs:
            room = self._console.width - len(_step_of(state)) - _LEAST_BAR - _GAPS_AND_TIME
            self._progress.update(self._progress.task_ids[0], said=self._said(logs, room))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def measured(self, device: torch.device) -> dict[str, float]:
        """Throughput since the last call, over all ranks; a collective call."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        stats, self._now = self._now, BatchStats()
        samples, tokens, computed, flops = _summed(
            [stats.samples, stats.tokens, stats.computed, self._work(stats)], device
        )
        self._samples += int(samples)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "padding": round(1 - tokens / max(computed, 1), 4),
            "useful_tflops": round(flops / seconds / ranks / 1e12, 3),
            "samples": self._samples,
        }

    def samples(self, device: torch.device) -> int:
        """Samples of all ranks so far, also those not logged yet; a collective call."""
        return self._samples + int(_summed([self._now.samples], device)[0])

    @property
    def left_out(self) -> dict[str, int]:
        """Number of samples of this rank that were skipped or cut, by kind of fault."""
        return dict(self._log.counts)

    def _line(self, state, logs: dict[str, Any]) -> dict[str, Any]:
        """A log as written to a file or pipe, with the place in the run in front."""
        place: dict[str, Any] = {"step": state.global_step, "steps": state.max_steps}
        done = state.global_step - self._first_step
        if done > 0:
            per_step = (time.perf_counter() - self._began) / done
            left = round(per_step * (state.max_steps - state.global_step))
            place["eta"] = str(timedelta(seconds=left))
        rounded = {n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in logs.items()}
        return place | rounded

    def _said(self, logs: dict[str, Any], room: int) -> str:
        """As many of the numbers as fit into ``room`` characters, the most wanted first."""
        texts = [f"loss {logs['loss']:.4f}", f"{logs['tokens_per_second']:,.0f} tokens/s"]
        if self._log.counts:
            texts.append(f"{self._log.counts.total()} skipped or cut")
        texts.append(f"padding {logs['padding']:.1%}")
        texts.append(f"{logs['useful_tflops']:.1f} TFLOP/s per GPU")
        said = ""
        for text in texts:
            longer = f"{said}  {text}" if said else text
            if len(longer) <= room:
                said = longer
        return said


def _step_of(state) -> str:
    return f"step {state.global_step}/{state.max_steps}"


def _summed(numbers: list[float], device: torch.device) -> list[float]:
    """Each number summed over the ranks; a collective call."""
    counts = torch.tensor(numbers, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts.tolist()


def _without_input_gradients(model) -> None:
    for module in model.modules():
        if hasattr(module, "disable_input_require_grads") and hasattr(
            module, "_require_grads_hooks"
        ):
            module.disable_input_require_grads()

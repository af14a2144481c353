"""What a run does at the moment: tokens a second, share of padding, useful TFLOP/s, samples left out."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from voco_model.data.collate import BatchStats
from voco_model.data.faults import DataError, FaultLog, FaultPolicy
from voco_model.train.flops import WorkPerBatch


class Meter(TrainerCallback):
    """Counts what the micro-batches of all ranks hold, logs it, and draws a bar on rank 0.

    Adds to the Trainer's logs ``tokens_per_second`` (real tokens, over all ranks), ``padding`` (share of
    the computed ones that are none), ``useful_tflops`` (of one rank, in the mean), ``samples`` (so far).

    Args:
        policy: of faults.
        faults: file for the samples that were left out; each rank has one of its own.
    """

    def __init__(self, work: WorkPerBatch, policy: FaultPolicy, faults: Path, *, bar: bool) -> None:
        self._work, self._policy, self._bar = work, policy, bar
        self._log = FaultLog(faults)
        self._now = BatchStats()
        self._samples = 0
        self._since = time.perf_counter()
        self._progress: Progress | None = None
        self._console = Console(stderr=True)

    def add(self, stats: BatchStats) -> None:
        """Raises ``DataError`` for a fault that is fatal; workers hand all of them on."""
        for fault in self._log.add(stats.faults):
            if self._policy[fault.kind] == "fatal":
                raise DataError(fault.kind, fault.where, fault.message)
            self._console.print(f"left out or cut: {fault}", markup=False, highlight=False)
        stats.faults = []
        self._now.add(stats)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        # Checkpointing without re-entering needs no gradient of its inputs; with one, the frozen vision
        # tower would be gone through backwards, for nothing.
        if not any(p.requires_grad for n, p in model.named_parameters() if "vision_tower" in n):
            _without_input_gradients(model)
        self._since = time.perf_counter()
        if self._bar:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.add_task("", total=state.max_steps, completed=state.global_step, said="")
            self._progress.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=state.global_step)

    def measured(self, device: torch.device) -> dict[str, float]:
        """Since it was last asked; a collective call, where there are several ranks."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        stats, self._now = self._now, BatchStats()
        flops = self._work(stats)
        counts = torch.tensor(
            [stats.samples, stats.tokens, stats.computed, flops], dtype=torch.float64, device=device
        )
        ranks = 1
        if dist.is_initialized():
            dist.all_reduce(counts)
            ranks = dist.get_world_size()
        samples, tokens, computed, flops = counts.tolist()
        self._samples += int(samples)
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "padding": round(1 - tokens / max(computed, 1), 4),
            "useful_tflops": round(flops / seconds / ranks / 1e12, 3),
            "samples": self._samples,
        }

    def show(self, logs: dict) -> None:
        if self._progress is None or "tokens_per_second" not in logs:
            return
        said = (
            f"loss {logs.get('loss', float('nan')):.4f}  {logs['tokens_per_second']:,.0f} tokens/s  "
            f"padding {logs['padding']:.1%}  {logs['useful_tflops']:.1f} TFLOP/s a GPU"
        )
        if self._log.counts:
            said += f"  left out or cut {self._log.counts.total()}"
        self._progress.update(self._progress.task_ids[0], said=said)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @property
    def left_out(self) -> dict[str, int]:
        return dict(self._log.counts)


def _without_input_gradients(model) -> None:
    for module in model.modules():
        if hasattr(module, "disable_input_require_grads") and hasattr(
            module, "_require_grads_hooks"
        ):
            module.disable_input_require_grads()

"""A whole run of bench/train.py: checks, then steps, method by method, into one record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench.harness import clock
from bench.harness.run import Runner
from bench.training import methods as train_methods
from bench.training import steps as train_steps
from bench.training.data import Batch, Distribution, Sample, draw, padding_share
from bench.training.methods import QFormerLlava
from bench.training.report import FAMILY, METHODS
from bench.training.steps import Trainer, say

Q_FORMER = "q-former"


@dataclass(kw_only=True)
class TrainingRunner(Runner):
    """Fills the one case of the record.

    Attributes:
        names: methods, in the order of the tables.
        model: a LLaVA in training mode; the Q-Former takes over its parts at the end.
        batches: see ``steps.batches``.
        rows: of the methods, by name.
    """

    family = FAMILY
    out_of_memory = "unsupported"
    dtype: torch.dtype
    names: Sequence[str]
    model: torch.nn.Module
    batches: dict[str, Batch]
    num_voco: int
    steps: int
    warmup: int
    small: bool
    rows: dict[str, dict] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {name: empty_row(name) for name in self.names}

    def fill(self) -> None:
        methods = train_methods.masked_methods(self.num_voco)
        chosen = {name: methods[name] for name in self.names if name in methods}
        self._check(chosen)
        runs = {
            name: (method.attached, method.forward, train_steps.batch_of(method, self.batches))
            for name, method in chosen.items()
            if self.rows[name]["status"] == "ok"
        }
        if runs:
            self._time(self.model, runs, train_steps.useful_flops)
        if Q_FORMER in self.rows:
            self._q_former()

    def _check(self, methods: dict) -> None:
        """Sets the status of each row, and its ``check``, from what a small model and this one say."""
        small = {}
        if methods and not self.spent():
            present = [n for n, method in methods.items() if method.missing(self.device) is None]
            small = train_steps.small_check(present, self.device, self.num_voco)
        reference = None
        for name, method in methods.items():
            row = self.rows[name]
            missing = method.missing(self.device)
            if missing:
                self._drop(name, "unsupported", missing)
                continue
            if self.spent():
                self._drop(name, "skipped", self.spent())
                continue
            row["check_small"] = small[name]
            if small[name]["reason"]:
                self._drop(name, "red", f"on a small model: {small[name]['reason']}; not timed")
                continue

            def run(method=method) -> object:
                return method.forward(self.model, train_steps.batch_of(method, self.batches))

            def look(method=method, run=run) -> dict:
                with method.attached(self.model):
                    return {"check": train_steps.loss_and_norm(self.model, run)}

            looked = self._attempt(name, look)
            if looked is None:
                continue
            found = looked["check"]
            reference = reference or found
            row["check"] = train_steps.compare(found, reference, self.dtype)
            if row["check"]["reason"]:
                self._drop(name, "red", f"{row['check']['reason']}; not timed")
            else:
                say(f"{name}: loss {found['loss']:.6f}, gradients {found['gradient_norm']:.4f}")

    def _q_former(self) -> None:
        if self.spent():
            self._drop(Q_FORMER, "skipped", self.spent())
            return
        train_methods.free(self.device)
        batch = self.batches["query"]

        def prepare() -> dict:
            model = QFormerLlava(self.model, self.num_voco, small=self.small).train()
            model.llava.model.vision_tower.eval()
            check = train_steps.loss_and_norm(model, lambda: model(batch))
            return {"model": model, "check": check}

        made = self._attempt(Q_FORMER, prepare)
        if made is None:
            return
        model, found = made["model"], made["check"]
        self.rows[Q_FORMER]["check"] = {**found, "reason": ""}
        if not (math.isfinite(found["loss"]) and math.isfinite(found["gradient_norm"])):
            self._drop(Q_FORMER, "red", "loss or gradients are not finite; not timed")
            return
        say(f"{Q_FORMER}: loss {found['loss']:.6f}, gradients {found['gradient_norm']:.4f}")
        attached = train_methods.nothing
        runs = {Q_FORMER: (attached, lambda model, batch: model(batch), batch)}
        self._time(model, runs, train_steps.q_former_flops)

    def _time(self, model: torch.nn.Module, runs: dict, flops: Callable) -> None:
        """On a CPU in rounds of one step each: what is compared is measured at about the same moment. On
        CUDA one method after another, so that none starts with memory fragmented by another."""
        trainer = Trainer(model, self.device)
        groups = [runs]
        if self.device.type == "cuda":
            groups = [{name: run} for name, run in runs.items()]
        for group in groups:
            if self.spent():
                for name in group:
                    self._drop(name, "skipped", self.spent())
                continue
            train_methods.free(self.device)
            self._rounds(trainer, group, flops)

    def _rounds(self, trainer: Trainer, runs: dict, flops: Callable) -> None:
        model = trainer.model
        times: dict[str, list[float]] = {name: [] for name in runs}
        peaks: dict[str, list[int]] = {name: [] for name in runs}
        for turn in range(self.warmup + self.steps):
            if turn > self.warmup and self.spent():
                break
            for name, (attached, forward, batch) in list(runs.items()):

                def step(attached=attached, forward=forward, batch=batch) -> dict:
                    with attached(model):
                        milliseconds, peak = trainer.step(lambda: forward(model, batch))
                    return {"milliseconds": milliseconds, "peak": peak}

                taken = self._attempt(name, step)
                if taken is None:
                    del runs[name]
                    model.zero_grad(set_to_none=True)
                elif turn >= self.warmup:
                    times[name].append(taken["milliseconds"])
                    peaks[name].append(taken["peak"])
                    say(f"{name}: step {len(times[name])} in {1e-3 * times[name][-1]:.4g} s")
            for name, (_, _, batch) in runs.items():
                if times[name]:
                    self._timed(name, times[name], peaks[name], batch, flops(model, batch))
            self.write()

    def _timed(
        self, name: str, times: list[float], peaks: list[int | None], batch: Batch, flops: int
    ) -> None:
        row = self.rows[name]
        row.pop("reason", None)
        row["status"] = "ok"
        low, middle, high = clock.quantiles(times)
        row["timing"] = clock.Timing(low, middle, high, len(times)).to_json()
        row["tflops"] = clock.tflops(flops, middle)
        row["flops"] = flops
        row["tokens"], row["labels"], row["padding"] = batch.tokens, batch.labelled, batch.padding
        row["shape"] = list(batch.input_ids.shape)
        row["tokens_per_s"] = 1e3 * batch.tokens / middle
        row["peak_bytes"] = None if None in peaks else max(peaks)

    def _attempt(self, name: str, function: Callable[[], dict]) -> dict | None:
        """What ``function`` returns; None where it raised, which the row then says."""
        found = self.attempt(function)
        if found["status"] == "ok":
            return found
        self._drop(name, found["status"], found["reason"])
        train_methods.free(self.device)
        return None

    def _drop(self, name: str, status: str, reason: str) -> None:
        row = self.rows[name]
        row |= {"status": status, "reason": reason}
        for key in ("timing", "tflops"):
            row.pop(key, None)
        say(f"{name}: {status}: {reason}")
        self.write()

    def write(self) -> None:
        """A row that was not reached yet is one that was skipped, in what is written."""
        rows = []
        for row in self.rows.values():
            waiting = row["status"] == "ok" and "timing" not in row
            rows.append(row | {"status": "skipped", "reason": "not reached"} if waiting else row)
        self.record["cases"][0]["rows"] = rows
        super().write()


def empty_row(name: str) -> dict:
    """A method's row before it was checked and timed."""
    return {"name": name, "title": METHODS[name], "packed": name == "packed", "status": "ok"}


def drawn(config, distribution: Distribution, count: int, num_voco: int, seed: int) -> list[Sample]:
    """The samples of a step."""
    return draw(
        distribution,
        count,
        prefix=config.image_seq_length + num_voco,
        first_special_id=config.image_token_id,
        seed=seed,
    )


def default_layers(
    config, samples: Sequence[Sample], num_voco: int, device: torch.device, *, checkpointing: bool
) -> int:
    """As many layers as the free memory of a GPU holds; 1 on a CPU."""
    if device.type == "cpu":
        return 1
    prefix = config.image_seq_length + num_voco
    longest = max(len(sample.text) + prefix * sample.image for sample in samples)
    return train_methods.layers_that_fit(
        torch.cuda.mem_get_info(device)[0], len(samples) * longest, checkpointing=checkpointing
    )


def case_of(title: str, model, samples: Sequence[Sample], num_voco: int) -> dict:
    """The record's case, still without rows."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    prefix = model.config.image_seq_length + num_voco
    lengths = [len(sample.text) + prefix * sample.image for sample in samples]
    return {
        "model": "llava",
        "title": title,
        "layers": model.config.text_config.num_hidden_layers,
        "trained_parameters": trained,
        "samples": len(samples),
        "images": sum(sample.image for sample in samples),
        "texts": [len(sample.text) for sample in samples],
        "vision_tokens": model.config.image_seq_length,
        "padding": padding_share(lengths),
        "rows": [],
    }

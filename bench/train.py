"""One training step of a LLaVA-1.5 under the VoCo mask, in four ways, and of a Q-Former beside them.

    python bench/train.py                               # true 7B layers, as many as fit; one on a CPU
    python bench/train.py --layers 4 --checkpointing --samples 32
    python bench/train.py --small --device cpu          # a small model: a look, no figures

Forward, backward and AdamW on the same samples (bench/train_data.py says how they are drawn): with a
dense mask, with FlexAttention, with ``masked_attention`` on padded rows and on one packed row, and with
the Q-Former of the paper's Table 5. Losses and gradients are compared before anything is timed. Tables
go to stdout, progress to stderr, a JSON record to ``--out``.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import torch
import typer

from bench.attn import EXIT_RED, Device, pick, pick_device
from bench.harness import clock as timing
from bench.harness import records
from bench.training import methods as train_methods
from bench.training import report as train_report
from bench.training import steps as train_runs
from bench.training.data import Batch, Distribution, Sample, draw, padding_share
from bench.training.methods import QFormerLlava
from bench.training.report import METHODS
from bench.training.steps import Trainer, say

MEASURED = (*timing.SOURCES, "voco_model")
"""Folders of the code that is timed."""

Q_FORMER = "q-former"
SAMPLES = {"cuda": 16, "cpu": 4}
STEPS = {"cuda": 10, "cpu": 3}
WARMUP = {"cuda": 2, "cpu": 0}
"""Behind the check, which has run forward and backward once already."""


@dataclass
class Runner:
    """Fills the one case of the record; it is written to ``out`` after each row and each round.

    Attributes:
        model: a LLaVA in training mode; the Q-Former takes its parts in the end.
        batches: see ``train_runs.batches``.
        budget: seconds after which no row and no round starts; None for no limit.
    """

    record: dict
    out: Path
    device: torch.device
    dtype: torch.dtype
    model: torch.nn.Module
    batches: dict[str, Batch]
    num_voco: int
    steps: int
    warmup: int
    budget: float | None
    small: bool
    started: float = field(default_factory=time.monotonic)

    def run(self, names: Sequence[str]) -> None:
        self.rows = {name: empty_row(name) for name in names}
        self.record["cases"][0]["rows"] = list(self.rows.values())
        methods = train_methods.masked_methods(self.num_voco)
        chosen = {name: methods[name] for name in names if name in methods}
        self._check(chosen)
        runs = {
            name: (method.attached, method.forward, train_runs.batch_of(method, self.batches))
            for name, method in chosen.items()
            if self.rows[name]["status"] == "ok"
        }
        if runs:
            self._time(self.model, runs, train_runs.useful_flops)
        if Q_FORMER in self.rows:
            self._q_former()
        self.record["finished"] = True
        self._write()

    def _check(self, methods: dict) -> None:
        """Sets the status of each row, and its ``check``, from what a small model and this one say."""
        small = {}
        if methods and not self._spent():
            present = [n for n, method in methods.items() if method.missing(self.device) is None]
            small = train_runs.small_check(present, self.device, self.num_voco)
        reference = None
        for name, method in methods.items():
            row = self.rows[name]
            missing = method.missing(self.device)
            if missing:
                self._drop(name, "unsupported", missing)
                continue
            if self._spent():
                self._drop(name, "skipped", self._spent())
                continue
            row["check_small"] = small[name]
            if small[name]["reason"]:
                self._drop(name, "red", f"on a small model: {small[name]['reason']}; not timed")
                continue

            def run(method=method) -> object:
                return method.forward(self.model, train_runs.batch_of(method, self.batches))

            def look(method=method, run=run) -> dict:
                with method.attached(self.model):
                    return train_runs.loss_and_norm(self.model, run)

            found = self._attempt(name, look)
            if found is None:
                continue
            reference = reference or found
            row["check"] = train_runs.compare(found, reference, self.dtype)
            if row["check"]["reason"]:
                self._drop(name, "red", f"{row['check']['reason']}; not timed")
            else:
                say(f"{name}: loss {found['loss']:.6f}, gradients {found['gradient_norm']:.4f}")

    def _q_former(self) -> None:
        if self._spent():
            self._drop(Q_FORMER, "skipped", self._spent())
            return
        train_methods.free(self.device)
        batch = self.batches["query"]

        def prepare() -> tuple[QFormerLlava, dict]:
            model = QFormerLlava(self.model, self.num_voco, small=self.small).train()
            model.llava.model.vision_tower.eval()
            return model, train_runs.loss_and_norm(model, lambda: model(batch))

        made = self._attempt(Q_FORMER, prepare)
        if made is None:
            return
        model, found = made
        self.rows[Q_FORMER]["check"] = {**found, "reason": ""}
        if not (math.isfinite(found["loss"]) and math.isfinite(found["gradient_norm"])):
            self._drop(Q_FORMER, "red", "loss or gradients are not finite; not timed")
            return
        say(f"{Q_FORMER}: loss {found['loss']:.6f}, gradients {found['gradient_norm']:.4f}")
        attached = train_methods.nothing
        runs = {Q_FORMER: (attached, lambda model, batch: model(batch), batch)}
        self._time(model, runs, train_runs.q_former_flops)

    def _time(self, model: torch.nn.Module, runs: dict, flops: Callable) -> None:
        """On a CPU in rounds of one step each: what is compared is measured at about the same moment. On
        CUDA one method behind another, so that none finds the memory as another has left it."""
        trainer = Trainer(model, self.device)
        groups = [runs]
        if self.device.type == "cuda":
            groups = [{name: run} for name, run in runs.items()]
        for group in groups:
            if self._spent():
                for name in group:
                    self._drop(name, "skipped", self._spent())
                continue
            train_methods.free(self.device)
            self._rounds(trainer, group, flops)

    def _rounds(self, trainer: Trainer, runs: dict, flops: Callable) -> None:
        model = trainer.model
        times: dict[str, list[float]] = {name: [] for name in runs}
        peaks: dict[str, list[int]] = {name: [] for name in runs}
        for turn in range(self.warmup + self.steps):
            if turn > self.warmup and self._spent():
                break
            for name, (attached, forward, batch) in list(runs.items()):

                def step(attached=attached, forward=forward, batch=batch) -> tuple:
                    with attached(model):
                        return trainer.step(lambda: forward(model, batch))

                taken = self._attempt(name, step)
                if taken is None:
                    del runs[name]
                    model.zero_grad(set_to_none=True)
                elif turn >= self.warmup:
                    times[name].append(taken[0])
                    peaks[name].append(taken[1])
                    say(f"{name}: step {len(times[name])} in {1e-3 * taken[0]:.4g} s")
            for name, (_, _, batch) in runs.items():
                if times[name]:
                    self._timed(name, times[name], peaks[name], batch, flops(model, batch))
            self._write()

    def _timed(
        self, name: str, times: list[float], peaks: list[int | None], batch: Batch, flops: int
    ) -> None:
        row = self.rows[name]
        row.pop("reason", None)
        row["status"] = "ok"
        low, middle, high = timing.quantiles(times)
        row["timing"] = timing.Timing(low, middle, high, len(times)).to_json()
        row["tflops"] = timing.tflops(flops, middle)
        row["flops"] = flops
        row["tokens"], row["labels"], row["padding"] = batch.tokens, batch.labelled, batch.padding
        row["shape"] = list(batch.input_ids.shape)
        row["tokens_per_s"] = 1e3 * batch.tokens / middle
        row["peak_bytes"] = None if None in peaks else max(peaks)

    def _attempt(self, name: str, function: Callable[[], object]) -> object | None:
        """What it returns; None where it raised, which the row then says."""
        try:
            return function()
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._drop(name, "unsupported", f"does not fit: {timing.first_line(error)}")
        except Exception as error:  # whatever is raised becomes the row's reason
            self._drop(name, "failed", timing.first_line(error))
        train_methods.free(self.device)
        return None

    def _drop(self, name: str, status: str, reason: str) -> None:
        row = self.rows[name]
        row |= {"status": status, "reason": reason}
        for key in ("timing", "tflops"):
            row.pop(key, None)
        say(f"{name}: {status}: {reason}")
        self._write()

    def _spent(self) -> str:
        if self.budget is None or time.monotonic() - self.started <= self.budget:
            return ""
        return f"the budget of {self.budget:g} s was spent"

    def _write(self) -> None:
        """A row that nobody has come to yet is one that was skipped."""
        rows = []
        for row in self.rows.values():
            waiting = row["status"] == "ok" and "timing" not in row
            rows.append(row | {"status": "skipped", "reason": "not reached"} if waiting else row)
        self.record["cases"][0]["rows"] = rows
        records.write(self.record, self.out)


def empty_row(name: str) -> dict:
    return {"name": name, "title": METHODS[name], "packed": name == "packed", "status": "ok"}


def drawn(config, distribution: Distribution, count: int, num_voco: int, seed: int) -> list[Sample]:
    return draw(
        distribution,
        count,
        prefix=config.image_seq_length + num_voco,
        first_special_id=config.image_token_id,
        seed=seed,
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


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--methods", help=f"Among {', '.join(METHODS)}; repeat for more.", show_default="all"
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Of the language model, of 32.", show_default="as fit; 1 on a CPU", min=1, max=32
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Of a step.", show_default="16; 4 on a CPU", min=1)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="That are timed.", show_default="10; 3 on a CPU", min=1)
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Steps before, beside the check's forward and backward pass.",
            show_default="2; 0 on a CPU",
            min=0,
        ),
    ] = None,
    num_voco: Annotated[
        int, typer.Option(help="VoCo tokens an image; queries of the Q-Former.", min=1)
    ] = 1,
    text_only: Annotated[
        float, typer.Option(help="Share of samples without an image.", min=0, max=1)
    ] = Distribution.text_only,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing, for all methods.")
    ] = False,
    device: Annotated[Device, typer.Option(help="auto is CUDA if any.")] = Device.auto,
    small: Annotated[
        bool, typer.Option("--small", help="A small model and short texts: a look, no figures.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The JSON record.")] = Path("bench-output/train.json"),
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which no method and no round starts; each timed method has a step.",
            show_default="none",
            min=0,
        ),
    ] = None,
) -> None:
    """Compare losses and gradients of all methods, then time their steps.

    Exit status: 0; 1 if a loss or a gradient was wrong, or a method failed; 2 wrong usage.
    """
    started = time.monotonic()
    torch_device = pick_device(device)
    on_gpu = torch_device.type == "cuda"
    names = pick(method or [], list(METHODS), "methods") if method else list(METHODS)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    distribution = train_runs.SMALL_TEXTS if small else Distribution()
    distribution = replace(distribution, text_only=text_only)
    count = samples or SAMPLES[torch_device.type]
    spec = train_methods.SMALL if small else train_methods.LARGE
    config = train_methods.config_of(spec)
    chosen = drawn(config, distribution, count, num_voco, seed)
    if small:
        layers = config.text_config.num_hidden_layers
    elif layers is None:
        prefix = config.image_seq_length + num_voco
        longest = max(len(sample.text) + prefix * sample.image for sample in chosen)
        layers = 1
        if on_gpu:
            layers = train_methods.layers_that_fit(
                torch.cuda.mem_get_info(torch_device)[0],
                count * longest,
                checkpointing=checkpointing,
            )
    title = spec.title if small else f"{spec.title}, {layers} of 32 layers"
    effort = (timing.QUICK if small else timing.FULL)[torch_device.type]
    record = {
        "schema": records.SCHEMA,
        "bench": "train",
        "finished": False,
        "environment": timing.environment(torch_device, MEASURED),
        "settings": {
            "methods": names,
            "dtype": "bf16" if on_gpu else "fp32",
            "optimizer": "AdamW, fp32 moments" + (" and fp32 copies of the weights" * on_gpu),
            "samples": count,
            "steps": steps or STEPS[torch_device.type],
            "warmup": WARMUP[torch_device.type] if warmup is None else warmup,
            "num_voco": num_voco,
            "checkpointing": checkpointing,
            "distribution": distribution.to_json(),
            "batch": "the one of median padding among 999",
            "seed": seed,
            "peak_memory": train_runs.PeakMemory(torch_device).what,
            "weights": "random",
            "quick": small,
        },
        "ceilings": timing.ceilings(torch_device, dtype, effort),
        "cases": [],
    }
    train_methods.free(torch_device)
    records.write(record, out)
    say(f"{title}: {count} samples, {', '.join(names)}")
    try:
        model = train_methods.build(spec, layers, torch_device, dtype, checkpointing=checkpointing)
    except (torch.OutOfMemoryError, MemoryError) as error:
        say(f"{title} does not fit: {timing.first_line(error)}")
        raise typer.Exit(EXIT_RED) from error
    record["cases"].append(case_of(title, model, chosen, num_voco))
    runner = Runner(
        record=record,
        out=out,
        device=torch_device,
        dtype=dtype,
        model=model,
        batches=train_runs.batches(config, chosen, num_voco, torch_device, dtype),
        num_voco=num_voco,
        steps=record["settings"]["steps"],
        warmup=record["settings"]["warmup"],
        budget=budget,
        small=small,
        started=started,
    )
    runner.run(names)
    print(train_report.show(record))
    print(f"wrote {out}")
    wrong = records.train_failures(record)
    for line in wrong:
        print(f"RED {line}", file=sys.stderr)
    if wrong:
        raise typer.Exit(EXIT_RED)


if __name__ == "__main__":
    app()

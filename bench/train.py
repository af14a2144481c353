"""Time of a training step of LLaVA-1.5 under the VoCo mask, in four ways, and of a Q-Former.

    python bench/train.py                               # true 7B layers, as many as fit; one on a CPU
    python bench/train.py --layers 4 --checkpointing --samples 32
    python bench/train.py --small --device cpu          # a small model: a look, no figures

Forward, backward and AdamW on the same samples (bench/training/data.py says how they are drawn): with a
dense mask, with FlexAttention, with ``masked_attention`` on padded rows and on one packed row, and with
the Q-Former of the paper's Table 5. Losses and gradients are compared before anything is timed. Tables
go to stdout, progress to stderr, a JSON record to ``--out``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import torch
import typer

from bench.harness import clock, machine, options, run
from bench.harness.guard import first_line
from bench.harness.options import DeviceOption
from bench.training import methods
from bench.training import steps as train_steps
from bench.training.data import Distribution
from bench.training.report import FAMILY, METHODS
from bench.training.run import TrainingRunner, case_of, default_layers, drawn
from bench.training.steps import say

MEASURED = (*machine.SOURCES, "voco_model")
"""Folders whose code is timed."""

SAMPLES = {"cuda": 16, "cpu": 4}
STEPS = {"cuda": 10, "cpu": 3}
WARMUP = {"cuda": 2, "cpu": 0}
"""After the check, which has run forward and backward once already."""

app = options.app()


@app.command(context_settings=options.CONTEXT)
def main(
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            help=f"A method; repeat for more. One of: {', '.join(METHODS)}.",
            show_default="all",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Layers of the language model, out of 32.",
            show_default="as many as fit; 1 on a CPU",
            min=1,
            max=32,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples per step.", show_default="16; 4 on a CPU", min=1)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps to time.", show_default="10; 3 on a CPU", min=1)
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Steps before those, besides the check's forward and backward pass.",
            show_default="2; 0 on a CPU",
            min=0,
        ),
    ] = None,
    num_voco: Annotated[
        int, typer.Option(help="VoCo tokens per image; queries of the Q-Former.", min=1)
    ] = 1,
    text_only: Annotated[
        float, typer.Option(help="Share of samples without an image.", min=0, max=1)
    ] = Distribution.text_only,
    seed: Annotated[int, typer.Option(help="Seed for drawing the samples.")] = 0,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Gradient checkpointing, for all methods.")
    ] = False,
    device: DeviceOption = options.Device.auto,
    small: Annotated[
        bool,
        typer.Option("--small", help="A small model, short texts: for a look, not for figures."),
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

    Exit status: 0; 1 if a loss or a gradient was wrong, or a method failed; 2 for wrong usage.
    """
    started = time.monotonic()
    torch_device = options.pick_device(device)
    on_gpu = torch_device.type == "cuda"
    names = options.pick(method, list(METHODS), "methods")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    distribution = train_steps.SMALL_TEXTS if small else Distribution()
    distribution = replace(distribution, text_only=text_only)
    count = samples or SAMPLES[torch_device.type]
    spec = methods.SMALL if small else methods.LARGE
    config = methods.config_of(spec)
    chosen = drawn(config, distribution, count, num_voco, seed)
    if small:
        layers = config.text_config.num_hidden_layers
    elif layers is None:
        layers = default_layers(config, chosen, num_voco, torch_device, checkpointing=checkpointing)
    title = spec.title if small else f"{spec.title}, {layers} of 32 layers"
    settings = {
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
        "peak_memory": train_steps.PeakMemory(torch_device).what,
        "weights": "random",
        "quick": small,
    }
    effort = (clock.QUICK if small else clock.FULL)[torch_device.type]
    ceilings = machine.ceilings(torch_device, dtype, effort)
    record = run.fresh(FAMILY, torch_device, settings, MEASURED, ceilings=ceilings, cases=[])
    methods.free(torch_device)
    FAMILY.write(record, out)
    say(f"{title}: {count} samples, {', '.join(names)}")
    try:
        model = methods.build(spec, layers, torch_device, dtype, checkpointing=checkpointing)
    except (torch.OutOfMemoryError, MemoryError) as error:
        say(f"{title} does not fit: {first_line(error)}")
        raise typer.Exit(options.EXIT_RED) from error
    record["cases"].append(case_of(title, model, chosen, num_voco))
    runner = TrainingRunner(
        record=record,
        out=out,
        device=torch_device,
        budget=budget,
        started=started,
        dtype=dtype,
        names=names,
        model=model,
        batches=train_steps.batches(config, chosen, num_voco, torch_device, dtype),
        num_voco=num_voco,
        steps=settings["steps"],
        warmup=settings["warmup"],
        small=small,
    )
    run.finish(runner)


if __name__ == "__main__":
    app()

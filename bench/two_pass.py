"""Time to answer questions about images, compressed beforehand or not, against a plain LLaVA.

    python bench/two_pass.py                 # the models of this machine's kind of device
    python bench/two_pass.py --model llava-1.5-7b --num-voco 1 --budget 150
    python bench/two_pass.py --help

The models have their true shapes and random weights, on which the time doesn't depend. Three modes go
through one engine (VoCo tokens cached; all keys and values of an image cached; nothing cached); stock
``generate`` and ``voco_model.generate`` are timed beside them. Answers are compared with those of
``generate`` before anything is timed. Tables go to stdout, progress to stderr, a JSON record and plots
to ``--out``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import torch
import typer

from bench.answering import subject
from bench.answering.models import BRIEF, DEFAULT, SPECS
from bench.answering.report import FAMILY
from bench.answering.run import AnsweringRunner, free, plan
from bench.harness import clock, machine, options, run
from bench.harness.options import Budget, DeviceOption, Quick

MEASURED = (*machine.SOURCES, "voco_model")
"""Folders whose code is timed."""

TEXT_TOKENS = 114
"""The paper's average (supplement, Table 2)."""

NUM_VOCO = (1, 8, 64, 128)
BATCHES = (1, 8)
SHARES = (0.0, 0.5, 0.9)
NEW_TOKENS = 12

app = options.app()


@app.command(context_settings=options.CONTEXT)
def main(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A model; repeat for more. One of: {', '.join(SPECS)}.",
            show_default="on CUDA those of the paper, on a CPU the small ones",
        ),
    ] = None,
    num_voco: Annotated[
        list[int] | None,
        typer.Option(
            help="VoCo tokens per image; repeat for more. Everything is measured with the first.",
            show_default="1, 8, 64, 128",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Requests per batch; repeat for more.", show_default="1, 8"),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of a stream's images that came before; repeat for more.",
            show_default="0, 0.5, 0.9",
        ),
    ] = None,
    streams: Annotated[bool, typer.Option(help="Measure streams of requests, too.")] = True,
    compiled: Annotated[
        bool, typer.Option(help="On CUDA, also measure with layers through torch.compile.")
    ] = True,
    text_tokens: Annotated[int, typer.Option(help="Tokens per question.", min=1)] = TEXT_TOKENS,
    new_tokens: Annotated[int, typer.Option(help="Tokens per answer.", min=2)] = NEW_TOKENS,
    device: DeviceOption = options.Device.auto,
    out: Annotated[
        Path, typer.Option(help="The JSON record; plots are written beside it as .png.")
    ] = Path("bench-output/two-pass.json"),
    quick: Quick = False,
    budget: Budget = None,
) -> None:
    """Compare the answers of the engine's modes with those of generate, then time them all.

    Exit status: 0; 1 if an answer was wrong or a row of ours failed; 2 for wrong usage; 3 if a kernel
    broke the CUDA context.
    """
    torch_device = options.pick_device(device)
    on_gpu = torch_device.type == "cuda"
    names = options.pick(model, list(SPECS), "models") if model else DEFAULT[torch_device.type]
    counts, batches = list(num_voco or NUM_VOCO), sorted(set(batch or BATCHES))
    shares = sorted(set(share or SHARES)) if streams else []
    if min(*counts, *batches) < 1:
        raise typer.BadParameter(
            f"expected --num-voco and --batch >= 1, got {min(*counts, *batches)}"
        )
    if any(not 0 <= each < 1 for each in shares):
        raise typer.BadParameter(f"expected --share from 0 to below 1, got {shares}")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    ceilings_effort = (clock.QUICK if quick else clock.FULL)[torch_device.type]
    settings = {
        "models": list(names),
        "dtype": "bf16" if on_gpu else "fp32",
        "num_voco": counts,
        "batches": batches,
        "shares": shares,
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
        "weights": "random",
        "quick": quick,
    }
    ceilings = machine.ceilings(torch_device, dtype, ceilings_effort)
    record = run.fresh(FAMILY, torch_device, settings, MEASURED, ceilings=ceilings, cases=[])
    free(torch_device)
    steps = plan(
        num_voco=counts,
        batches=batches,
        shares=shares,
        compiled=[True, False] if on_gpu and compiled else [False],
    )
    single = [step for step in steps if step.kind == "answer" and step.batch == batches[0]]
    runner = AnsweringRunner(
        record=record,
        out=out,
        device=torch_device,
        budget=budget,
        dtype=dtype,
        steps={name: single if name in BRIEF and not model else steps for name in names},
        effort=(subject.QUICK if quick else subject.FULL)[torch_device.type],
        ceilings_effort=ceilings_effort,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
    )
    run.finish(runner)


if __name__ == "__main__":
    app()

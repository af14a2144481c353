"""Questions about images, compressed before or not, against a plain LLaVA: by stage, and as a whole.

    python bench/two_pass.py                 # the models of this machine's kind of device
    python bench/two_pass.py --model llava-1.5-7b --num-voco 1 --budget 150
    python bench/two_pass.py --help

True shapes, random weights: the time doesn't depend on them. Three modes go through one engine (VoCo
tokens cached; all keys and values of an image cached; nothing cached), stock ``generate`` and
``voco_model.generate`` stand beside them. Answers are compared with those of ``generate`` before
anything is timed. Tables go to stdout, progress to stderr, a JSON record and plots to ``--out``.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import torch
import typer

from bench.answering import plots as two_pass_plots
from bench.answering import report as two_pass_report
from bench.answering import subject as two_pass_runs
from bench.answering.models import BRIEF, DEFAULT, SPECS
from bench.answering.subject import Effort, References, Subject, WrongError
from bench.attention.measure import DeviceLostError
from bench.attention.run import ProgressReport
from bench.attn import EXIT_DEVICE_LOST, EXIT_RED, Device, pick, pick_device
from bench.harness import clock as timing
from bench.harness import records

MEASURED = (*timing.SOURCES, "voco_model")
"""Folders of the code that is timed."""

TEXT_TOKENS = 114
"""The paper's average (supplement, Table 2)."""

NUM_VOCO = (1, 8, 64, 128)
BATCHES = (1, 8)
SHARES = (0.0, 0.5, 0.9)
NEW_TOKENS = 12
STORE_BYTES = {"cuda": 24 << 30, "cpu": 4 << 30}


@dataclass(frozen=True)
class Step:
    """One row to measure.

    Attributes:
        name: "voco", "full cache", "uncached" (through the engine), "stock generate" or "voco generate".
        kind: "answer" (a batch, stage by stage) or "stream".
        images: "stored", "new" (compressed first) or "read" (each time, by a plain LLaVA).
        num_voco: 0 for a plain LLaVA.
        batch: requests together; of a stream, at most.
        compiled: whether the engine's layers go through ``torch.compile``.
        share: of a stream's images that came before; None of ``generate``, which knows none again.
    """

    name: str
    kind: str
    images: str
    num_voco: int
    batch: int
    compiled: bool = False
    share: float | None = None

    @property
    def engine(self) -> tuple[str, int, bool] | None:
        """Mode, VoCo tokens and compiled, of the engine that it runs on; None for stock."""
        modes = {"full cache": "full_cache", "uncached": "uncached"}
        if self.name == "stock generate":
            return None
        return (modes.get(self.name, "voco"), self.num_voco, self.compiled)

    def said(self) -> str:
        parts = [self.name]
        if self.num_voco:
            parts.append(f"{self.num_voco} VoCo")
        parts.append(f"batch {self.batch}" if self.kind == "answer" else "stream")
        if self.kind == "answer":
            parts.append(f"images {self.images}")
        elif self.share is not None:
            parts.append(f"{self.share:g} come back")
        return ", ".join([*parts, "compiled"] if self.compiled else parts)

    def row(self, status: str, reason: str) -> dict:
        """Its row without a time."""
        return {
            "name": self.name,
            "kind": self.kind,
            "images": self.images,
            "num_voco": self.num_voco,
            "batch": self.batch,
            "compiled": self.compiled,
            "share": self.share,
            "status": status,
            "reason": reason,
        }


def plan(
    *, num_voco: list[int], batches: list[int], shares: list[float], compiled: list[bool]
) -> list[Step]:
    """What is measured of a model, in the order of the run: rows of one engine follow each other."""
    first, largest = num_voco[0], max(batches)
    modes = [("voco", "stored", first), ("uncached", "read", 0), ("full cache", "stored", 0)]
    steps = [Step("stock generate", "answer", "read", 0, batch) for batch in batches]
    if shares:
        steps.append(Step("stock generate", "stream", "read", 0, largest))
    for through_compiler in compiled:  # first as an engine runs by default
        for name, images, count in modes:
            own = [
                Step(name, "answer", images, count, batch, through_compiler) for batch in batches
            ]
            if name == "voco":
                own.append(Step(name, "answer", "new", count, batches[0], through_compiler))
            if not through_compiler:  # each shape of work takes its time to compile
                if name == "voco":
                    own += [Step("voco generate", "answer", images, count, b) for b in batches]
                own += [Step(name, "stream", images, count, largest, share=r) for r in shares]
            steps += own
    for count in num_voco[1:]:
        steps += [Step("voco", "answer", "stored", count, batch, compiled[0]) for batch in batches]
        steps.append(Step("voco", "answer", "new", count, batches[0], compiled[0]))
    if compiled[0]:
        for name, images, count in modes:
            steps += [Step(name, "stream", images, count, largest, True, r) for r in shares]
    return steps


@dataclass
class Runner:
    """Fills the record, model by model and row by row; it is written to ``out`` after each.

    Attributes:
        steps: of each model.
        budget: seconds after which no row starts; None for no limit.
    """

    record: dict
    out: Path
    device: torch.device
    dtype: torch.dtype
    steps: dict[str, list[Step]]
    effort: Effort
    text_tokens: int
    new_tokens: int
    budget: float | None
    started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """
        Raises:
            DeviceLostError: CUDA can't be used any more; what was timed before is in the record.
        """
        self.progress = ProgressReport(sum(map(len, self.steps.values())), 0)
        # What the imports made stays: a collection of garbage in a row's time needn't look at it.
        gc.collect()
        gc.freeze()
        try:
            with self.progress.shown():
                for name, steps in self.steps.items():
                    self._run_model(name, steps)
        finally:
            gc.unfreeze()
        self.record["finished"] = True
        records.write(self.record, self.out)

    def _run_model(self, name: str, steps: list[Step]) -> None:
        case = {"model": name, "title": SPECS[name].title, "fits": True, "rows": []}
        self.record["cases"].append(case)
        reason = self._spent()
        subject = None
        if not reason:
            try:
                subject = Subject(
                    SPECS[name],
                    self.device,
                    self.dtype,
                    text_tokens=self.text_tokens,
                    new_tokens=self.new_tokens,
                    max_batch=max(step.batch for step in steps),
                    store_bytes=STORE_BYTES[self.device.type],
                    effort=self.effort,
                )
                case |= subject.facts()
            except (torch.OutOfMemoryError, MemoryError) as error:
                case["fits"] = False
                reason = f"does not fit: {timing.first_line(error)}"
        if subject is None:
            status = "skipped" if case["fits"] else "unsupported"
            case["rows"] = [step.row(status, reason) for step in steps]
            self.progress.done += len(steps)
            print(f"{name}: {reason}", file=sys.stderr)
        else:
            ModelRun(subject, self, case).run(steps)
        records.write(self.record, self.out)
        del subject
        free(self.device)

    def _spent(self) -> str:
        if self.budget is None or time.monotonic() - self.started <= self.budget:
            return ""
        return f"the budget of {self.budget:g} s was spent"

    def measure(self, case: dict, step: Step, function: Callable[[], dict]) -> None:
        """A row, whatever happens.

        Raises:
            DeviceLostError: CUDA can't be used any more.
        """
        reason = self._spent()

        def outcome() -> dict:
            if reason:
                return step.row("skipped", reason)
            try:
                measured = function()
            except WrongError as error:
                return step.row("red", f"{error}; not timed")
            except Exception as error:  # whatever is raised becomes the row's reason
                why = timing.first_line(error)
                if (
                    isinstance(error, torch.OutOfMemoryError)
                    or getattr(error, "reason", "") == "memory"
                ):
                    return step.row("unsupported", f"does not fit: {why}")
                return step.row("failed", why)
            row = step.row("ok", "")
            del row["reason"]
            return row | measured

        def told() -> dict:
            row = outcome()
            case["rows"].append(row)
            if row["status"] != "ok":
                return row
            if row["kind"] == "stream":
                return {"status": "answers a second", "reason": f"{row['answers_per_s']:.4g}"}
            return {"status": "first token", "reason": f"{row['wall']['p50']:.4g} ms"}

        self.progress.measure(f"{case['title']}, {step.said()}", told)
        records.write(self.record, self.out)
        row = case["rows"][-1]
        if row["status"] == "failed" and self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLostError(row) from error


class ModelRun:
    """All rows of one model.

    Args:
        subject: the model.
        runner: whose record they go into, at ``case``.
    """

    def __init__(self, subject: Subject, runner: Runner, case: dict) -> None:
        self._subject, self._runner, self._case = subject, runner, case
        self._plain: References | Exception | None = None
        self._voco: dict[int, References] = {}
        self._engine = None
        self._agreement: dict | None = None
        self._failure: Exception | None = None

    def run(self, steps: list[Step]) -> None:
        stock = [step for step in steps if step.engine is None]
        others = [step for step in steps if step.engine is not None]
        for step in stock:
            self._runner.measure(self._case, step, lambda step=step: self._stock(step))
        try:
            self._plain = self._subject.plain_references()
        except Exception as error:  # the rows that need them say so
            self._plain = error
        self._subject.enable()
        current = None
        try:
            for step in others:
                if step.engine != current:
                    self._close()
                    current = step.engine
                self._runner.measure(self._case, step, lambda step=step: self._through_engine(step))
        finally:
            self._close()

    def _stock(self, step: Step) -> dict:
        if step.kind == "stream":
            return self._subject.generate_stream_row()
        return self._subject.generate_row(step.batch)

    def _through_engine(self, step: Step) -> dict:
        self._open(step)
        subject, variant = self._subject, f"{step.engine[0]} {step.num_voco}"
        if step.kind == "stream":
            row = subject.stream_row(self._engine, step.share, variant)
        elif step.name == "voco generate":
            row = subject.voco_generate_row(
                self._engine, batch=step.batch, num_voco=step.num_voco, variant=variant
            )
        else:
            row = subject.answer_row(
                self._engine,
                batch=step.batch,
                num_voco=step.num_voco,
                new_images=step.images == "new",
                variant=variant,
            )
        return row | {"agreement": self._agreement}

    def _open(self, step: Step) -> None:
        """The step's engine, once its answers were right.

        Raises:
            WrongError: they are not. It, and whatever else was raised, is raised again for each row.
        """
        if self._failure is not None:
            raise self._failure
        if self._engine is not None:
            return
        mode, num_voco, compiled = step.engine
        try:
            references = self._references(mode, num_voco)
            self._engine = self._subject.engine(mode, num_voco, compiled)
            self._agreement = self._subject.compare(
                self._engine, references, f"{mode} {num_voco} {compiled}"
            )
            self._subject.forget(self._engine)
        except Exception as error:
            self._failure = error.with_traceback(None)  # it would hold on to the engine
            raise

    def _references(self, mode: str, num_voco: int) -> References:
        if mode != "voco":
            if isinstance(self._plain, Exception):
                raise self._plain
            return self._plain
        if num_voco not in self._voco:
            self._voco[num_voco] = self._subject.voco_references(num_voco)
        return self._voco[num_voco]

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._agreement = self._failure = None
        free(self._subject.device)


def free(device: torch.device) -> None:
    """Gives back what the engine or the model before has left."""
    gc.collect()
    if device.type == "cuda":
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Among {', '.join(SPECS)}; repeat for more.",
            show_default="on CUDA those of the paper, on a CPU the small ones",
        ),
    ] = None,
    num_voco: Annotated[
        list[int] | None,
        typer.Option(
            help="VoCo tokens an image; repeat for more. All is measured with the first.",
            show_default="1, 8, 64, 128",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Requests together; repeat for more.", show_default="1, 8"),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            help="Of a stream's images that come back; repeat for more.", show_default="0, 0.5, 0.9"
        ),
    ] = None,
    streams: Annotated[bool, typer.Option(help="Measure streams of requests, too.")] = True,
    compiled: Annotated[
        bool, typer.Option(help="On CUDA, also with layers through torch.compile.")
    ] = True,
    text_tokens: Annotated[int, typer.Option(help="Of a question.", min=1)] = TEXT_TOKENS,
    new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=2)] = NEW_TOKENS,
    device: Annotated[Device, typer.Option(help="auto is CUDA if any.")] = Device.auto,
    out: Annotated[Path, typer.Option(help="The JSON record; plots go beside it as .png.")] = Path(
        "bench-output/two-pass.json"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few repeats: a look, no figures.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which no new row starts; the rest is recorded as skipped.",
            show_default="none",
            min=0,
        ),
    ] = None,
) -> None:
    """Compare the answers of the engine's modes with those of generate, then time them all.

    Exit status: 0; 1 if an answer was wrong or a row of ours failed; 2 wrong usage; 3 if a kernel broke
    the CUDA context.
    """
    torch_device = pick_device(device)
    on_gpu = torch_device.type == "cuda"
    names = pick(model or [], list(SPECS), "models") if model else list(DEFAULT[torch_device.type])
    counts, batches = list(num_voco or NUM_VOCO), sorted(set(batch or BATCHES))
    shares = sorted(set(share or SHARES)) if streams else []
    if min(*counts, *batches) < 1:
        raise typer.BadParameter(
            f"expected --num-voco and --batch >= 1, got {min(*counts, *batches)}"
        )
    if any(not 0 <= each < 1 for each in shares):
        raise typer.BadParameter(f"expected --share from 0 to below 1, got {shares}")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    effort = (timing.QUICK if quick else timing.FULL)[torch_device.type]
    record = {
        "schema": records.SCHEMA,
        "bench": "two_pass",
        "finished": False,
        "environment": timing.environment(torch_device, MEASURED),
        "settings": {
            "models": names,
            "dtype": "bf16" if on_gpu else "fp32",
            "num_voco": counts,
            "batches": batches,
            "shares": shares,
            "text_tokens": text_tokens,
            "new_tokens": new_tokens,
            "weights": "random",
            "quick": quick,
        },
        "ceilings": timing.ceilings(torch_device, dtype, effort),
        "cases": [],
    }
    free(torch_device)
    records.write(record, out)
    steps = plan(
        num_voco=counts,
        batches=batches,
        shares=shares,
        compiled=[True, False] if on_gpu and compiled else [False],
    )
    single = [step for step in steps if step.kind == "answer" and step.batch == batches[0]]
    runner = Runner(
        record=record,
        out=out,
        device=torch_device,
        dtype=dtype,
        steps={name: single if name in BRIEF and not model else steps for name in names},
        effort=(two_pass_runs.QUICK if quick else two_pass_runs.FULL)[torch_device.type],
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        budget=budget,
    )
    try:
        runner.run()
    except DeviceLostError as lost:
        print(lost, file=sys.stderr)
        raise typer.Exit(EXIT_DEVICE_LOST) from lost
    # A floor is what the machine can do at its best: another program may have been at work before.
    again = timing.ceilings(torch_device, dtype, effort)
    record["ceilings"] = {what: max(rate, again[what]) for what, rate in record["ceilings"].items()}
    records.write(record, out)
    print(two_pass_report.show(record))
    drawn = two_pass_plots.draw(record, out)
    print(f"wrote {', '.join(map(str, [out, *drawn]))}")
    wrong = records.two_pass_failures(record)
    for line in wrong:
        print(f"RED {line}", file=sys.stderr)
    if wrong:
        raise typer.Exit(EXIT_RED)


if __name__ == "__main__":
    app()

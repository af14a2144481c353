"""A whole run of bench/two_pass.py: model by model and row by row, into one record."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.answering import rows
from bench.answering.models import SPECS
from bench.answering.report import FAMILY
from bench.answering.subject import Effort, References, Subject
from bench.harness import clock, machine
from bench.harness.guard import first_line
from bench.harness.run import Runner

STORE_BYTES = {"cuda": 24 << 30, "cpu": 4 << 30}


@dataclass(frozen=True)
class Step:
    """One row to measure.

    Attributes:
        name: "voco", "full cache", "uncached" (through the engine), "stock generate" or "voco generate".
        kind: "answer" (a batch, stage by stage) or "stream".
        images: "stored", "new" (compressed first) or "read" (by a plain LLaVA, each time).
        num_voco: 0 for a plain LLaVA.
        batch: requests answered together; in a stream, at most.
        compiled: whether the engine's layers go through ``torch.compile``.
        share: the share of a stream's images that came before; None for ``generate``, which keeps none.
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
        """Mode, VoCo tokens and compiled of the engine that it runs on; None for stock ``generate``."""
        modes = {"full cache": "full_cache", "uncached": "uncached"}
        if self.name == "stock generate":
            return None
        return (modes.get(self.name, "voco"), self.num_voco, self.compiled)

    def said(self) -> str:
        """The step in words, for progress."""
        parts = [self.name]
        if self.num_voco:
            parts.append(f"{self.num_voco} VoCo")
        parts.append(f"batch {self.batch}" if self.kind == "answer" else "stream")
        if self.kind == "answer":
            parts.append(f"images {self.images}")
        elif self.share is not None:
            parts.append(f"{self.share:g} come back")
        return ", ".join([*parts, "compiled"] if self.compiled else parts)

    def head(self) -> dict:
        """What its row has in any case."""
        return {
            "name": self.name,
            "kind": self.kind,
            "images": self.images,
            "num_voco": self.num_voco,
            "batch": self.batch,
            "compiled": self.compiled,
            "share": self.share,
        }


def plan(
    *, num_voco: list[int], batches: list[int], shares: list[float], compiled: list[bool]
) -> list[Step]:
    """What is measured for a model, in the order of the run: rows of one engine are adjacent."""
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


@dataclass(kw_only=True)
class AnsweringRunner(Runner):
    """What to measure.

    Attributes:
        steps: the rows of each model, by its name in ``SPECS``.
        text_tokens, new_tokens: tokens per question, and per answer.
        ceilings_effort: how long to measure the device's ceilings.
    """

    family = FAMILY
    out_of_memory = "unsupported"
    dtype: torch.dtype
    steps: dict[str, list[Step]]
    effort: Effort
    ceilings_effort: clock.Effort
    text_tokens: int
    new_tokens: int

    def fill(self) -> None:
        # What the imports made stays: garbage collection during a row needn't look at it.
        gc.collect()
        gc.freeze()
        try:
            with self.progress_of(sum(map(len, self.steps.values()))):
                for name, steps in self.steps.items():
                    self._run_model(name, steps)
        finally:
            gc.unfreeze()
        # A floor is what the machine can do at its best: another program may have been at work before.
        again = machine.ceilings(self.device, self.dtype, self.ceilings_effort)
        before = self.record["ceilings"]
        self.record["ceilings"] = {what: max(rate, again[what]) for what, rate in before.items()}

    def say(self, row: dict) -> str:
        if row["status"] != "ok":
            return super().say(row)
        if row["kind"] == "stream":
            return f"answers per second: {row['answers_per_s']:.4g}"
        return f"first token: {row['wall']['p50']:.4g} ms"

    def _run_model(self, name: str, steps: list[Step]) -> None:
        case = {"model": name, "title": SPECS[name].title, "fits": True, "rows": []}
        self.record["cases"].append(case)
        reason = self.spent()
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
                reason = f"does not fit: {first_line(error)}"
        if subject is None:
            status = "skipped" if case["fits"] else "unsupported"
            case["rows"] = [step.head() | {"status": status, "reason": reason} for step in steps]
            self.progress.skip(len(steps))
            print(f"{name}: {reason}", file=sys.stderr)
        else:
            ModelRun(subject, self, case).run(steps)
        self.write()
        del subject
        free(self.device)


class ModelRun:
    """All rows of one model.

    Args:
        subject: the model.
        runner: whose record they go into, at ``case``.
    """

    def __init__(self, subject: Subject, runner: AnsweringRunner, case: dict) -> None:
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
            self._measure(step, self._stock)
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
                self._measure(step, self._through_engine)
        finally:
            self._close()

    def _measure(self, step: Step, function: Callable[[Step], dict]) -> None:
        self._runner.measure(
            f"{self._case['title']}, {step.said()}",
            step.head(),
            lambda: function(step),
            self._case["rows"],
        )

    def _stock(self, step: Step) -> dict:
        if step.kind == "stream":
            return rows.generate_stream_row(self._subject)
        return rows.generate_row(self._subject, step.batch)

    def _through_engine(self, step: Step) -> dict:
        self._open(step)
        subject, engine, variant = self._subject, self._engine, f"{step.engine[0]} {step.num_voco}"
        if step.kind == "stream":
            row = rows.stream_row(subject, engine, step.share, variant)
        elif step.name == "voco generate":
            row = rows.voco_generate_row(
                subject, engine, batch=step.batch, num_voco=step.num_voco, variant=variant
            )
        else:
            row = rows.answer_row(
                subject,
                engine,
                batch=step.batch,
                num_voco=step.num_voco,
                new_images=step.images == "new",
                variant=variant,
            )
        return row | {"agreement": self._agreement}

    def _open(self, step: Step) -> None:
        """Open the step's engine and check its answers, unless that was done.

        Raises:
            WrongError: they are wrong. This, like any other failure, is raised again for each row.
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
    """Free what the engine or model before has left."""
    gc.collect()
    if device.type == "cuda":
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()

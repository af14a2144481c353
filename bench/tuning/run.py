"""A whole run of bench/tune.py: candidates tried out, then timed shape by shape, into one record."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.attention import direct, measure, oracle
from bench.attention.peers import Case
from bench.attention.questions import DIRECTIONS
from bench.attention.shapes import Shape
from bench.harness import clock
from bench.harness.guard import first_line
from bench.harness.run import Runner
from bench.tuning import candidates, trial
from bench.tuning.report import FAMILY
from bench.tuning.trial import Job
from voco_kernels.attention.backends import triton

EFFORT = {"cuda": clock.QUICK["cuda"], "cpu": clock.Effort(0, 1, 1)}


@dataclass(kw_only=True)
class Tuner(Runner):
    """What to try.

    ``candidates`` of the record has a row for each job: ``ok``, ``dropped`` (with the reason) or
    ``skipped`` (not reached); ``timings`` one for each candidate and shape, with a status as in
    ``bench.harness.records``; for ``choices`` see ``candidates.choose``.

    Attributes:
        chip: sm_90 as 90.
        heads: query heads and key/value heads.
        jobs: the candidates; of each kernel and width the shipped one first.
    """

    family = FAMILY
    chip: int
    heads: tuple[int, int]
    shapes: list[Shape]
    jobs: list[Job]

    def fill(self) -> None:
        for width in dict.fromkeys(width for _, width, _ in self.jobs):
            jobs = [job for job in self.jobs if job[1] == width]
            self._try_out(jobs)
            alive = [job for job in jobs if self._row_of(job)["status"] == "ok"]
            done = sum(row["width"] == width for row in self.record["timings"])
            with self.progress_of(len(alive) * len(self.shapes), done):
                for shape in self.shapes:
                    self._time_shape(shape, width, alive)
        self.record["choices"] = candidates.choose(self.record)

    def _try_out(self, jobs: list[Job]) -> None:
        todo = [job for job in jobs if self._row_of(job) is None]
        rows = trial.try_all(todo, self.heads, self.chip, self.device, self.deadline)
        for job in todo:
            if job not in rows:
                rows[job] = {**trial.head_of(job), "status": "skipped", "reason": self.spent()}
            self.record["candidates"].append(rows[job])
        self.write()

    def _row_of(self, job: Job, shape: Shape | None = None) -> dict | None:
        """The candidate's row; with a shape, its timing."""
        wanted = trial.head_of(job)
        if shape is not None:
            wanted["shape"] = shape.name
        rows = self.record["candidates" if shape is None else "timings"]
        return next((row for row in rows if wanted.items() <= row.items()), None)

    def _time_shape(self, shape: Shape, width: int, jobs: list[Job]) -> None:
        """All kernels and candidates of a width on one shape."""
        todo = [job for job in jobs if self._row_of(job, shape) is None]
        if not todo:
            return
        case, truth, result, reason = None, None, None, self.spent()
        if not reason:
            try:
                case = measure.make_case(
                    shape, self.heads, width, torch.bfloat16, self.device, direction=DIRECTIONS[1]
                )
                truth = measure.truth_of(case)
                result = direct.forward(triton, case)
            except Exception as error:  # no candidate's fault: the other shapes decide
                reason = f"no inputs or no float64 truth: {first_line(error)}"
        for job in todo:
            head = {"name": "{} {} {}".format(*job), **trial.head_of(job), "shape": shape.name}

            def rest_of(job=job) -> dict:
                if reason:
                    return {"status": "skipped", "reason": reason}
                return self._check_and_time(job, case, truth, result)

            what = f"{shape.name} {head['name']}"
            # Writing a record of a thousand rows takes time that the budget counts: once a shape.
            self.measure(what, head, rest_of, self.record["timings"], write=False)
        self.write()
        if self.device.type == "cuda":
            del case, truth, result
            torch.cuda.empty_cache()

    def _check_and_time(
        self,
        job: Job,
        case: Case,
        truth: oracle.Truth,
        result: tuple[torch.Tensor, torch.Tensor],
    ) -> dict:
        def run() -> dict[str, torch.Tensor]:
            if job[0] == "forward":
                return {"out": direct.forward(triton, case)[0]}
            gradients = direct.backward(triton, case, *result)
            return dict(zip(oracle.NAMES[1:], gradients, strict=True))

        with trial.using(job, self.chip):
            measure.poison(case)
            errors = truth.check(run(), case.k.shape[1])
            wrong = oracle.over_limits(errors)
            if wrong:
                return {"status": "red", "reason": wrong, "errors": errors}
            measured = clock.measure(run, self.device, EFFORT[self.device.type])
            return {"status": "ok", "timing": measured.to_json(), "errors": errors}

"""A whole run of bench/kv.py: every place and size, into one record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.harness import guard, turns
from bench.harness.clock import summary
from bench.harness.guard import NotMeasuredError, WrongError
from bench.harness.records import timed
from bench.harness.run import Runner
from bench.harness.text import plural
from bench.harness.turns import Clock, Job
from bench.loading.loads import Load, loads_from
from bench.loading.places import RedisServer
from bench.loading.report import FAMILY
from bench.loading.scene import Model, Scene

TOKENS = (1, 64, 576, 8)
"""Sizes of an entry, the most telling first: 0.5, 34, 302 and 4 MB of LLaVA-1.5-7B."""

SWEEP_TOKENS = (2, 4, 16, 32)
"""Between them, on CUDA, where the copy to the device first begins to pay."""


class Servers:
    """The Redis server of a run, started when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: RedisServer | None = None
        self._reason = ""

    def redis(self) -> RedisServer:
        """Raises NotMeasuredError where there is none."""
        if self._server is None and not self._reason:
            try:
                self._server = RedisServer(self._folder)
            except NotMeasuredError as error:
                self._reason = str(error)
        if self._server is None:
            raise NotMeasuredError(self._reason)
        return self._server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


@dataclass(kw_only=True)
class LoadingRunner(Runner):
    """What to time.

    Attributes:
        sources: places to load from, in the order of the tables.
        tokens: sizes of the entry, in the order of the run.
        sweep: whether to look for the crossover of staging, too.
        folder: for files.
    """

    family = FAMILY
    model: Model
    sources: list[str]
    tokens: list[int]
    sweep: bool
    clock: Clock
    folder: Path
    servers: Servers

    def fill(self) -> None:
        plan = self._plan()
        with self.progress_of(sum(len(sources) for _, sources, _ in plan)):
            for tokens, sources, sweep in plan:
                self._run_size(tokens, sources, sweep)

    def _plan(self) -> list[tuple[int, list[str], bool]]:
        """Tokens, sources, and whether only the loads of the sweep are timed."""
        if self.device.type == "cpu":
            return [(tokens, self.sources, False) for tokens in self.tokens]
        # Memory first, in every size, then what is slower: time on a GPU machine is short.
        near = [source for source in self.sources if source in ("pinned memory", "device")]
        far = [source for source in self.sources if source not in near]
        plan = [(tokens, near, False) for tokens in self.tokens]
        if self.sweep:
            plan += [(tokens, ["pinned memory"], True) for tokens in SWEEP_TOKENS]
        plan += [(tokens, far, False) for tokens in self.tokens]
        return [stage for stage in plan if stage[1]]

    def _run_size(self, tokens: int, sources: list[str], sweep: bool) -> None:
        scene = None
        try:
            for source in sources:
                loads = loads_from(source, self.device.type, sweep=sweep)
                reason = self.spent()
                if scene is None and not reason:
                    scene = Scene(self.model, tokens, self.device, self.folder, self.servers.redis)
                case = {"source": source, "tokens": tokens, "bytes": self.model.nbytes(tokens)}
                skipped = {"status": "skipped", "reason": reason}
                case["rows"] = [row_head(load) | skipped for load in loads]
                if not reason:
                    self.progress.measure(
                        f"{source}, {plural(tokens, 'token')}",
                        lambda case=case, loads=loads, scene=scene: self._fill(case, loads, scene),
                        _best,
                    )
                self.record["cases"].append(case)
                self.record["cases"].sort(
                    key=lambda case: (self.sources.index(case["source"]), case["tokens"])
                )
                self.write()
        finally:
            if scene is not None:
                scene.close()

    def _fill(self, case: dict, loads: list[Load], scene: Scene) -> dict:
        warm = case["source"] != "disk" and scene.tokens <= turns.WARM_TOKENS
        case["rows"] = time_loads(loads, scene, self.clock, warm=warm)
        return case


def _best(case: dict) -> str:
    """A case's outcome in words."""
    rows = timed(case)
    ours = [row for row in rows if row["kind"] == "ours"]
    said = "nothing of ours among them"
    if ours:
        best = min(ours, key=lambda row: row["wall"]["p50"])
        said = f"{best['name']} in {best['wall']['p50']:.4g} ms"
    return f"{len(rows)} of {len(case['rows'])} loads timed: {said}"


def row_head(load: Load) -> dict:
    """What a load's row has in any case."""
    return {"name": load.name, "kind": load.kind, "checksum": load.checksum}


def time_loads(loads: list[Load], scene: Scene, clock: Clock, *, warm: bool = False) -> list[dict]:
    """A row for each load: all are checked first, then those that are right are timed in turns.

    Args:
        warm: also time them call after call, with warm caches.

    Raises:
        DeviceLostError: what a load raised has left CUDA unusable.
    """
    rows, jobs = [], {}
    for load in loads:
        found = guard.outcome(lambda load=load: {"job": checked(load, scene)})
        job = found.pop("job", None)
        if job is not None:
            jobs[len(rows)] = job
        rows.append(row_head(load) | found)
        guard.check_device(scene.device, load.name, rows[-1])
    failures = clock.time(list(jobs.values()), warm=warm)
    for (index, job), failure in zip(jobs.items(), failures, strict=True):
        if failure:
            rows[index] |= {"status": "failed", "reason": failure}
            guard.check_device(scene.device, rows[index]["name"], rows[index])
        else:
            rows[index] |= {what: summary(times) for what, times in job.times.items()}
    return rows


def checked(load: Load, scene: Scene) -> Job:
    """The load's job, run once into poisoned memory.

    Raises:
        NotMeasuredError: this machine can't time it.
        WrongError: the result wasn't the entry.
    """
    job = load.prepare(scene)
    scene.poison()
    job.prime()
    job.before()
    wrong = job.check(job.run())
    if wrong:
        raise WrongError(wrong)
    return job

"""How long a compact entry takes into a model's key/value cache, against one copy of the same bytes.

    python bench/kv.py               # this machine's device; one entry of LLaVA-1.5-7B
    python bench/kv.py --help

Each load is compared with the entry, to the bit, before it is timed; one that is wrong gets no time.
Loads and their floors take turns, each on cold caches. Tables go to stdout, progress to stderr, a JSON
record and a plot to ``--out``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no install

import torch
import typer
from rich.console import Console

from bench.attention import plots, tables
from bench.attention.measure import DeviceLostError
from bench.attention.run import ProgressReport
from bench.attn import EXIT_DEVICE_LOST, EXIT_RED, Device, pick, pick_device
from bench.harness import clock as timing
from bench.harness import records
from bench.harness import turns as kv_clock
from bench.harness.turns import Clock, Job
from bench.loading import loads as kv_loads
from bench.loading.loads import Load
from bench.loading.places import NotMeasuredError, RedisServer
from bench.loading.scene import FREE_SLOTS, SIZES, Model, Scene

TOKENS = (1, 64, 576, 8)
"""Sizes of an entry, those that decide most first: 0.5, 34, 302 and 4 MB of LLaVA-1.5-7B."""

SWEEP_TOKENS = (2, 4, 16, 32)
"""Between them, on CUDA, where the copy to the device first begins to pay."""

MEASURED = (*timing.SOURCES, "voco_model/kv_store")
"""Folders of the code that is timed."""


class Servers:
    """The Redis server of a run, started for the first who asks."""

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


@dataclass
class Runner:
    """What to time, and the record that fills up, written to ``out`` case by case.

    Attributes:
        sources: places to load from, in the order of the tables.
        tokens: sizes of the entry, in the order of the run.
        sweep: whether to look for the crossover of staging, too.
        budget: seconds after which no case starts; None for no limit.
    """

    record: dict
    out: Path
    device: torch.device
    model: Model
    sources: list[str]
    tokens: list[int]
    sweep: bool
    clock: Clock
    folder: Path
    servers: Servers
    budget: float | None
    started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Fill the record.

        Raises:
            DeviceLostError: a load broke the CUDA context; what was timed before is in the record.
        """
        plan = self._plan()
        self.progress = ProgressReport(sum(len(sources) for _, sources, _ in plan), 0)
        with self.progress.shown():
            for tokens, sources, sweep in plan:
                self._run_size(tokens, sources, sweep)
        self.record["finished"] = True
        records.write(self.record, self.out)

    def _plan(self) -> list[tuple[int, list[str], bool]]:
        """Tokens, sources, and whether only the loads of the sweep are timed."""
        if self.device.type == "cpu":
            return [(tokens, self.sources, False) for tokens in self.tokens]
        # Memory of any size comes before what is slower: time on a GPU machine is short.
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
                loads = kv_loads.loads_from(source, self.device.type, sweep=sweep)
                reason = self._spent_reason()
                if scene is None and not reason:
                    scene = Scene(self.model, tokens, self.device, self.folder, self.servers.redis)
                case = {"source": source, "tokens": tokens, "bytes": self.model.nbytes(tokens)}
                case["rows"] = [empty_row(load, "skipped", reason) for load in loads]
                if not reason:
                    self.progress.measure(
                        f"{source}, {tokens} token{'s' if tokens > 1 else ''}",
                        lambda case=case, loads=loads, scene=scene: self._fill(case, loads, scene),
                    )
                self.record["cases"].append(case)
                self.record["cases"].sort(
                    key=lambda case: (self.sources.index(case["source"]), case["tokens"])
                )
                records.write(self.record, self.out)
        finally:
            if scene is not None:
                scene.close()

    def _fill(self, case: dict, loads: list[Load], scene: Scene) -> dict:
        warm = case["source"] != "disk" and scene.tokens <= kv_clock.WARM_TOKENS
        case["rows"] = time_loads(loads, scene, self.clock, warm=warm)
        timed = records.timed(case)
        fastest = min(
            (row for row in timed if row["kind"] == "ours"),
            key=lambda row: row["wall"]["p50"],
            default=None,
        )
        said = "nothing of ours among them"
        if fastest is not None:
            said = f"{fastest['name']} in {fastest['wall']['p50']:.4g} ms"
        return {"status": f"{len(timed)} of {len(loads)} loads timed", "reason": said}

    def _spent_reason(self) -> str:
        if self.budget is None or time.monotonic() - self.started <= self.budget:
            return ""
        return f"the budget of {self.budget:g} s was spent"


def empty_row(load: Load, status: str, reason: str) -> dict:
    """A row without a time."""
    return {
        "name": load.name,
        "kind": load.kind,
        "checksum": load.checksum,
        "status": status,
        "reason": reason,
    }


def time_loads(loads: list[Load], scene: Scene, clock: Clock, *, warm: bool = False) -> list[dict]:
    """A row for each load: all are checked first, then those that are right are timed in turns.

    Args:
        warm: also time them call upon call, with warm caches.

    Raises:
        DeviceLostError: what a load raised has left CUDA unusable.
    """
    rows, jobs = [], {}
    for load in loads:
        outcome = _prepare(load, scene)
        if isinstance(outcome, Job):
            jobs[len(rows)] = outcome
            outcome = ("ok", "")
        rows.append(empty_row(load, *outcome))
        if outcome[0] == "failed":
            _check_device(scene.device, rows[-1])
    failures = clock.time(list(jobs.values()), warm=warm)
    for (index, job), failure in zip(jobs.items(), failures, strict=True):
        if failure:
            rows[index] |= {"status": "failed", "reason": failure}
            _check_device(scene.device, rows[index])
        else:
            del rows[index]["reason"]
            rows[index] |= {what: kv_clock.summary(times) for what, times in job.times.items()}
    return rows


def _prepare(load: Load, scene: Scene) -> Job | tuple[str, str]:
    """The load's job once it was right, or status and reason."""
    try:
        job = load.prepare(scene)
        scene.poison()
        job.prime()
        job.before()
        wrong = job.check(job.run())
    except NotMeasuredError as error:
        return "unsupported", str(error)
    except Exception as error:  # whatever a load raises becomes its row's reason
        return "failed", timing.first_line(error)
    return ("red", f"{wrong}; not timed") if wrong else job


def _check_device(device: torch.device, row: dict) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(row) from error


def versions_of_peers() -> dict[str, str | None]:
    """Of the packages that files and hashes go through."""
    found = {}
    for package in ("numpy", "safetensors", "xxhash", "redis", "hiredis"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of the entry; repeat for more.", show_default="1, 8, 64, 576"),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the entry is: memory, page cache, disk, redis; on CUDA pinned memory and "
            "device instead of memory. Repeat for more.",
            show_default="all",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The JSON record; the plot goes beside it as .png.")
    ] = Path("bench-output/kv.json"),
    device: Annotated[
        Device, typer.Option(help="Where the cache is; auto is CUDA if any.")
    ] = Device.auto,
    size: Annotated[
        str, typer.Option(help="The model: full (LLaVA-1.5-7B) or tiny (a rehearsal).")
    ] = "full",
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where files are made (and removed again): on the disk that is to be timed.",
            show_default="the system's for temporary files",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few repeats: a look, no figures.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which no new case starts; the rest is recorded as skipped.",
            show_default="none",
            min=0,
        ),
    ] = None,
) -> None:
    """Check every way to load an entry into a StaticCache, then time them all in turns.

    From memory, the page cache, the disk (dropped from memory before each read) and a Redis server on
    loopback that is started for it. p20/p50/p80 in ms on cold caches, and how many times the floor:
    one copy of the same bytes, on a CPU with their checksum where the load computes it.

    Exit status: 0; 1 if a load of ours was wrong or failed; 2 wrong usage; 3 if a kernel broke the
    CUDA context.
    """
    torch_device = pick_device(device)
    (size,) = pick([size], list(SIZES), "sizes")
    sources = pick(source or [], list(kv_loads.SOURCES[torch_device.type]), "sources")
    if any(count < 1 for count in tokens or []):
        raise typer.BadParameter(f"expected at least one token, got {min(tokens)}")
    clock = Clock(torch_device, (kv_clock.QUICK if quick else kv_clock.FULL)[torch_device.type])
    model = SIZES[size]
    environment = timing.environment(torch_device, MEASURED)
    environment["versions"] |= versions_of_peers()
    record = {
        "schema": records.SCHEMA,
        "bench": "kv",
        "finished": False,
        "environment": environment,
        "settings": {
            "size": size,
            "num_layers": model.num_layers,
            "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "dtype": "bf16",
            "tokens": sorted(tokens or TOKENS),
            "sources": sources,
            "free_slots": FREE_SLOTS,
            "evicted_bytes": clock.evicted_bytes,
            "quick": quick,
        },
        "cases": [],
    }
    records.write(record, out)
    with tempfile.TemporaryDirectory(prefix="voco-kv-", dir=folder) as temporary:
        servers = Servers(Path(temporary))
        runner = Runner(
            record=record,
            out=out,
            device=torch_device,
            model=model,
            sources=sources,
            tokens=list(tokens or TOKENS),
            sweep=torch_device.type == "cuda" and "pinned memory" in sources and not tokens,
            clock=clock,
            folder=Path(temporary),
            servers=servers,
            budget=budget,
        )
        try:
            runner.run()
        except DeviceLostError as lost:
            print(lost, file=sys.stderr)
            raise typer.Exit(EXIT_DEVICE_LOST) from lost
        finally:
            servers.stop()

    # A pipe has no width of its own: take one that keeps a row on a line.
    tables.print_kv(record, Console(width=None if sys.stdout.isatty() else 200))
    picture = out.with_suffix(".png")
    plots.plot_kv(record, picture)
    print(f"wrote {out} and {picture}")
    wrong = records.kv_failures(record)
    for line in wrong:
        print(f"RED {line}", file=sys.stderr)
    if wrong:
        raise typer.Exit(EXIT_RED)


if __name__ == "__main__":
    app()

"""A run: trains all jobs in worker processes, then writes the tables."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import queue
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers.utils.logging import disable_progress_bar

from voco_model.devices import available_cpus, usable_device
from voco_model.miniature.recipe import Job, Recipe, jobs
from voco_model.miniature.report import save
from voco_model.miniature.results import collect
from voco_model.miniature.scenes import digits

_REPORT_EVERY = 10  # steps


def run(
    recipe: Recipe,
    output: str | os.PathLike,
    *,
    workers: int | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> dict:
    """Train and examine all models of a recipe, resuming where an earlier call stopped.

    Args:
        output: folder for checkpoints, ``results.json``, ``tables.md`` and ``retention.png``.
        workers: number of single-threaded processes; by default one per CPU, or 1 on a GPU.
        device: by default a GPU if there is one, else the CPU.

    Returns:
        the content of ``results.json``; see ``results.collect``.

    Raises:
        ValueError: a folder with another recipe, with more models or in use by another run, a file, an
            unusable device, or workers < 1. Nothing is written then.
        ModuleNotFoundError: the extra ``miniature`` isn't installed.
        RuntimeError: a training failed.
    """
    console = console or Console()
    device = str(usable_device(device))
    if workers is None:
        workers = 1 if device.startswith("cuda") else available_cpus()
    if workers < 1:
        raise ValueError(f"expected workers >= 1, got {workers}")
    digits("train")
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "expected the extra 'miniature' for the plot, got no matplotlib; "
            "pip install 'voco-kernels[miniature]'"
        )
    output = Path(output)
    _check_folder(output, recipe)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        (output / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=1) + "\n")
        todo = [job for job in jobs(recipe) if not is_done(output, job.name)]
        if todo:
            _run_all(todo, recipe, output, workers, device, console)
        results = collect(recipe, output)
        save(results, output)
    return results


def is_done(output: Path, name: str) -> bool:
    """Whether the job of this name is finished."""
    return (output / name / "scores.json").exists()


def _check_folder(output: Path, recipe: Recipe) -> None:
    """Check an earlier run's recipe: only seeds and ``distinct`` counts may be added to it."""
    path = output / "recipe.json"
    if output.exists() and not output.is_dir():
        raise ValueError(f"expected a folder, got the file {output}; choose another --output")
    if path.exists():
        try:
            before = json.loads(path.read_text())
            seeds, distinct = before["seeds"], set(before["distinct"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"expected a recipe of an earlier run, got {path}: {error!r}; choose another --output"
            ) from None
        now = recipe.to_dict()
        if before | {key: now[key] for key in ("seeds", "distinct")} != now:
            raise ValueError(
                f"expected an empty folder or one with a run of the same recipe, got {output} with "
                "another recipe.json; choose another --output"
            )
        if seeds > recipe.seeds:
            raise ValueError(
                f"expected at least the {seeds} seeds of the run in {output}, got {recipe.seeds}; "
                f"pass --seeds {seeds} or choose another --output"
            )
        if left := distinct - set(recipe.distinct):
            raise ValueError(
                f"expected the run in {output} to keep its models with {sorted(left)} distinct VoCo "
                f"tokens, got {list(recipe.distinct)}; pass --distinct for these too, or choose another "
                "--output"
            )


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Lock the folder, since two runs would overwrite each other's checkpoints."""
    with open(output / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"expected no other run in {output}, found one in progress; wait for it, or choose "
                "another --output"
            ) from None
        yield


def _run_all(
    todo: list[Job], recipe: Recipe, output: Path, workers: int, device: str, console: Console
) -> None:
    context = multiprocessing.get_context("spawn")
    bar = Progress(
        TextColumn("{task.description:28}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with context.Manager() as manager, bar:
        heard = manager.Queue()
        whole = bar.add_task(f"{len(todo)} trainings", total=sum(job.work for job in todo))
        shown = {}
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
            waiting, running = list(todo), {}
            while waiting or running:
                for job in list(waiting):
                    ready = job.needs is None or is_done(output, job.needs)
                    if ready and len(running) < workers:
                        waiting.remove(job)
                        future = pool.submit(_work, job, recipe, output, device, heard)
                        running[future] = job
                        shown[job.name] = (bar.add_task(job.name, total=job.steps), job)
                _drain(heard, bar, whole, shown)
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    if future.exception() and running:
                        console.print(
                            f"{job.name} failed; waiting for the other trainings in progress"
                        )
                    _check_done(future, job)
                    _drain(heard, bar, whole, shown)
                    bar.update(shown[job.name][0], visible=False)
                    if not console.is_terminal:  # without a bar
                        console.print(f"{job.name}: done, {len(waiting) + len(running)} to go")
        for task, _ in shown.values():
            bar.remove_task(task)


def _check_done(future: Future, job: Job) -> None:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise RuntimeError(
            f"training {job.name} failed: its process was killed, perhaps because memory ran out; the "
            "same command resumes from here, and fewer --workers need less memory"
        ) from error
    if error is not None:
        raise RuntimeError(f"training {job.name} failed: {error!r}") from error


def _drain(heard: queue.Queue, bar: Progress, whole: int, shown: dict) -> None:
    while True:
        try:
            name, steps, loss = heard.get_nowait()
        except queue.Empty:
            return
        task, job = shown[name]
        bar.update(task, advance=steps, description=f"{name} {loss:.2f}")
        bar.update(whole, advance=job.work * steps / job.steps)
        if bar.tasks[bar.task_ids.index(task)].finished:
            bar.update(task, description=f"{name}: exam")


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()  # for reading and writing checkpoints


def _work(job: Job, recipe: Recipe, output: Path, device: str, heard) -> None:
    from voco_model.miniature.work import do

    parent = os.getppid()

    def progress(step: int, loss: float) -> None:
        if step % _REPORT_EVERY == 0 or step == job.steps:
            if os.getppid() != parent:
                sys.exit()  # the run was killed; another call may be training the same job by now
            heard.put((job.name, step % _REPORT_EVERY or _REPORT_EVERY, loss))

    do(job, recipe, output, device, progress)

"""A whole run: all jobs, some at a time, each in a process of its own; then the tables."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
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

from voco_model.miniature.recipe import Job, Recipe, jobs
from voco_model.miniature.results import collect, save
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
    """Train and examine everything of the recipe; goes on where an earlier call stopped.

    Args:
        output: folder for a checkpoint a job, ``results.json``, ``tables.md`` and ``retention.png``.
        workers: processes, each on one thread; by default as many as there are CPUs, 1 on a GPU.
        device: by default a GPU where there is one, else the CPU.

    Returns:
        what is in ``results.json``; see ``results.collect``.

    Raises:
        ValueError: a folder with a run of another recipe, no folder, an unknown device, or workers < 1.
            Nothing is written then.
        ModuleNotFoundError: without the extra ``miniature``.
    """
    console = console or Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, or not there
        raise ValueError(
            f"expected a device such as cpu or cuda, got {device!r}: {error}"
        ) from None
    if workers is None:
        workers = 1 if device.startswith("cuda") else len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"expected workers >= 1, got {workers}")
    digits("train")  # without scikit-learn nothing begins
    output = Path(output)
    _claim(output, recipe)
    todo = [job for job in jobs(recipe) if not is_done(output, job.name)]
    begun = time.perf_counter()
    if todo:
        _run_all(todo, recipe, output, workers, device, console)
    seconds = time.perf_counter() - begun
    results = collect(recipe, output, device=device, workers=workers, seconds=seconds)
    save(results, output)
    return results


def is_done(output: Path, name: str) -> bool:
    """Whether a job of this name has been finished."""
    return (output / name / "scores.json").exists()


def _claim(output: Path, recipe: Recipe) -> None:
    """More seeds may be added to a run, nothing else may be different."""
    path = output / "recipe.json"
    written = json.dumps(recipe.to_dict(), indent=1) + "\n"
    if output.exists() and not output.is_dir():
        raise ValueError(f"expected a folder, got the file {output}; choose another --output")
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"expected a recipe of an earlier run, got {path}: {error}") from None
        if before | {"seeds": recipe.seeds} != recipe.to_dict():
            raise ValueError(
                f"expected an empty folder or one with a run of the same recipe, got {output} with "
                "another recipe.json; choose another --output"
            )
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(written)


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
                    _finish(future, running.pop(future), pool)
                    _drain(heard, bar, whole, shown)
        for task, _ in shown.values():
            bar.remove_task(task)


def _finish(future: Future, job: Job, pool: ProcessPoolExecutor) -> None:
    error = future.exception()
    if error is not None:
        pool.shutdown(wait=True, cancel_futures=True)
        raise RuntimeError(f"expected {job.name} to be trained, got: {error}") from error


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
            bar.update(task, visible=False)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()  # of reading and writing checkpoints


def _work(job: Job, recipe: Recipe, output: Path, device: str, heard) -> None:
    from voco_model.miniature.work import do

    def progress(step: int, loss: float) -> None:
        if step % _REPORT_EVERY == 0 or step == job.steps:
            heard.put((job.name, step % _REPORT_EVERY or _REPORT_EVERY, loss))

    do(job, recipe, output, device, progress)

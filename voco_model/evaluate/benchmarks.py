"""The paper's benchmarks: lmms-eval's tasks that measure them, and the metric that is reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A column of the paper's tables.

    Attributes:
        metric: lmms-eval's metric, ``"<metric>,none"`` in its results.
        factor: factor from lmms-eval's unit to the paper's.
        tasks: lmms-eval's tasks that measure it; a run takes one of them.
        several_images: whether some of its questions have several images.
    """

    name: str
    metric: str
    factor: int
    tasks: tuple[str, ...]
    several_images: bool = False


_SEED = ("seedbench", "seedbench_lite")
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        # The validation split; the paper's test-dev is scored by a server.
        Benchmark("VQAv2", "exact_match", 100, ("vqav2_val", "vqav2_val_lite")),
        Benchmark("GQA", "exact_match", 100, ("gqa", "gqa_lite")),
        # With questions about videos, as in Table 1, and without, as in the supplement's Table 4: its
        # 68.2 for LLaVA-1.5-13B is SEED-Bench's own score for images alone (61.6 for all questions).
        Benchmark("SEED", "seed_all", 100, _SEED, several_images=True),
        Benchmark("SEED-I", "seed_image", 100, _SEED, several_images=True),
        Benchmark("SQA-I", "exact_match", 100, ("scienceqa_img",)),
        # F1, since the paper's 39.2 for FastV can't be an accuracy: guessing gives 50.
        Benchmark("POPE", "pope_f1_score", 100, ("pope",)),
        Benchmark("MME", "mme_perception_score", 1, ("mme",)),
        # "static" compares letters and options; the others ask an OpenAI model.
        Benchmark(
            "MMB",
            "gpt_eval_score",
            1,
            ("mmbench_en_dev_static", "mmbench_en_dev", "mmbench_en_dev_lite"),
        ),
        Benchmark("TextVQA", "exact_match", 100, ("textvqa_val", "textvqa_val_lite")),
    )
}


def check_tasks(tasks: Iterable[str]) -> None:
    """Raise ``ValueError`` for a task named twice, or two tasks of one benchmark."""
    tasks = list(tasks)
    if not tasks:
        raise ValueError("expected at least one task of lmms-eval, got none")
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise ValueError(f"expected each task once, got {', '.join(twice)} twice")
    for benchmark in BENCHMARKS.values():
        named = [task for task in tasks if task in benchmark.tasks]
        if len(named) > 1:
            raise ValueError(
                f"expected one task of {benchmark.name}, got {' and '.join(named)}; run them into "
                "different folders"
            )


def scores_of(results: Mapping[str, Mapping]) -> dict[str, float]:
    """Scores by benchmark, in the paper's units.

    Args:
        results: lmms-eval's results, by task and ``"<metric>,<filter>"``. Metrics of other tasks are
            returned unchanged, as ``"<task> <metric>"``.
    """
    scores = {}
    for benchmark in BENCHMARKS.values():
        for task in benchmark.tasks:
            value = results.get(task, {}).get(f"{benchmark.metric},none")
            if _is_number(value):
                scores[benchmark.name] = value * benchmark.factor
    known = {task for benchmark in BENCHMARKS.values() for task in benchmark.tasks}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric = key.partition(",")[0]
            if task not in known and _is_metric(key) and _is_number(value):
                scores[f"{task} {metric}"] = value
    return scores


def _is_metric(key: str) -> bool:
    """Whether a key is a metric, not its standard error, the task's name or a number of samples."""
    return "," in key and "stderr" not in key


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

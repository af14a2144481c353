"""The paper's benchmarks, as tasks of lmms-eval and the one metric of each that the paper reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A column of the paper's tables.

    Attributes:
        metric: of lmms-eval, whose key in its results is ``"<metric>,none"``.
        factor: from lmms-eval's unit to the paper's.
        tasks: names of lmms-eval that measure it; one of them in a run.
        several_images: whether some of its questions come with several images.
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
        # The paper sends answers on test-dev to a server; here it is the validation split.
        Benchmark("VQAv2", "exact_match", 100, ("vqav2_val", "vqav2_val_lite")),
        Benchmark("GQA", "exact_match", 100, ("gqa", "gqa_lite")),
        # With the questions on videos, as in Table 1, and without them, as in the supplement's Table 4:
        # its 68.2 of LLaVA-1.5-13B is that of SEED-Bench's own list on images alone (on all, 61.6).
        Benchmark("SEED", "seed_all", 100, _SEED, several_images=True),
        Benchmark("SEED-I", "seed_image", 100, _SEED, several_images=True),
        Benchmark("SQA-I", "exact_match", 100, ("scienceqa_img",)),
        # F1: the paper's 39.2 for FastV is no accuracy, which is 50 for a guess.
        Benchmark("POPE", "pope_f1_score", 100, ("pope",)),
        Benchmark("MME", "mme_perception_score", 1, ("mme",)),
        # "static" matches letters and options; the others ask a model of OpenAI.
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
    """A score for each benchmark that was measured, in the paper's units.

    Args:
        results: what lmms-eval measured: task, then ``"<metric>,<filter>"``, then a number. Metrics of
            other tasks come as they are, as ``"<task> <metric>"``.
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
    """Not an error of one, and not the name or number of samples that stands beside them."""
    return "," in key and "stderr" not in key


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""One job of a run: train a model, examine it, and save both."""

from __future__ import annotations

import json
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from voco_model import baselines
from voco_model.baselines.base import Method
from voco_model.devices import device_name
from voco_model.miniature.batches import batches
from voco_model.miniature.exam import PRICED, make_exam, score
from voco_model.miniature.model import build_model, build_processor
from voco_model.miniature.recipe import Job, Recipe
from voco_model.miniature.training import Progress, train_tower, tune
from voco_model.vlm.prompt import text_part


def do(job: Job, recipe: Recipe, folder: Path, device: str, progress: Progress) -> None:
    """Train a job's model, and write its checkpoint and ``scores.json`` to ``folder / job.name``.

    Args:
        progress: called after each step.
    """
    begun = time.perf_counter()
    target = folder / job.name
    processor = build_processor()
    if job.row == "tower":
        model, rows = build_model(processor, recipe.shape, seed=0).to(device), []
        train_tower(
            model.model.vision_tower,
            recipe.tower_steps,
            seed=1000,
            size=recipe.tower_batch,
            rate=recipe.tower_rate,
            progress=progress,
        )
    elif job.row == "start":
        model, rows = build_model(processor, recipe.shape, 1 + job.seed), []
        trained = LlavaForConditionalGeneration.from_pretrained(folder / job.needs)
        tower = trained.model.vision_tower.state_dict()
        model.model.vision_tower.load_state_dict(tower)
        _tune(job, recipe, model.to(device), processor, (0,), 2000, progress)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(folder / job.needs).to(device)
        rows = _tuned(job, recipe, model, processor, progress)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    seconds = time.perf_counter() - begun
    facts = {
        "job": job.name,
        "steps": job.steps,
        "seconds": round(seconds, 1),
        "date": date.today().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    # Written last and atomically: this file marks a job as done.
    partial = target / "scores.json.part"
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(target / "scores.json")


def _tune(
    job: Job,
    recipe: Recipe,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    counts: tuple[int, ...],
    seed: int,
    progress: Progress,
) -> None:
    """Train on captions, then conversations, as in LLaVA's two stages; the same for all methods."""
    made = batches(
        processor,
        seed + job.seed,
        recipe.batch,
        recipe.questions,
        counts,
        captions=job.steps * 3 // 4,
    )
    rate = recipe.start_rate if job.row == "start" else recipe.tune_rate
    tune(model, made, job.steps, rate=rate, progress=progress)


def _tuned(
    job: Job,
    recipe: Recipe,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    progress: Progress,
) -> list[dict]:
    """Train with the job's method and examine; the method stays applied for ``save_pretrained``."""
    torch.manual_seed(4000 + job.seed)  # for new rows and modules
    counts = recipe.counts
    method, drawn = None, (0,)
    if job.row == "full":
        # With the causal mask: half of the prompts without VoCo tokens, for the upper bound, and half
        # with them, for the lower bound.
        drawn = (*(0 for _ in counts), *counts)
    elif job.row == "voco drawn":
        method, drawn = baselines.apply("voco", model, processor, max(counts)), counts
    elif job.row in ("voco", "voco distinct"):
        distinct = job.row == "voco distinct"
        method = baselines.apply("voco", model, processor, job.count, distinct=distinct)
        drawn = (job.count,)
    elif job.row == "pooling":
        method = baselines.apply("pooling", model, processor, job.count)
    else:
        method = baselines.apply(
            "qformer",
            model,
            processor,
            job.count,
            layers=2,
            width=recipe.shape.hidden,
            heads=2,
            initializer_range=recipe.shape.hidden**-0.5,
            dropout=0.0,
        )
    _tune(job, recipe, model, processor, drawn, 5000, progress)

    exam = make_exam(recipe.pictures, recipe.exam_seed)
    text = processor.tokenizer(text_part(PRICED))["input_ids"]  # with BOS

    def row(name: str, tokens: int, method: Method) -> dict:
        cost = method.cost(len(text))
        return {
            "row": name,
            "tokens": tokens,
            "seed": job.seed,
            "accuracy": score(method, exam),
            "cache_bytes": cost.cache_bytes,
            "flops_first": cost.flops_first,
            "flops_again": cost.flops_again,
        }

    if method is not None and job.row != "voco drawn":
        return [row(job.row, job.count, method)]
    if method is not None:
        method.undo()
    rows = []
    for name, tokens, options in _untuned(job.row, recipe):
        with baselines.apply(name, model, processor, tokens, **options) as other:
            shown = job.row if name == "voco" else name
            rows.append(row(shown, other.num_tokens, other))
    if job.row == "voco drawn":  # saved as the model of the largest count
        baselines.apply("voco", model, processor, max(counts))
    return rows


def _untuned(row: str, recipe: Recipe) -> list[tuple[str, int | None, dict]]:
    """Methods examined without training on a job's model: method, tokens, options."""
    if row == "voco drawn":
        return [("voco", count, {}) for count in recipe.counts]
    found: list[tuple[str, int | None, dict]] = [("full", None, {})]
    for count in recipe.counts:
        found.append(("untrained", count, {}))
        found.append(("fastv", count, {"layer": recipe.fastv_layer}))
        found.append(("random", count, {}))
    return found

"""``evaluate``: methods of ``voco_model.baselines`` on the paper's benchmarks, through lmms-eval."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from voco_model import baselines
from voco_model.devices import device_name, usable_device
from voco_model.evaluate import results
from voco_model.evaluate.benchmarks import BENCHMARKS, check_tasks
from voco_model.evaluate.paper import model_of
from voco_model.evaluate.requests import SEVERAL_IMAGES
from voco_model.evaluate.tables import BOUNDS
from voco_model.vlm.load import model_class, read_config

logger = logging.getLogger(__name__)

# Methods that aren't trained to compress, measured on the model that was trained without the mask.
ON_UPPER = (*BOUNDS, "fastv", "random")
# Kinds of tasks that LMMSModel answers; the first is lmms-eval's default.
OUTPUT_TYPES = ("generate_until", "multiple_choice", "loglikelihood")
# Prompt styles that LLaVA-1.6 was trained with, by the paper's names; its configs don't say.
_OWN_STYLES = {"LLaVA-1.6-7B": "mistral", "LLaVA-1.6-34B": "chatml"}


def evaluate(
    model: str | os.PathLike,
    tasks: Sequence[str],
    *,
    output: str | os.PathLike,
    methods: Sequence[str] = ("full", "untrained", "voco"),
    num_tokens: int | None = None,
    upper: str | os.PathLike | None = None,
    checkpoints: Mapping[str, str | os.PathLike] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    several_images: str = "refuse",
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    task_manager=None,
) -> str | None:
    """Measure each method on each task; see ``docs/evaluation.md``.

    A method's results are written as soon as it is done. The table includes results that the folder
    already has, so that it can be made in several calls.

    Args:
        model: folder or hub name of a checkpoint in the Hugging Face layout.
        tasks: names of lmms-eval's tasks.
        output: a folder.
        methods: names in ``baselines.METHODS``, or with a number of tokens per image: ``"fastv:64"``.
        num_tokens: tokens per image for methods given without; by default the checkpoint's. ``"full"``
            has all tokens.
        upper: checkpoint for the methods that aren't trained to compress (``ON_UPPER``), instead of
            ``model``: the paper's bounds are from a model trained without the mask. If no such method
            is named, it is not used, and a warning says so.
        checkpoints: checkpoints by method, instead of ``model``.
        options: of ``baselines.apply``, by method. The ``style`` of prompts is by default what the
            method's checkpoint was tuned with; of a plain LLaVA what ``model``'s config says, else what
            LLaVA-1.6 was trained with, else ``"vicuna"``.
        limit: questions a task; by default all.
        batch_size: questions at a time.
        several_images: what becomes of a question with several images; see ``requests.image_of``.
        dtype: of the weights; ``"auto"`` as they are.
        device: where the model runs; by default a GPU, if there is one.
        task_manager: lmms-eval's, where it has other tasks than its own.

    Returns:
        the folder's table, as Markdown; under torchrun or accelerate on the first process alone.

    Raises:
        ModuleNotFoundError: no lmms-eval.
        OSError: data sets that can't be had.
        TypeError: a checkpoint of another model.
        ValueError: an unknown method, task or option; a checkpoint that wasn't made for its method;
            results that are there already, or were measured with other questions; a folder that can't
            be written to. Nothing is loaded then.
    """
    output = Path(output)
    options = options or {}
    device = usable_device(device)
    _check(tasks, limit, batch_size, several_images)
    named = _named(methods, num_tokens)
    names = list(dict.fromkeys(name for name, _ in named))
    if upper is not None:
        measured_on_it = [name for name in ON_UPPER if name in names]
        if not measured_on_it:
            logger.warning(
                "upper is not used: of these methods (%s) none is measured on it; %s would be",
                ", ".join(names),
                ", ".join(ON_UPPER),
            )
        checkpoints = {**dict.fromkeys(measured_on_it, upper), **(checkpoints or {})}
    for name in (*(checkpoints or {}), *options):
        if name not in names:
            raise ValueError(
                f"expected checkpoints and options of {', '.join(names)}, got some of {name}; name it "
                "among the methods"
            )
    for name, given in options.items():
        _check_options(name, given)
    paths = {name: str((checkpoints or {}).get(name, model)) for name in names}
    for name, path in paths.items():
        _check_made_for(name, path)
    runs = _runs([(name, _tokens(name, number, paths[name])) for name, number in named])
    options = {name: _with_style(options.get(name, {}), paths[name], model) for name in names}
    facts = {
        "tasks": list(tasks),
        "limit": limit,
        "several_images": several_images,
        "paper_model": model_of(read_config(model)),
    }
    for run in runs:
        results.check_new(output, run)
    results.check_comparable(output, facts)
    task_manager = _checked_manager(task_manager, tasks)
    _check_writable(output)

    for run, (name, tokens) in runs.items():
        given = options[name]
        method = baselines.load(
            paths[name], name, num_tokens=tokens, dtype=dtype, device=device, **given
        )
        started = time.monotonic()
        measured = _measure(method, task_manager, output, facts, batch_size)
        if measured is not None:
            record = {
                "run": run,
                "method": name,
                "label": method.label,
                "num_tokens": method.num_tokens,
                "options": dict(given),
                "checkpoint": paths[name],
                **facts,
                "batch_size": batch_size,
                "dtype": str(method.model.dtype).removeprefix("torch."),
                "device": device_name(method.model.device),
                "versions": results.versions(),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - started, 1),
                "samples": measured["n-samples"],
                "results": measured["results"],
            }
            results.write(output, record)
        del method
        gc.collect()  # two models at a time may not fit
    return results.table_of(output) if int(os.environ.get("RANK", 0)) == 0 else None


def _measure(method, task_manager, output: Path, facts: Mapping, batch_size: int) -> dict | None:
    """lmms-eval's own results; None on every process but the first."""
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    from voco_model.evaluate.lmms_model import LMMSModel

    try:
        return simple_evaluate(
            model=LMMSModel(method, batch_size=batch_size, several_images=facts["several_images"]),
            tasks=list(facts["tasks"]),
            limit=facts["limit"],
            batch_size=batch_size,
            task_manager=task_manager,
            log_samples=False,
            bootstrap_iters=0,
            # Some tasks write files beside their scores, into output_path.
            cli_args=Namespace(output_path=str(output), process_with_media=False),
        )
    except RetryError as error:  # lmms-eval tries to get a data set several times
        cause = error.last_attempt.exception()
        raise OSError(
            f"expected the data sets of {', '.join(facts['tasks'])}, got {type(cause).__name__}: "
            f"{cause}; most want a login: hf auth login"
        ) from error


def _check(tasks: Sequence[str], limit: int | None, batch_size: int, several_images: str) -> None:
    check_tasks(tasks)
    for name, value in {"limit": limit, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")
    if several_images not in SEVERAL_IMAGES:
        raise ValueError(
            f"expected several_images as one of {', '.join(SEVERAL_IMAGES)}, got {several_images!r}"
        )
    for benchmark in BENCHMARKS.values():
        for task in benchmark.tasks:
            if several_images == "refuse" and benchmark.several_images and task in tasks:
                raise ValueError(
                    f"expected several_images='middle' for {task}, got 'refuse'; its questions on "
                    "videos come with several frames, of which the middle one can stand for all, as "
                    "LLaVA's authors do it"
                )


def _named(methods: Sequence[str], num_tokens: int | None) -> list[tuple[str, int | None]]:
    """``["full", "fastv:64"]`` -> method and number of tokens of each."""
    named = []
    for method in methods:
        name, colon, tokens = method.partition(":")
        if name not in baselines.METHODS:
            raise ValueError(f"expected methods of {', '.join(baselines.METHODS)}, got {method!r}")
        if colon and not (tokens.isdecimal() and int(tokens) >= 1):
            raise ValueError(f"expected a method as {name}:TOKENS, got {method!r}")
        number = int(tokens) if colon else None if name == "full" else num_tokens
        if number is not None and number < 1:
            raise ValueError(f"expected num_tokens >= 1, got {number}")
        named.append((name, number))
    if not named:
        raise ValueError("expected at least one method, got none")
    return named


def _tokens(name: str, number: int | None, path: str) -> int | None:
    """Of an image: the number given, else what ``baselines.load`` takes from the checkpoint."""
    config = AutoConfig.from_pretrained(path)
    if number is not None or name == "full":
        return number
    if name in ("voco", "untrained"):
        return getattr(config, "num_voco", None) or 1
    saved = getattr(config, "voco_baseline", None) or {}
    if saved.get("name") != name:
        raise ValueError(
            f"expected a number of tokens for {name}, got none; write {name}:64, or num_tokens=64, "
            "--num-tokens 64"
        )
    return saved["num_tokens"]


def _runs(named: Sequence[tuple[str, int | None]]) -> dict[str, tuple[str, int | None]]:
    """By the names of their results."""
    runs: dict[str, tuple[str, int | None]] = {}
    for name, number in named:
        run = name if number is None else f"{name}:{number}"
        if run in runs or (name in BOUNDS and name in [known for known, _ in runs.values()]):
            raise ValueError(f"expected each method once, got {run} again")
        runs[run] = (name, number)
    return runs


def _with_style(given: Mapping[str, Any], path: str, model: str | os.PathLike) -> dict[str, Any]:
    """A method's options, with the style of prompts where its checkpoint is a plain LLaVA."""
    config = AutoConfig.from_pretrained(path)
    tuned = ("num_voco", "voco_baseline", "voco_prompt")
    style = getattr(AutoConfig.from_pretrained(model), "voco_prompt", None)
    style = style or _OWN_STYLES.get(model_of(config))
    if style is None or any(getattr(config, name, None) for name in tuned):
        return dict(given)
    return {"style": style, **given}


def _check_options(name: str, given: Mapping[str, Any]) -> None:
    parameters = inspect.signature(baselines.METHODS[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in given:
        if option not in known:
            raise ValueError(
                f"expected an option of {name} ({', '.join(known) or 'it has none'}), got {option!r}"
            )


def _check_made_for(name: str, path: str) -> None:
    """Raise unless this is a LLaVA, and tuned for the method if that needs it."""
    model_class(path, replaced_projector=True)
    config = AutoConfig.from_pretrained(path)
    saved = getattr(config, "voco_baseline", None) or {}
    made_for = saved.get("name", "voco" if hasattr(config, "num_voco") else None)
    # A LLaVA as it is reads all tokens.
    if baselines.METHODS[name].trained and name not in ("full", made_for):
        raise ValueError(
            f"expected a checkpoint that was trained for {name}, got {path}, which is of "
            f"{made_for or 'a plain LLaVA'}; name one with checkpoints={{{name!r}: ...}}, "
            f"--checkpoint {name}=PATH"
        )
    if made_for not in (None, "full", name):
        raise ValueError(
            f"expected for {name} a model that wasn't trained to compress, got {path}, which is of "
            f"{made_for}; name one with upper=..., --upper PATH, or --checkpoint {name}=PATH"
        )


def _check_writable(output: Path) -> None:
    """Make the folder: results would be lost after hours."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"expected a folder for results, got {output}: {error}") from None
    if not os.access(output, os.W_OK | os.X_OK):
        raise ValueError(
            f"expected a folder that can be written to, got {output}; name another with output=..., "
            "--output PATH"
        )


def _checked_manager(task_manager, tasks: Sequence[str]):
    try:
        from lmms_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected lmms-eval, got {error}; pip install 'voco-kernels[eval]'", name=error.name
        ) from error
    if task_manager is None:
        task_manager = TaskManager(verbosity="WARNING", model_name="voco")
    unknown = [task for task in tasks if task not in task_manager.all_tasks]
    if unknown:
        known = dict.fromkeys(task for b in BENCHMARKS.values() for task in b.tasks)
        raise ValueError(
            f"expected tasks of lmms-eval, got {', '.join(unknown)}; the paper's are "
            f"{', '.join(known)}, all are listed by: lmms-eval --tasks list"
        )
    for task in tasks:
        _check_kind(task_manager, task)
    return task_manager


def _check_kind(task_manager, task: str) -> None:
    """Raise ``ValueError`` if answers are asked for in a way that ``LMMSModel`` has not."""
    from lmms_eval.utils import load_yaml_config

    entry = task_manager.task_index[task]
    config = {}
    if entry["yaml_path"] != -1:  # a tag has no file of its own
        config = load_yaml_config(entry["yaml_path"], mode="simple")
    if entry["type"] != "task":
        parts = entry["task"] if isinstance(entry.get("task"), list) else config.get("task", ())
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, str) and part in task_manager.task_index:
                _check_kind(task_manager, part)
        return
    kind = config.get("output_type", OUTPUT_TYPES[0])
    if kind not in OUTPUT_TYPES:
        raise ValueError(
            f"expected tasks of output_type {' or '.join(OUTPUT_TYPES)}, got {task} of {kind}; leave it "
            "out"
        )

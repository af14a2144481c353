"""Generation options of lmms-eval's own tasks: heeded, or left out with one warning."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.voco_model import tiny
from voco_model import baselines
from voco_model.evaluate import run
from voco_model.evaluate.requests import (
    MAX_NEW_TOKENS,
    generation_options,
    turns_of,
    unknown_options,
)

needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval")


class _Tasks(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """With lmms-eval's own tag, whose functions aren't looked up."""


_Tasks.add_multi_constructor("!", lambda loader, suffix, node: None)


@pytest.fixture(scope="module")
def given() -> list[dict]:
    """Every ``generation_kwargs`` in lmms-eval's tasks and their templates, each once."""
    folder = Path(find_spec("lmms_eval").submodule_search_locations[0]) / "tasks"
    found = {}
    for path in folder.rglob("*"):
        if (
            not path.name.endswith(("yaml", ".yml"))
            or b"generation_kwargs" not in path.read_bytes()
        ):
            continue
        options = yaml.load(path.read_text(), Loader=_Tasks).get("generation_kwargs")
        if isinstance(options, dict):
            found[json.dumps(options, sort_keys=True)] = options
    assert len(found) > 50
    return list(found.values())


@pytest.fixture(scope="module")
def methods():
    made = [
        baselines.apply(name, tiny.tiny_llava("llava"), tiny.tiny_processor("llava"), **more)
        for name, more in (("voco", {"num_tokens": 1}), ("full", {}), ("fastv", {"num_tokens": 4}))
    ]
    yield made
    for method in made:
        method.undo()


@needs_lmms_eval
def test_no_task_of_lmms_eval_dies_of_its_options(given, methods):
    names = {name for options in given for name in options}
    heeded = {
        *("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams"),
        *("repetition_penalty", "until", "stop_sequences"),
    }
    left_out = {"seed", "skip_special_tokens", "visual_cot", "max_agentic_steps"}
    assert set(unknown_options(dict.fromkeys(names, 1))) == left_out
    assert names == heeded | left_out | {"image_aspect_ratio"}
    asked = {}
    for options in given:
        made, until = generation_options(options)
        assert set(made) <= heeded and made["max_new_tokens"] == options.get("max_new_tokens", 128)
        assert until == options.get("until", options.get("stop_sequences", []))
        made["max_new_tokens"] = 1
        asked[json.dumps(made, sort_keys=True)] = made
    assert 3 < len(asked) < 40
    for options in asked.values():
        for method in methods:
            (answer,) = method.answer([tiny.picture(1)], [turns_of("Hi", True)], **options)
            assert isinstance(answer, str)


@pytest.mark.parametrize(
    "given, options, until",
    [
        ({"max_gen_toks": 7, "stop": "\n"}, {"max_new_tokens": 7, "do_sample": False}, ["\n"]),
        ({"max_tokens": 7, "until": ["a", "b"], "stop": ["b"]}, {"max_new_tokens": 7}, ["a", "b"]),
        ({"max_new_tokens": 3, "max_tokens": 7}, {"max_new_tokens": 3}, []),
        ({"do_sample": True, "temperature": 0}, {"do_sample": False}, []),
        ({"do_sample": True, "temperature": 1}, {"do_sample": True, "temperature": 1.0}, []),
        ({"do_sample": False, "temperature": 0.7, "top_k": 3, "min_p": 0.1}, {}, []),
        (
            {"temperature": "0.5", "top_k": 3},
            {"temperature": 0.5, "top_k": 3, "do_sample": True},
            [],
        ),
        ({"repetition_penalty": 1, "seed": 0}, {"repetition_penalty": 1.0}, []),
    ],
)
def test_options_that_are_heeded(given, options, until):
    expected = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **options}
    assert generation_options(given) == (expected, until)


def requests_of(task: str, options: dict, count: int = 2) -> list:
    def visual(document):
        return document["images"]

    return [
        SimpleNamespace(args=("What?", options, visual, number, task, "test"))
        for number in range(count)
    ]


@needs_lmms_eval
def test_options_that_are_left_out_are_told_once(methods, caplog):
    from voco_model.evaluate import lmms_model

    lmms_model._warn_left_out.cache_clear()
    documents = {"test": [{"images": [tiny.picture(number)]} for number in range(2)]}
    for method in methods[:2]:
        model = lmms_model.LMMSModel(method)
        model.task_dict = {"microvqa": documents, "gqa": documents}
        known = {"max_new_tokens": 1, "image_aspect_ratio": "pad", "until": ["x"], "top_p": None}
        asked = requests_of("microvqa", {**known, "seed": 0, "best_of": 2, "n": None})
        assert len(model.generate_until([*asked, *requests_of("gqa", known)])) == 4
    told = [r for r in caplog.records if r.name == "voco_model.evaluate.lmms_model"]
    assert [(r.levelno, r.getMessage()) for r in told] == [
        (logging.WARNING, "generation options of microvqa are ignored: seed, best_of")
    ]


@needs_lmms_eval
@pytest.mark.parametrize("name", ["rounds", "group", "tagged"])
def test_other_kinds_of_tasks_are_refused_before_anything_is_loaded(tmp_path, name):
    from lmms_eval.tasks import TaskManager

    common = "dataset_path: json\ntest_split: test\ndoc_to_text: question\n"
    (tmp_path / "template").write_text(common + "output_type: generate_until_multi_round\n")
    (tmp_path / "rounds.yaml").write_text("task: rounds\ninclude: template\ntag: tagged\n")
    (tmp_path / "once.yaml").write_text("task: once\n" + common)
    (tmp_path / "group.yaml").write_text("group: group\ntask: [once, rounds]\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, model_name="voco")
    assert run._checked_manager(manager, ["once"]) is manager
    with pytest.raises(ValueError, match="got rounds of generate_until_multi_round; leave it out"):
        run._checked_manager(manager, ["once", name])

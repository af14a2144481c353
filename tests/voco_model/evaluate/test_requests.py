"""From lmms-eval's requests to a method's arguments and back; and its scores in the paper's units."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.voco_model.tiny import picture
from voco_model.evaluate.benchmarks import BENCHMARKS, check_tasks, scores_of
from voco_model.evaluate.requests import (
    MAX_NEW_TOKENS,
    cut,
    generation_options,
    image_of,
    question_of,
    turns_of,
)
from voco_model.vlm.prompt import prompt


@pytest.mark.parametrize(
    "context",
    ["<image>\nWhat is it?", "What is it?\n<image>", "<image> <image>What is it?", "What is it?\n"],
)
def test_placeholders_leave_a_question(context):
    question = question_of(context)
    assert question == "What is it?"
    assert prompt(turns_of(question, True)).startswith("<image>\n<VoCo>\n")
    assert "<image>" not in prompt(turns_of(question, False))


def test_an_image_a_question():
    first, second, third = map(picture, range(3))
    assert image_of([first], "refuse", "question 3 of gqa") is first
    assert image_of([], "refuse", "question 3 of gqa") is None
    assert image_of(None, "refuse", "question 3 of gqa") is None
    assert image_of((first, second, third), "middle", "question 3 of seedbench") is second
    with pytest.raises(ValueError, match="expected one image, got 2 in question 3 of seedbench"):
        image_of([first, second], "refuse", "question 3 of seedbench")
    with pytest.raises(ValueError, match="expected images, got str in question 0 of videomme"):
        image_of(["film.mp4"], "middle", "question 0 of videomme")


def test_generation_is_greedy_unless_the_task_wants_samples():
    gqa = {
        "max_new_tokens": 16,
        "temperature": 0.0,
        "top_p": 1.0,
        "num_beams": 1,
        "do_sample": False,
    }
    assert generation_options({**gqa, "until": ["\n\n"]}) == (
        {"max_new_tokens": 16, "do_sample": False},
        ["\n\n"],
    )
    assert generation_options({"until": "ASSISTANT:", "image_aspect_ratio": "original"}) == (
        {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False},
        ["ASSISTANT:"],
    )
    assert generation_options({"temperature": 0.7, "top_p": None, "num_beams": 3}) == (
        {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.7, "num_beams": 3, "do_sample": True},
        [],
    )


def test_an_answer_ends_where_the_task_says():
    assert cut("A cup.\n\nUSER: and", ["\n\n", "USER:"]) == "A cup."
    assert cut("red USER: x\n\ny", ["\n\n", "USER:"]) == "red"
    assert cut(" all of it ", ["", "ASSISTANT:"]) == "all of it"


def test_scores_are_in_the_papers_units():
    measured = {
        "vqav2_val_lite": {
            "alias": "vqav2",
            "exact_match,none": 0.75,
            "exact_match_stderr,none": 0.1,
        },
        "mme": {"mme_perception_score,none": 1487.2, "mme_cognition_score,none": 300.0},
        "pope": {"pope_accuracy,none": 0.9, "pope_f1_score,none": 0.85},
        "mmbench_en_dev_static": {"gpt_eval_score,none": 64.0, "submission,none": None},
        "seedbench": {"seed_image,none": 0.66, "seed_video,none": 0.37, "seed_all,none": 0.58},
        "mine": {"alias": "mine", " ": " ", "acc,none": 0.5, "acc_stderr,none": "N/A"},
    }
    assert scores_of(measured) == {
        "VQAv2": 75.0,
        "SEED": pytest.approx(58.0),
        "SEED-I": 66.0,
        "POPE": 85.0,
        "MME": 1487.2,
        "MMB": 64.0,
        "mine acc": 0.5,
    }


def test_tasks_of_a_run():
    check_tasks(["gqa", "vqav2_val_lite", "mine"])
    with pytest.raises(ValueError, match="one task of VQAv2, got vqav2_val_lite and vqav2_val"):
        check_tasks(["vqav2_val_lite", "gqa", "vqav2_val"])
    with pytest.raises(ValueError, match="each task once, got gqa twice"):
        check_tasks(["gqa", "gqa"])
    with pytest.raises(ValueError, match="at least one task"):
        check_tasks([])


class _Tasks(yaml.BaseLoader):
    """With lmms-eval's own tag, whose functions aren't looked up."""


_Tasks.add_constructor("!function", lambda loader, node: node.value)


def test_lmms_eval_has_these_tasks_and_metrics():
    spec = find_spec("lmms_eval")
    if spec is None:
        pytest.skip("needs lmms-eval")
    folder = Path(spec.submodule_search_locations[0]) / "tasks"
    for benchmark in BENCHMARKS.values():
        for task in benchmark.tasks:
            (path,) = folder.rglob(f"{task}.yaml")
            declared = yaml.load(path.read_text(), Loader=_Tasks)
            assert declared["task"] == task
            assert benchmark.metric in [entry["metric"] for entry in declared["metric_list"]]

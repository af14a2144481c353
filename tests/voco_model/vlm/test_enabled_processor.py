"""What ``enable`` adds to a processor: ``assistant_masks``, token by token, and a model card."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoProcessor

import voco_model
from tests.voco_model import tiny
from voco_model import baselines
from voco_model.vlm.enabled_processor import EnabledProcessor

OPTIONS = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}


def turns(*answers: str, images: int = 0) -> list[dict]:
    pictures = [{"type": "image", "image": tiny.picture(n)} for n in range(images)]
    messages = []
    for number, answer in enumerate(answers):
        shown = pictures if number == len(answers) - 1 else []
        question = [*shown, {"type": "text", "text": f"Question {number}?"}]
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


def marked(processor, made) -> list[list[str]]:
    """What is marked in each row, in runs."""
    rows = []
    for ids, mask in zip(made["input_ids"], made["assistant_masks"], strict=True):
        mask = torch.as_tensor(mask)
        assert len(ids) == len(mask)
        places = mask.nonzero()[:, 0]
        starts = (places.diff() > 1).nonzero()[:, 0] + 1
        runs = places.tensor_split(starts)
        rows.append([processor.tokenizer.decode(torch.as_tensor(ids)[run]) for run in runs])
    return rows


@pytest.fixture
def processor(model, processor):
    with voco_model.enable(model, processor, num_voco=2):
        yield processor


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("tensors", [None, "pt"])
def test_answers_are_marked(processor, images, tensors):
    given = turns("A cup.", "It is <s>red</s>.", images=images)
    made = processor.apply_chat_template(given, return_tensors=tensors, num_voco=3, **OPTIONS)
    assert marked(processor, made) == [[" A cup.</s>", " It is <s>red</s>.</s>"]]
    assert isinstance(made["assistant_masks"], torch.Tensor) == (tensors == "pt")


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_unequal_rows(processor, side):
    given = [turns("A cup.", images=1), turns("Red.", "No.", images=1)]
    made = processor.apply_chat_template(
        given,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": side},
        **OPTIONS,
    )
    assert marked(processor, made) == [[" A cup.</s>"], [" Red.</s>", " No.</s>"]]
    assert not made["assistant_masks"][made["attention_mask"] == 0].any()


def test_a_row_that_is_cut_off(processor):
    whole = processor.apply_chat_template(turns("A cup.", images=1), **OPTIONS)
    length = len(whole["input_ids"][0]) - 3
    made = processor.apply_chat_template(
        turns("A cup.", images=1),
        processor_kwargs={"truncation": True, "max_length": length},
        **OPTIONS,
    )
    assert marked(processor, made) == [[" A cu"]]


def test_processors_are_copied_pickled_and_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor).__bases__[1]
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert isinstance(other, EnabledProcessor) and type(other) is type(processor)
        made = other.apply_chat_template(turns("A cup.", images=1), **OPTIONS)
        assert marked(other, made) == [[" A cup.</s>"]]


def test_undo_gives_the_class_back(kind):
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    before = type(processor)
    with voco_model.enable(model, processor):
        assert isinstance(processor, before) and type(processor) is not before
    assert type(processor) is before


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_are_marked_beside_padding_and_without_images(processor, side):
    processor.tokenizer.padding_side = side
    rows = [turns("aa"), turns("bb", "Longer than that."), turns("c", images=1)]
    made = processor.apply_chat_template(
        rows, processor_kwargs={"return_tensors": "pt", "padding": True}, **OPTIONS
    )
    assert marked(processor, made) == [
        [" aa</s>"],
        [" bb</s>", " Longer than that.</s>"],
        [" c</s>"],
    ]


def test_a_saved_checkpoint_says_how_to_load_it(kind, tmp_path):
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    card = tmp_path / "README.md"
    with voco_model.enable(model, processor, num_voco=3):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        text = card.read_text()
        assert "voco_model.load(" in text and "VoCo tokens (3 per image)" in text
        assert "`from_pretrained` alone is not enough" in text
        card.write_text("a card of the user's own")
        processor.save_pretrained(tmp_path)
        assert card.read_text() == "a card of the user's own"
        processor.save_pretrained(tmp_path / "alone")  # before the model: no config yet
        assert "only\nthrough its VoCo tokens." in (tmp_path / "alone" / "README.md").read_text()
    card.unlink()
    processor.save_pretrained(tmp_path)
    assert not card.exists()


def test_an_upper_bound_has_no_card(tmp_path):
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    with baselines.apply("full", model, processor, num_voco=2):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()

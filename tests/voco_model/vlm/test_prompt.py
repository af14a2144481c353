"""Prompts against strings written by hand, from Listing 1 of the supplement."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import voco_model
from tests.voco_model import tiny
from voco_model.vlm.prompt import image_part, images_in, pictures_in, text_part

ONE_QUESTION = (
    "<image>\n<VoCo><VoCo>\n A chat between a curious user and an artificial intelligence "
    "assistant of the given image. The assistant gives helpful, detailed, and polite answers to "
    "the user's questions. USER: What is the man doing in the image? ASSISTANT:"
)
LISTING_1 = (
    "<image>\n<VoCo>\n A chat between a curious user and an artificial intelligence assistant of "
    "the given image. The assistant gives helpful, detailed, and polite answers to the user's "
    "questions. USER: What is the man doing in the image? ASSISTANT: He is sitting.</s>"
    "USER: Is there any other animal present in the image? ASSISTANT: Yes,\na cat.</s>"
)
TEXT_ONLY = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: Hello? ASSISTANT:"
)
TURNS = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is the man doing in the image?"},
            {"type": "image"},  # wherever it stands, it goes to the front
        ],
    },
    {"role": "assistant", "content": "He is sitting."},
    {"role": "user", "content": "Is there any other animal present in the image?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes,\na cat."}]},
]
HELLO = [{"role": "user", "content": "Hello?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]


def test_prompts_are_those_of_the_listing():
    assert voco_model.prompt("What is the man doing in the image?", 2) == ONE_QUESTION
    assert voco_model.prompt(TURNS, add_generation_prompt=False) == LISTING_1
    assert voco_model.prompt(HELLO) == TEXT_ONLY
    assert voco_model.prompt("Hello?", images=0) == TEXT_ONLY
    two = voco_model.prompt("Hello?", images=2)
    assert two.startswith("<image>\n<VoCo>\n<image>\n<VoCo>\n A chat")


def test_the_two_parts_make_the_whole():
    question = "What is the man doing in the image?"
    assert image_part(2) + text_part(question) == ONE_QUESTION


@pytest.fixture
def with_processor(model, processor):
    with voco_model.enable(model, processor, num_voco=2):
        yield processor


@pytest.mark.parametrize("num_voco", [None, 1, 5])
@pytest.mark.parametrize("go_on", [True, False])
@pytest.mark.parametrize("turns", [TURNS, HELLO, SYSTEM + TURNS, SYSTEM + HELLO])
def test_chat_template_writes_the_same(with_processor, turns, num_voco, go_on):
    variables = {} if num_voco is None else {"num_voco": num_voco}
    written = with_processor.apply_chat_template(turns, add_generation_prompt=go_on, **variables)
    assert written == voco_model.prompt(turns, num_voco or 2, add_generation_prompt=go_on)


@pytest.mark.parametrize("value", [{"url": "https://a.b/c.png", "detail": "low"}, "c.png"])
def test_image_url_parts_are_images(with_processor, value):
    parts = [
        {"type": "image_url", "image_url": value},
        {"type": "text", "text": "What is the man "},
    ]
    turns = [{"role": "user", "content": [*parts, {"type": "text", "text": "doing in the image?"}]}]
    assert images_in(turns) == 1
    assert voco_model.prompt(turns, 2) == ONE_QUESTION
    written = with_processor.apply_chat_template(copy.deepcopy(turns), add_generation_prompt=True)
    assert written == ONE_QUESTION
    # The template by itself, as other renderers use it.
    rendered = with_processor.tokenizer.apply_chat_template(
        turns,
        chat_template=with_processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == ONE_QUESTION
    assert pictures_in(turns) == [{"image_url": value}]


def test_pictures_in_messages_are_those_that_are_given():
    picture = tiny.picture(0)
    parts = [{"type": "image"}, {"type": "image", "image": picture}, {"type": "image", "url": "x"}]
    turns = [{"role": "user", "content": [*parts, {"type": "text", "text": "a"}]}, *HELLO]
    assert pictures_in(turns) == [{"image": picture}, {"url": "x"}]
    assert pictures_in("Hello?") == pictures_in(HELLO) == []
    assert (images_in("Hello?"), images_in("Hello?", question=0), images_in(turns)) == (1, 0, 3)


def test_bos_comes_once(with_processor):
    picture = {"type": "image", "image": tiny.picture(0)}
    turns = [{"role": "user", "content": [picture, {"type": "text", "text": "Who?"}]}]
    by_template = with_processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    by_hand = with_processor(
        images=tiny.picture(0), text=voco_model.prompt("Who?", 2), return_tensors="pt"
    )
    ids = by_hand["input_ids"]
    assert by_template["input_ids"].equal(ids)
    assert ids[0, 0] == tiny.BOS
    assert (ids == tiny.BOS).sum() == 1
    assert (ids == tiny.VOCO).sum() == 2


def test_answers_can_be_found(with_processor):
    turns = [*HELLO, {"role": "assistant", "content": "A man."}]
    batch = with_processor.apply_chat_template(
        turns,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    answer = batch["input_ids"][0][torch.as_tensor(batch["assistant_masks"])[0].bool()]
    # A model goes on from "ASSISTANT:", so the space is its own to write.
    assert with_processor.tokenizer.decode(answer) == " A man.</s>"


def test_refuses_what_it_cannot_write(with_processor):
    def refused(message, turns, **kwargs):
        with pytest.raises(ValueError, match=message):
            voco_model.prompt(turns, **kwargs)

    refused("without <image>", "What is <image>?")
    refused("without <VoCo>", [{"role": "user", "content": "<VoCo>"}])
    refused("'tool' in message 0", [{"role": "tool", "content": "x"}])
    refused("'system' in message 1", HELLO + SYSTEM)
    refused("'text', 'image' and 'im", [{"role": "user", "content": [{"type": "video"}]}])
    refused("got .* as message 0", [{"role": "user", "content": [{"type": "image_url"}]}])
    refused("got none", [])
    for wrong in (0, 2.0, True, "2", None):
        refused(f"int num_voco >= 1, got {wrong!r}", "Hello?", num_voco=wrong)
    refused("int images >= 0, got -1", "Hello?", images=-1)
    assert voco_model.prompt("Hello?", np.int64(2)) == voco_model.prompt("Hello?", 2)
    for turns in ([{"role": "user", "content": "<VoCo>"}], HELLO + SYSTEM):
        with pytest.raises(Exception, match="expected (text without|role user)"):
            with_processor.apply_chat_template(turns)

import numpy as np
import pytest
import torch
from PIL import Image

import voco_model
from voco_model.data.encode import IGNORE, Encoder
from voco_model.data.pictures import Picture
from voco_model.data.samples import Sample
from voco_model.miniature.batches import Conversations, batches, pixels
from voco_model.miniature.model import VISION_TOKENS, Shape, build_model, build_processor
from voco_model.miniature.scenes import KINDS, ask, draw_scene, paint
from voco_model.miniature.training import answer_loss


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def questions(seed=0):
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, "train")
    return paint(scene, "train", rng), [ask(scene, kind, rng) for kind in KINDS]


def test_conversations_are_encoded_as_the_training_command_does(processor):
    picture, asked = questions()
    messages = []
    for question in asked:
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": question.answer})
    sample = Sample("here", messages, [Picture(Image.fromarray(picture), "here")])
    expected = Encoder(processor, "vicuna", 1000).encode(sample, 2)
    ids, labels = Conversations(processor).encode(asked, 2)
    assert ids == expected.input_ids.tolist()
    assert labels == expected.labels.tolist()
    assert torch.equal(pixels([picture]), expected.pixel_values)


def test_without_voco_tokens_the_rest_stays(processor):
    _, asked = questions()
    conversations = Conversations(processor)
    ids, _ = conversations.encode(asked, 0)
    with_two, _ = conversations.encode(asked, 2)
    newline = processor.tokenizer.convert_tokens_to_ids("Ċ")
    at = with_two.index(processor.tokenizer.voco_token_id)
    assert with_two[at - 1] == newline and ids.count(processor.tokenizer.image_token_id) == 144
    assert ids == with_two[: at - 1] + with_two[at + 2 :]


def test_every_word_of_a_question_is_a_token(processor):
    for seed in range(20):
        for question in questions(seed)[1]:
            tokens = processor.tokenizer.tokenize(f" {question.text} ASSISTANT: {question.answer}")
            assert (
                len(tokens) == len(question.text.split()) + 4
            )  # "?", "ASSISTANT", ":", the answer


def test_padding_on_the_right_changes_no_loss(processor):
    model = build_model(processor, Shape(layers=2, tower_layers=1), 0)
    batch = next(batches(processor, 5, 3, 4, (1,)))
    assert (batch.input_ids == processor.tokenizer.pad_token_id).any()
    assert (batch.input_ids == processor.tokenizer.image_token_id).sum() == 3 * VISION_TOKENS
    for enabled in (False, True):
        if enabled:
            voco_model.enable(model, processor, 1)
        each = 0.0
        for row in range(3):
            real = int((batch.input_ids[row] != processor.tokenizer.pad_token_id).sum())
            loss = model(
                input_ids=batch.input_ids[row : row + 1, :real],
                labels=batch.labels[row : row + 1, :real],
                pixel_values=batch.pixel_values[row : row + 1],
            ).loss
            each += loss * (batch.labels[row] != IGNORE).sum()
        learnt = (batch.labels != IGNORE).sum()
        torch.testing.assert_close(answer_loss(model, batch), each / learnt)


def test_batches_draw_their_count_of_voco_tokens(processor):
    made = batches(processor, 0, 2, 2, (0, 1, 4))
    found = {
        int((next(made).input_ids == processor.tokenizer.voco_token_id).sum()) for _ in range(20)
    }
    assert found == {0, 2, 8}


def test_captions_give_way_to_conversations(processor):
    made = batches(processor, 0, 1, 3, (0,), captions=60)
    described = [
        "Describe" in processor.tokenizer.decode(next(made).input_ids[0]) for _ in range(80)
    ]
    early, middle, late = described[:20], described[20:40], described[40:60]
    assert described[0] and sum(early) > sum(middle) > sum(late) > 0
    assert not any(described[60:])
    plain = batches(processor, 0, 1, 3, (0,))
    assert "Describe" not in processor.tokenizer.decode(next(plain).input_ids[0])


def test_all_methods_of_a_seed_see_the_same_pictures(processor):
    """However many VoCo tokens they have, or draw from."""
    one, several = batches(processor, 3, 2, 4, (1,)), batches(processor, 3, 2, 4, (0, 2, 8))
    for _ in range(4):
        first, other = next(one), next(several)
        assert torch.equal(first.pixel_values, other.pixel_values)
        assert torch.equal(
            first.labels[first.labels != IGNORE], other.labels[other.labels != IGNORE]
        )

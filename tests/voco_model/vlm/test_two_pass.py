"""Two passes against one: the same logits, the same tokens, whatever the padding and the search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPTNeoXConfig

import voco_model
from tests.voco_model import tiny

STEPS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
QUESTIONS = ["What is it?", "Who?", "Where does the man in the picture look?"]


def texts_of(inputs: dict, kinds: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' text tokens, padded on the left, and their mask."""
    rows = [
        ids[torch.tensor([letter == "t" for letter in letters])]
        for ids, letters in zip(inputs["input_ids"], kinds, strict=True)
    ]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), tiny.PAD)
    for row, words in enumerate(rows):
        ids[row, length - len(words) :] = words
    return ids, (ids != tiny.PAD).long()


@pytest.fixture
def with_processor(model, processor):
    with voco_model.enable(model, processor, num_voco=2):
        yield model, processor


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [[(1, 6)], [(2, 6), (2, 3), (2, 9)], [(1, 5), (8, 7), (3, 1)]])
def test_logits_equal_those_of_one_pass(enabled, rows, side):
    inputs, kinds = tiny.batch_of(enabled, rows, side)
    positions = tiny.positions_of(inputs["attention_mask"])
    with torch.no_grad():
        logits = enabled(**inputs, position_ids=positions).logits
    last = [letters.rindex("t") for letters in kinds]
    entries = voco_model.compress(enabled, inputs=inputs, batch_size=2)
    text, mask = texts_of(inputs, kinds)
    output = voco_model.generate(
        enabled,
        entries,
        text,
        attention_mask=mask,
        output_logits=True,
        return_dict_in_generate=True,
        max_new_tokens=1,
    )
    expected = logits[torch.arange(len(rows)), last]
    torch.testing.assert_close(output.logits[0], expected, atol=1e-5, rtol=1e-5)


def test_entries_hold_the_voco_tokens_and_nothing_else(enabled, kind):
    inputs, kinds = tiny.batch_of(enabled, [(1, 6), (8, 3)])
    one, eight = voco_model.compress(enabled, inputs=inputs)
    heads = {"llava": 4, "next": 2}[kind]
    for entry, letters, tokens in ((one, kinds[0], 1), (eight, kinds[1], 8)):
        context = letters.count("v")
        assert entry.kv.shape == (3, 2, heads, tokens, 16)
        assert entry.nbytes == 3 * 2 * heads * tokens * 16 * 4
        assert entry.kv.untyped_storage().nbytes() == entry.nbytes
        assert entry.positions.tolist() == list(range(context, context + tokens))
        assert entry.next_position == context + tokens
        assert not entry.kv.requires_grad


def test_compressing_does_not_depend_on_text_padding_or_batch(enabled):
    vision, (image, _) = tiny.vision_inputs(enabled, 2)
    head = [tiny.BOS] + [tiny.IMAGE] * image + [9, tiny.VOCO, tiny.VOCO]
    first = {name: value[:1] for name, value in vision.items()}
    alone = voco_model.compress(enabled, inputs={"input_ids": torch.tensor([head]), **first})[0]
    for before, after in ((0, 4), (3, 2)):
        ids = torch.tensor([[tiny.PAD] * before + head + [33] * after])
        mask = (torch.arange(ids.shape[1]) >= before).long()[None]
        padded = {"input_ids": ids, "attention_mask": mask, **first}
        other = voco_model.compress(enabled, inputs=padded)[0]
        assert other.positions.equal(alone.positions)
        assert other.next_position == alone.next_position
        torch.testing.assert_close(other.kv, alone.kv, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "search", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_tokens_equal_those_of_one_pass(with_processor, search):
    """Ragged questions, images of different sizes; the single pass is stock generate, masked."""
    model, processor = with_processor
    pictures = [tiny.picture(0), tiny.picture(1, (32, 64)), tiny.picture(2, (50, 64))]
    prompts = [voco_model.prompt(question, 2) for question in QUESTIONS]
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, **STEPS, **search)[:, length:]
    entries = voco_model.compress(model, pictures, processor=processor, batch_size=2)
    tokens = voco_model.generate(model, entries, QUESTIONS, processor=processor, **STEPS, **search)
    assert torch.equal(tokens, expected)


def test_sampling_equals_that_of_one_pass(with_processor):
    model, processor = with_processor
    picture, question = tiny.picture(0), QUESTIONS[0]
    inputs = processor(images=picture, text=voco_model.prompt(question, 2), return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    expected = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    (entry,) = voco_model.compress(model, picture, processor=processor)
    torch.manual_seed(1)
    tokens = voco_model.generate(model, entry, question, processor=processor, **options)
    assert torch.equal(tokens, expected)


def test_an_entry_serves_any_number_of_questions(with_processor):
    model, processor = with_processor
    (entry,) = voco_model.compress(model, [tiny.picture(0)], processor=processor)
    before = entry.kv.clone()
    together = voco_model.generate(model, entry, QUESTIONS, processor=processor, **STEPS)
    for row, question in enumerate(QUESTIONS):
        for _ in range(2):
            alone = voco_model.generate(model, [entry], question, processor=processor, **STEPS)
            assert torch.equal(alone[0], together[row])
    assert torch.equal(entry.kv, before)


def test_one_question_about_many_images(with_processor):
    model, processor = with_processor
    entries = voco_model.compress(model, map(tiny.picture, range(3)), processor=processor)
    together = voco_model.generate(model, entries, "Who?", processor=processor, **STEPS)
    apart = [voco_model.generate(model, e, "Who?", processor=processor, **STEPS) for e in entries]
    assert torch.equal(together, torch.cat(apart))


def test_numbers_of_numpy_are_numbers(with_processor):
    model, processor = with_processor
    picture = tiny.picture(0)
    (entry,) = voco_model.compress(
        model, picture, processor=processor, num_voco=np.int64(3), batch_size=np.int32(1)
    )
    (expected,) = voco_model.compress(model, picture, processor=processor, num_voco=3)
    assert entry.kv.equal(expected.kv)


def test_a_text_model_that_names_no_kv_heads():
    sizes = {"text_class": GPTNeoXConfig, "max_position_embeddings": 1024}
    model, processor = tiny.tiny_llava("llava", **sizes), tiny.tiny_processor("llava")
    assert not hasattr(model.config.text_config, "num_key_value_heads")
    voco_model.enable(model, processor, num_voco=2)
    picture, options = tiny.picture(0), {"max_new_tokens": 4, "do_sample": False}
    prompt = processor(images=picture, text=voco_model.prompt("Who?", 2), return_tensors="pt")
    one = model.generate(**prompt, **options)[:, prompt["input_ids"].shape[1] :]
    (entry,) = voco_model.compress(model, picture, processor=processor)
    assert voco_model.generate(model, entry, "Who?", processor=processor, **options).equal(one)
    with pytest.raises(ValueError, match="GPTNeoXModel without norm; use voco_model.generate"):
        voco_model.TwoPassEngine(model, processor, None)


def test_conversations_go_through_both_passes(with_processor):
    model, processor = with_processor
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A man."},
        {"role": "user", "content": "Where?"},
    ]
    picture = tiny.picture(0)
    written = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=picture, text=written, return_tensors="pt")
    expected = model.generate(**inputs, **STEPS)[:, inputs["input_ids"].shape[1] :]
    (entry,) = voco_model.compress(model, picture, processor=processor)
    one = voco_model.generate(model, entry, messages, processor=processor, **STEPS)
    many = voco_model.generate(model, entry, [messages, "Who?"], processor=processor, **STEPS)
    assert torch.equal(one, expected)
    assert torch.equal(many[0], expected[0])


def test_the_image_and_its_position_matter(with_processor):
    """What the equalities above rest on: other keys, or text elsewhere, give other logits."""
    model, processor = with_processor
    first, second = voco_model.compress(
        model, [tiny.picture(0), tiny.picture(1)], processor=processor
    )
    moved = voco_model.CompactKV(first.kv, first.positions, first.next_position + 5)
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 1}

    def logits(entry):
        output = voco_model.generate(model, entry, "Who?", processor=processor, **options)
        assert output.sequences.shape == (1, 1)
        return output.logits[0]

    assert (logits(first) - logits(second)).abs().max() > 1e-2
    assert (logits(first) - logits(moved)).abs().max() > 1e-2


def test_entries_can_be_kept_in_another_dtype(with_processor):
    model, processor = with_processor
    (entry,) = voco_model.compress(model, tiny.picture(0), processor=processor)
    half = entry.to(dtype=torch.bfloat16)
    assert half.nbytes == entry.nbytes // 2
    tokens = voco_model.generate(model, half, "Who?", processor=processor, **STEPS)
    assert tokens.shape == (1, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 4},
        {"use_mtp": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"position_ids": torch.zeros(1, 1)},
        {"pixel_values": torch.zeros(1)},
        {"past_key_values": None},
        {"cache": None},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
    ],
)
def test_refuses_options_that_would_be_wrong(with_processor, options):
    model, processor = with_processor
    (entry,) = voco_model.compress(model, tiny.picture(0), processor=processor)
    name = next(iter(options))
    name = "prompt_lookup_num_tokens" if name == "generation_config" else name
    with pytest.raises(ValueError, match=name):
        voco_model.generate(model, entry, "Who?", processor=processor, **options)


def test_refuses_what_does_not_pair_up(with_processor):
    model, processor = with_processor
    entries = voco_model.compress(model, [tiny.picture(0)] * 2, processor=processor)

    def refused(message, entries, text, **kwargs):
        with pytest.raises(ValueError, match=message):
            voco_model.generate(model, entries, text, **{"processor": processor, **kwargs})

    refused("2 entries and 3 texts", entries, QUESTIONS)
    refused("at least one compact entry", [], "Who?")
    stranger = tiny.tiny_processor("llava")
    refused("knows <VoCo> as 261, got", entries, "Who?", processor=stranger)
    refused("expected a processor", entries, "Who?", processor=None)
    refused("with token ids only", entries, "Who?", attention_mask=torch.ones(1, 3))
    refused("got 1 entries and 0 texts", entries[0], [])
    two_images = [{"role": "user", "content": [{"type": "image"}] * 2}]
    refused("at most one image part in a conversation, got 2", entries[0], two_images)
    ids = torch.tensor([[7, 8, 9]])
    refused("row 0", entries[0], ids, attention_mask=torch.tensor([[1, 1, 0]]))
    refused(r"\[1, 3\], got \[1, 5\]", entries[0], ids, attention_mask=torch.ones(1, 5))
    refused("T >= 1", entries[0], ids[:, :0])
    kv = entries[0].kv
    foreign = voco_model.CompactKV(kv[:2], entries[0].positions, entries[0].next_position)
    refused(r"got \(2, .* in entry 1", [entries[0], foreign], "Who?")
    with pytest.raises(TypeError, match="got Tensor at 0"):
        voco_model.generate(model, [kv], "Who?", processor=processor)


def test_refuses_what_cannot_be_compressed(enabled):
    inputs, kinds = tiny.batch_of(enabled, [(2, 3), (2, 5)], "right")
    ids = inputs["input_ids"]

    def refused(message, **kwargs):
        with pytest.raises(ValueError, match=message):
            voco_model.compress(enabled, **kwargs)

    no_voco = ids.clone()
    no_voco[1] = no_voco[1].masked_fill(ids[1] == tiny.VOCO, 9)
    refused("none in row 1", inputs={**inputs, "input_ids": no_voco})
    broken = ids.clone()
    broken[0, kinds[0].index("t") + 1] = tiny.VOCO
    refused("in row 0 .* 3 VoCo tokens, not in one run", inputs={**inputs, "input_ids": broken})
    second = ids.clone()
    second[1, kinds[1].index("t")] = tiny.IMAGE
    refused("in row 1 .* 1 after", inputs={**inputs, "input_ids": second})
    one_picture = {name: value[:1] for name, value in inputs.items()}
    one_picture["input_ids"] = ids
    refused("one image per row", inputs=one_picture)
    refused("got both or neither")
    refused("expected a processor", images=[tiny.picture(0)])
    refused("num_voco 3 with inputs", inputs=inputs, num_voco=3)
    refused("batch_size >= 1, got 0", inputs=inputs, batch_size=0)
    refused("int batch_size >= 1, got True", inputs=inputs, batch_size=True)
    refused("int num_voco >= 1, got 2.0", images=[tiny.picture(0)], num_voco=2.0)
    if "image_sizes" in inputs:
        without = {name: value for name, value in inputs.items() if name != "image_sizes"}
        refused("expected image_sizes", inputs=without)
    refused("with input_ids and pixel_values", inputs={"input_ids": ids})
    enabled.train()
    refused("eval mode", inputs=inputs)


def test_refuses_a_model_that_is_not_enabled(model):
    inputs, _ = tiny.batch_of(model, [(2, 3)])
    with pytest.raises(ValueError, match="voco_model.enable"):
        voco_model.compress(model, inputs=inputs)
    with pytest.raises(ValueError, match="voco_model.enable"):
        voco_model.generate(model, [], "Who?")


@pytest.mark.parametrize("token_id", [tiny.IMAGE, tiny.VOCO])
def test_refuses_ids_that_hold_the_image_again(enabled, token_id):
    inputs, _ = tiny.batch_of(enabled, [(2, 6)])
    entries = voco_model.compress(enabled, inputs=inputs)
    with pytest.raises(ValueError, match=f"{token_id} at position 1 of row 0; leave the image"):
        voco_model.generate(enabled, entries, torch.tensor([[7, token_id, 8]]), max_new_tokens=2)

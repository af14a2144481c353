"""Token ids and labels against the processor, and against conversations written by hand."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tokenizers import processors as post
from transformers import ByT5Tokenizer, LlavaProcessor, PreTrainedTokenizerFast

import voco_model
from tests.voco_model import tiny
from tests.voco_model.data.conversation import learnt, learnt_runs, sample, text_of, turns
from voco_model.data.encode import IGNORE, Encoder
from voco_model.data.faults import DataError
from voco_model.data.samples import sample_of
from voco_model.vlm.attach import name_tokens

MAN = (
    "What is the man doing in the image?",
    "The man is sitting in a chair, possibly at his computer, with a bird (a parrot) on his shoulder.",
    "Is there any other animal present in the image?",
    "Yes, there is a cat in the image, which the man is petting while sitting at his computer.",
)
LISTING_1 = (
    "<s><image>\n<VoCo>\n A chat between a curious user and an artificial intelligence assistant of "
    "the given image. The assistant gives helpful, detailed, and polite answers to the user's "
    "questions. USER: What is the man doing in the image? ASSISTANT: The man is sitting in a chair, "
    "possibly at his computer, with a bird (a parrot) on his shoulder.</s>USER: Is there any other "
    "animal present in the image? ASSISTANT: Yes, there is a cat in the image, which the man is "
    "petting while sitting at his computer.</s>"
)
NEWLINES = ("Which\ncolour\n\nhas it?", "Red, or\nnearly so.\n", "Where?", "Here.")
TWO_SIZES = ((64, 64), (32, 64))  # 5 tiles and 3 in LLaVA-NeXT
CONVERSATIONS = [
    sample("Who?", "A man.", sizes=TWO_SIZES[:1]),
    sample(*NEWLINES, sizes=TWO_SIZES[:1]),
    sample("Who?", "Señor Łukasz 🦜.", sizes=TWO_SIZES),
    sample("Who?", "A man.", "Where?", "There.", system="Be\nbrief.", sizes=TWO_SIZES[1:]),
    sample("Who?", "You.", "Who?", "I."),
    sample("Who?", "You.", system="Be brief."),
]


@pytest.mark.parametrize("num_voco", [1, 3])
@pytest.mark.parametrize("style", ["vicuna", "authors", "mistral", "chatml"])
@pytest.mark.parametrize("given", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_a_document_is_what_the_processor_makes_of_the_prompt(processor, given, style, num_voco):
    images = [picture.open() for picture in given.pictures]
    text = voco_model.prompt(
        given.messages, num_voco, images=len(images), add_generation_prompt=False, style=style
    )
    expected = processor(images=images or None, text=text, return_tensors="pt")
    encoder = Encoder(processor, style, 4096)
    document = encoder.encode(given, num_voco)
    assert document.input_ids.equal(expected["input_ids"][0])
    assert encoder.length(given, num_voco) == len(document.input_ids)
    for name in ("pixel_values", "image_sizes"):
        made = getattr(document, name)
        assert (made is None) == (name not in expected)
        assert made is None or made.equal(expected[name])


def test_style_vicuna_is_listing_1(processor):
    document = Encoder(processor, "vicuna", 4096).encode(sample(*MAN, sizes=[(64, 64)]), 1)
    assert text_of(processor, document.input_ids) == LISTING_1
    assert learnt(processor, document) == [f" {MAN[1]}</s>", f" {MAN[3]}</s>"]


def test_text_only_has_the_plain_system_prompt(processor):
    document = Encoder(processor, "vicuna", 4096).encode(sample("Who\nis it?", "A\nman."), 2)
    assert processor.tokenizer.decode(document.input_ids) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: Who\nis it? "
        "ASSISTANT: A\nman.</s>"
    )
    assert learnt(processor, document) == [" A\nman.</s>"]
    assert document.pixel_values is None and document.image_sizes is None
    assert not torch.isin(document.input_ids, torch.tensor([tiny.IMAGE, tiny.VOCO])).any()


def test_newlines_are_kept(processor):
    document = Encoder(processor, "vicuna", 4096).encode(sample(*NEWLINES, sizes=[(64, 64)]), 2)
    written = text_of(processor, document.input_ids)
    assert written.endswith(
        " questions. USER: Which\ncolour\n\nhas it? ASSISTANT: Red, or\nnearly so.\n</s>"
        "USER: Where? ASSISTANT: Here.</s>"
    )
    assert learnt(processor, document) == [" Red, or\nnearly so.\n</s>", " Here.</s>"]


AUTHORS = (
    "A chat between a curious user and an artificial intelligence assistant of the image. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# style, with an image, system message: the document, and what is learnt of it
BY_HAND = [
    (
        ("authors", True, None),
        "<image>\n<VoCo><VoCo>\n"
        + AUTHORS
        + "USER: Whichcolourhas it? ASSISTANT: Red, ornearly so."
        "</s>USER: Where? ASSISTANT: Here.</s>",
        [" Red, ornearly so.</s>", " Here.</s>"],
    ),
    (
        ("authors", False, None),
        AUTHORS + "USER: Which\ncolour\n\nhas it? ASSISTANT: Red, or\nnearly so.\n</s>"
        "USER: Where? ASSISTANT: Here.</s>",
        [" Red, or\nnearly so.\n</s>", " Here.</s>"],
    ),
    (
        ("vicuna", True, "Be brief."),
        "<image>\n<VoCo><VoCo>\n Be brief. USER: Which\ncolour\n\nhas it? ASSISTANT: Red, or\nnearly "
        "so.\n</s>USER: Where? ASSISTANT: Here.</s>",
        [" Red, or\nnearly so.\n</s>", " Here.</s>"],
    ),
    (
        ("mistral", True, None),
        "<image>\n<VoCo><VoCo>\n[INST] Which\ncolour\n\nhas it? [/INST] Red, or\nnearly so.\n</s>"
        "[INST] Where? [/INST] Here.</s>",
        [" Red, or\nnearly so.\n</s>", " Here.</s>"],
    ),
    (
        ("mistral", False, "Be brief."),
        "Be brief.\n[INST] Which\ncolour\n\nhas it? [/INST] Red, or\nnearly so.\n</s>[INST] Where? "
        "[/INST] Here.</s>",
        [" Red, or\nnearly so.\n</s>", " Here.</s>"],
    ),
    (
        ("chatml", True, None),
        "<image>\n<VoCo><VoCo>\n<|im_start|>system\nAnswer the questions of the given image."
        "<|im_end|><|im_start|>user\nWhich\ncolour\n\nhas it?<|im_end|><|im_start|>assistant\n"
        "Red, or\nnearly so.\n<|im_end|><|im_start|>user\nWhere?<|im_end|><|im_start|>assistant\n"
        "Here.<|im_end|>",
        ["Red, or\nnearly so.\n<|im_end|>", "Here.<|im_end|>"],
    ),
    (
        ("chatml", False, None),
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nWhich\ncolour\n\nhas it?"
        "<|im_end|><|im_start|>assistant\nRed, or\nnearly so.\n<|im_end|><|im_start|>user\nWhere?"
        "<|im_end|><|im_start|>assistant\nHere.<|im_end|>",
        ["Red, or\nnearly so.\n<|im_end|>", "Here.<|im_end|>"],
    ),
]


@pytest.mark.parametrize("case, written, answers", BY_HAND, ids=[str(c[0]) for c in BY_HAND])
def test_styles_are_those_written_by_hand(processor, case, written, answers):
    style, with_image, system = case
    given = sample(*NEWLINES, sizes=[(64, 64)] * with_image, system=system)
    document = Encoder(processor, style, 4096).encode(given, 2)
    assert text_of(processor, document.input_ids) == "<s>" + written
    assert learnt(processor, document) == answers


def test_images_go_to_the_front_wherever_they_stood(llava, tmp_path):
    for number in range(2):
        tiny.picture(number).save(tmp_path / f"{number}.png")
    value = "Compare\n<image>\nwith <image>"
    record = {"image": ["0.png", "1.png"], "conversations": []}
    record["conversations"] = [{"from": "human", "value": value}, {"from": "gpt", "value": "No."}]
    document = Encoder(llava, "mistral", 4096).encode(sample_of(record, "x", tmp_path), 2)
    assert text_of(llava, document.input_ids) == (
        "<s><image>\n<VoCo><VoCo>\n<image>\n<VoCo><VoCo>\n[INST] Compare\n\nwith [/INST] No.</s>"
    )


def sentencepiece_like(model: str, split: bool) -> LlavaProcessor:
    """Spaces as the first character of the next word, as in Llama's and Mistral's tokenizers."""
    special = ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
    if model == "words":
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        trainer = trainers.WordLevelTrainer(special_tokens=special)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=300, show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    said = voco_model.prompt(turns(*MAN), images=1, add_generation_prompt=False)
    # Special tokens stand by themselves; what is between them is trained on.
    said = said.replace("<image>", " ").replace("<VoCo>", " ").replace("</s>", " ")
    backend.train_from_iterator([said, *said.split(), *MAN], trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    backend.post_processor = post.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    name_tokens(tokenizer)
    return LlavaProcessor(
        image_processor=tiny.tiny_processor("llava").image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize("model, split", [("words", True), ("pieces", True), ("pieces", False)])
def test_the_space_in_front_of_a_first_word_is_learnt_with_it(model, split):
    processor = sentencepiece_like(model, split)
    document = Encoder(processor, "vicuna", 4096).encode(sample(*MAN, sizes=[(64, 64)]), 2)
    runs = [processor.tokenizer.convert_ids_to_tokens(run) for run in learnt_runs(document)]
    for run, answer in zip(runs, MAN[1::2], strict=True):
        assert run[0].startswith("▁")
        assert run[-1] == "</s>"
        assert "".join(run).replace("▁", " ") == f" {answer}</s>"
        assert model == "pieces" or run[0] == "▁" + answer.split()[0]


def test_what_is_too_long_is_cut_at_its_end(processor):
    given = sample(*MAN, sizes=[(64, 64)])
    whole = Encoder(processor, "vicuna", 4096).encode(given, 2)
    answer = len(f" {MAN[3]}") + 1
    max_length = len(whole.input_ids) - answer + 5  # 5 bytes of the second answer are left
    encoder = Encoder(processor, "vicuna", max_length)
    document = encoder.encode(given, 2)
    assert encoder.length(given, 2) == len(whole.input_ids)
    assert document.input_ids.equal(whole.input_ids[:max_length])
    assert document.labels.equal(whole.labels[:max_length])
    assert learnt(processor, document) == [f" {MAN[1]}</s>", f" {MAN[3]}"[:5]]
    assert document.pixel_values.equal(whole.pixel_values)
    assert (document.input_ids == tiny.IMAGE).sum() == (whole.input_ids == tiny.IMAGE).sum()


@pytest.mark.parametrize("sizes", [[], [(64, 64)]])
def test_nothing_to_learn_within_the_length_is_an_error(processor, sizes):
    given = sample(*MAN, sizes=sizes)
    whole = Encoder(processor, "vicuna", 4096).encode(given, 2)
    first = int((whole.labels != IGNORE).nonzero()[0])
    Encoder(processor, "vicuna", first + 1).encode(given, 2)  # one token is enough
    encoder = Encoder(processor, "vicuna", first)
    for look in (encoder.encode, encoder.length):
        with pytest.raises(DataError) as caught:
            look(given, 2)
        assert caught.value.fault.kind == "over_long"
        assert caught.value.fault.where == "data.json:1"


def test_a_tokenizer_without_offsets_is_refused(llava):
    slow = ByT5Tokenizer()
    slow.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(image_processor=llava.image_processor, tokenizer=slow, patch_size=8)
    with pytest.raises(ValueError, match="expected a fast tokenizer.*ByT5Tokenizer.*use_fast"):
        Encoder(processor, "vicuna", 100)

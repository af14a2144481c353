"""Models whose weights Accelerate keeps on disk between forward passes."""

from __future__ import annotations

import pytest

import voco_model
from tests.voco_model import tiny
from voco_model.vlm.devices import is_offloaded

pytest.importorskip("accelerate")

LANGUAGE = {"model.language_model": "disk", "lm_head": "disk"}
VISION = {"model.vision_tower": "disk", "model.multi_modal_projector": "disk"}
ROWS = tiny.VOCO + 1


def loaded(kind: str, folder, places: dict, vocab_size: int = ROWS):
    tiny.tiny_llava(kind, vocab_size=vocab_size).save_pretrained(folder / "model")
    tiny.tiny_processor(kind).save_pretrained(folder / "model")
    names = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    if kind == "next":
        names += ("model.image_newline",)
    device_map = {name: "cpu" for name in names} | places
    return voco_model.load(
        folder / "model", device_map=device_map, offload_folder=str(folder / "offloaded")
    )


@pytest.mark.parametrize("places", [LANGUAGE, VISION, LANGUAGE | VISION])
def test_two_passes_answer_as_in_memory(kind, places, tmp_path):
    model, processor = loaded(kind, tmp_path, places)
    assert is_offloaded(model)
    picture, question = tiny.picture(1), "What is it?"
    options = {"max_new_tokens": 4, "do_sample": False}
    (entry,) = voco_model.compress(model, picture, processor=processor)
    tokens = voco_model.generate(model, entry, question, processor=processor, **options)
    there, _ = voco_model.load(tmp_path / "model")
    (expected,) = voco_model.compress(there, picture, processor=processor)
    assert entry.kv.equal(expected.kv)
    answer = voco_model.generate(there, expected, question, processor=processor, **options)
    assert tokens.equal(answer)
    prompt = processor(images=picture, text=voco_model.prompt(question), return_tensors="pt")
    one = model.generate(**prompt, **options)
    assert one[:, prompt["input_ids"].shape[1] :].equal(answer)


def test_an_engine_says_what_to_do(kind, tmp_path):
    model, processor = loaded(kind, tmp_path, LANGUAGE)
    with pytest.raises(ValueError, match="offloaded weights; load it without device_map, or use"):
        voco_model.TwoPassEngine(model, processor, None)


def test_embeddings_that_have_to_grow_must_be_in_memory(kind, tmp_path):
    with pytest.raises(
        ValueError, match="embeddings in memory.*got offloaded ones; keep embed_tokens"
    ):
        loaded(kind, tmp_path, LANGUAGE, vocab_size=tiny.VOCO)

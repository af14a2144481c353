"""A row for each VoCo token, under one id in prompts, masks and caches."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import voco_model
from tests.voco_model import tiny
from voco_model.vlm.embeddings import number_rows

QUESTION = "What is it?"


def test_rows_count_from_the_start_of_each_run():
    ids = torch.tensor([[7, 9, 9, 9, 1, 2, 9, 9, 3], [9, 9, 1, 9, 9, 9, 9, 9, 9]])
    (numbered,) = number_rows(9, 4, None, (ids,))
    assert numbered.tolist() == [
        [7, 9, 10, 11, 1, 2, 9, 10, 3],
        [9, 10, 1, 9, 10, 11, 12, 12, 12],
    ]
    (flat,) = number_rows(9, 4, None, (ids[0],))
    assert flat.tolist() == numbered[0].tolist()


def test_two_passes_and_the_engine_answer_what_one_masked_pass_does(model, processor):
    picture = tiny.picture(3)
    with voco_model.enable(model, processor, num_voco=3, distinct=True, prompt="mistral"):
        embeddings = model.get_input_embeddings()
        assert embeddings.num_embeddings == tiny.VOCO + 3
        with torch.no_grad():  # fresh rows are far smaller than the others of a tiny model
            embeddings.weight[tiny.VOCO :].normal_(std=0.5)
        prompt = voco_model.prompt(QUESTION, 3, style="mistral")
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        generate = partial(model.generate, max_new_tokens=6, do_sample=False)
        expected = generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()

        (entry,) = voco_model.compress(model, picture, processor=processor)
        answer = voco_model.generate(
            model, [entry], QUESTION, processor=processor, max_new_tokens=6
        )
        assert answer[0].tolist()[: len(expected)] == expected
        with voco_model.TwoPassEngine(model, processor, max_new_tokens=6) as engine:
            assert list(engine.answer(picture, QUESTION).tokens) == expected

        # The rows matter: with one row for all, the answer's logits are others.
        logits = model(**inputs).logits[0, -1]
        with torch.no_grad():
            embeddings.weight[tiny.VOCO + 1 :] = embeddings.weight[tiny.VOCO]
        assert (model(**inputs).logits[0, -1] - logits).abs().max() > 1e-3
    assert model.get_input_embeddings().num_embeddings == tiny.VOCO + 1
    assert not model.get_input_embeddings()._forward_pre_hooks


def test_fewer_tokens_use_the_first_rows(model, processor):
    with voco_model.enable(model, processor, num_voco=4, distinct=True):
        few = voco_model.compress(model, tiny.picture(0), processor=processor, num_voco=2)[0]
        assert few.num_tokens == 2


def test_errors(model, processor):
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<VoCo>", "<other>"]})
    with pytest.raises(ValueError, match="to be free for the rows of <VoCo>"):
        voco_model.enable(model, processor, num_voco=2, distinct=True)
    with pytest.raises(ValueError, match="expected distinct as True or False, got 1"):
        voco_model.enable(model, processor, distinct=1)
    with pytest.raises(ValueError, match="expected a prompt style among vicuna, .* got 'llama'"):
        voco_model.enable(model, processor, prompt="llama")
    with pytest.raises(ValueError, match="embedding rows, got 261 to 262; pass the processor"):
        voco_model.enable(model, num_voco=2, voco_token_id=tiny.VOCO, distinct=True)

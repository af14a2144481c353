"""``fastv`` against its definition, written down with dense attention."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.voco_model import tiny
from tests.voco_model.baselines.eager import rows_of
from voco_model import baselines
from voco_model.vlm.caches import CACHE_ARGUMENT

ROWS = [(1, 9), (1, 3), (0, 5)]  # the third has no image
KEPT, STEPS = 3, 5


def double_batch(model, rows) -> dict:
    inputs, _ = tiny.batch_of(model, rows)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    return inputs


@pytest.mark.parametrize("layer", [1, 2])
def test_equals_attention_with_dropped_tokens_hidden(double, processor, layer):
    inputs = double_batch(double, ROWS)
    rows = rows_of(double, inputs)
    expected = [row.forward(layer, KEPT) for row in rows]
    greedy = [row.greedy(layer, KEPT, STEPS) for row in rows]
    with baselines.apply("fastv", double, processor, KEPT, layer=layer):
        cache = DynamicCache(config=double.config.text_config)
        with torch.no_grad():
            logits = double(**inputs, **{CACHE_ARGUMENT: cache}).logits
        new = double.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False
        )[:, inputs["input_ids"].shape[1] :]
    widths = []
    for row, own, (truth, kept) in zip(rows, logits, expected, strict=True):
        stays = torch.ones(len(row.ids), dtype=torch.bool)
        if kept is not None:
            stays[row.image] = torch.isin(row.image, kept)
        widths.append(int(stays.sum()))
        assert (own[-widths[-1] :] - truth[stays]).abs().max() < 1e-5
    assert logits.shape[1] == max(widths)
    assert [cache.get_seq_length(index) for index in range(3)] == (
        [inputs["input_ids"].shape[1]] * layer + [max(widths)] * (3 - layer)
    )
    assert new.tolist() == greedy


def test_what_it_keeps_matters(double, processor):
    """The tests beside this one would see a wrong choice."""
    (row, *_) = rows_of(double, double_batch(double, ROWS))
    truth, kept = row.forward(1, KEPT)
    others = row.image[~torch.isin(row.image, kept)][:KEPT]
    assert (row.forward(1, kept=others)[0][-1] - truth[-1]).abs().max() > 1e-2


def test_all_tokens_kept_is_the_plain_model(double, processor):
    inputs = double_batch(double, ROWS)
    options = {"max_new_tokens": STEPS, "do_sample": False}
    with torch.no_grad():
        logits, tokens = double(**inputs).logits, double.generate(**inputs, **options)
        with baselines.apply("fastv", double, processor, 10**6, layer=1):
            assert torch.equal(double(**inputs).logits, logits)
            assert torch.equal(double.generate(**inputs, **options), tokens)


def test_rows_alone_answer_as_in_a_batch(double, processor):
    pictures, questions = [tiny.picture(0), tiny.picture(1, (32, 64))], ["what is it?", "why"]
    with baselines.apply("fastv", double, processor, KEPT, layer=1) as method:
        options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
        together = method.generate(pictures, questions, **options)
        for index in range(2):
            alone = method.generate([pictures[index]], [questions[index]], **options)
            assert torch.equal(alone[0], together[index])
        assert method.answer(pictures, questions, **options) == [
            processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in together
        ]


def test_beams_are_scored_as_defined(double, processor):
    inputs = double_batch(double, ROWS[:2])
    rows, length = rows_of(double, inputs), inputs["input_ids"].shape[1]
    with baselines.apply("fastv", double, processor, KEPT, layer=1):
        found = double.generate(
            **inputs,
            num_beams=3,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    for row, sequence, score in zip(rows, found.sequences, found.sequences_scores, strict=True):
        _, kept = row.forward(1, KEPT)
        new = sequence[length:]
        logits, _ = row.forward(1, kept=kept, ids=torch.cat([row.ids, new]))
        banned = logits[len(row.ids) - 1 : -1]
        chances = banned.log_softmax(-1).gather(1, new[:, None])
        assert (chances.sum() - score).abs() < 1e-4 * score.abs()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_cache": False}, "expected use_cache=True"),
        ({"prompt_lookup_num_tokens": 2}, "no prompt_lookup_num_tokens"),
        ({"prefill_chunk_size": 4}, "no prefill_chunk_size"),
        ({"cache_implementation": "static"}, "no cache_implementation"),
        ({"return_dict_in_generate": True}, "no return_dict_in_generate"),
    ],
)
def test_refuses_what_would_not_be_exact(llava, llava_processor, options, message):
    with baselines.apply("fastv", llava, llava_processor, KEPT, layer=1) as method:
        with pytest.raises(ValueError, match=message):
            method.generate([tiny.picture(0)], ["why"], max_new_tokens=2, **options)


def test_refuses_prompts_that_it_cannot_prune(llava, llava_processor):
    with baselines.apply("fastv", llava, llava_processor, KEPT, layer=1) as method:

        def refused(message: str, **inputs) -> None:
            with pytest.raises(ValueError, match=message):
                llava(**inputs)

        two, _ = tiny.two_images(llava)
        refused("at most one image in each row, got 2 in one", **two)
        side_by_side = {**two, "input_ids": torch.tensor([[1] + [tiny.IMAGE] * 32 + [9]])}
        refused("at most one image in each row, got 2 in one", **side_by_side)
        right, _ = tiny.batch_of(llava, ROWS, side="right")
        refused("padded on the left", **right)
        good = double_batch(llava, ROWS)
        refused("no labels", **good, labels=good["input_ids"])
        refused("output_attentions=False", **good, output_attentions=True)
        refused("got 1 positional|input_ids", inputs_embeds=torch.zeros(1, 2, 64).double())
        refused("attention_mask of shape", **{**good, "attention_mask": torch.ones(3, 1, 1, 1)})
        with pytest.raises(ValueError, match="expected a DynamicCache, got StaticCache"):
            llava.generate(**good, max_new_tokens=2, cache_implementation="static")
        with torch.no_grad():
            cache = llava(**good, use_cache=True).past_key_values
        again = {"input_ids": good["input_ids"][:, -2:], CACHE_ARGUMENT: cache}
        refused("expected one token on a pruned cache", **again)
        llava.set_attn_implementation({"text_config": "sdpa"})
        refused("expected attention 'voco-fastv', got 'sdpa'", **good)
        llava.train()
        refused("eval mode", **good)
        with pytest.raises(ValueError, match="expected a model in eval mode"):
            method.generate([tiny.picture(0)], ["why"])


@pytest.mark.parametrize("layer", [0, 3, True])
def test_refuses_layers_that_are_not_there(llava, llava_processor, layer):
    with pytest.raises(ValueError, match="layer"):
        baselines.apply("fastv", llava, llava_processor, KEPT, layer=layer)
    with pytest.raises(ValueError, match="num_tokens"):
        baselines.apply("fastv", llava, llava_processor)

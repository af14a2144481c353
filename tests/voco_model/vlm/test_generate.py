"""``model.generate`` on whole prompts of an enabled model, and caches that pass from call to
call."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, Qwen2Config

import voco_model
from tests.voco_model import tiny
from voco_model.vlm.caches import CACHE_ARGUMENT, CompactCache
from voco_model.vlm.generate import _layer_devices, _second_pass_prompt

STEPS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def prompts(enabled):
    return tiny.batch_of(enabled, [(2, 6), (2, 3), (0, 12)])


@pytest.fixture
def compact(enabled):
    """The compact cache of two images, made anew by each call, and what must follow it."""
    inputs, _ = tiny.batch_of(enabled, [(2, 6), (3, 3)])
    entries = voco_model.compress(enabled, inputs=inputs)

    def build() -> tuple[CompactCache, dict]:
        cache = CompactCache(entries, _layer_devices(enabled), enabled.dtype)
        return cache, _second_pass_prompt(enabled, cache, [[7, 8, 9], [10, 11]])

    return build


def greedy_by_hand(model, inputs: dict, kinds: list[str], steps: int) -> torch.Tensor:
    """Stock eager attention, the dense mask rebuilt for each token, no cache."""
    stock = copy.deepcopy(model)
    stock.model._forward_pre_hooks.clear()
    stock.set_attn_implementation({"text_config": "eager"})
    inputs, tokens = dict(inputs), []
    valid = inputs.pop("attention_mask")
    with torch.no_grad():
        for _ in range(steps):
            logits = stock(
                **inputs,
                attention_mask=tiny.additive(tiny.dense_mask(kinds), torch.float32),
                position_ids=tiny.positions_of(valid),
                use_cache=False,
            ).logits[:, -1]
            tokens.append(logits.argmax(-1, keepdim=True))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1]], dim=1)
            valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
            kinds = [row + "t" for row in kinds]
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_whole_prompts_are_masked_in_prefill_and_decoding(enabled, prompts, options):
    inputs, kinds = prompts
    expected = greedy_by_hand(enabled, inputs, kinds, 6)
    tokens = enabled.generate(**inputs, **STEPS, **options)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(tokens, expected)


def test_two_images_in_a_prompt(enabled):
    """Decoding from a cache, where both images hide, against the mask made anew for each token."""
    inputs, _ = tiny.two_images(enabled)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    steps = {**STEPS, "suppress_tokens": [tiny.VOCO]}  # a generated one would start a segment
    expected = enabled.generate(**inputs, **steps, use_cache=False)
    assert torch.equal(enabled.generate(**inputs, **steps), expected)


def test_text_models_with_a_list_of_layer_types():
    """For these, generate makes a dict of dense masks where the cache is static."""
    model = tiny.tiny_llava("llava", text_class=Qwen2Config, num_key_value_heads=2)
    assert model.config.text_config.layer_types
    inputs, kinds = tiny.batch_of(model, [(2, 6), (2, 3)])
    with voco_model.enable(model, num_voco=2, voco_token_id=tiny.VOCO):
        expected = greedy_by_hand(model, inputs, kinds, 6)
        for options in ({}, {"cache_implementation": "static"}):
            tokens = model.generate(**inputs, **STEPS, **options)
            assert torch.equal(tokens[:, -6:], expected)


def test_decoding_unmasked_would_be_noticed(enabled, prompts):
    """The image behind the VoCo tokens changes the answer of a model that can see it."""
    inputs, _ = prompts
    masked = enabled.generate(**inputs, **STEPS)
    plain = copy.deepcopy(enabled)
    plain.model._forward_pre_hooks.clear()
    assert not torch.equal(plain.generate(**inputs, **STEPS), masked)


def test_compiled_decoding_is_one_graph(enabled, prompts):
    inputs, _ = prompts
    expected = enabled.generate(**inputs, **STEPS)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
    config._compile_all_devices = True  # generate compiles on accelerators only, otherwise
    tokens = enabled.generate(
        **inputs, **STEPS, cache_implementation="static", compile_config=config
    )
    assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_prompt_lookup_on_a_whole_prompt(enabled):
    inputs, _ = tiny.batch_of(enabled, [(2, 12)])
    expected = enabled.generate(**inputs, **STEPS)
    assert torch.equal(enabled.generate(**inputs, **STEPS, prompt_lookup_num_tokens=2), expected)


@pytest.mark.parametrize("text", [0, 5])
def test_decoding_by_hand_with_the_cache_that_forward_returns(enabled, text):
    """Also a prompt that stops at its VoCo tokens: what follows must not see the image either."""
    inputs, kinds = tiny.batch_of(enabled, [(2, text), (1, text + 1)])
    following = torch.tensor([[21, 22, 23], [24, 25, 26]])
    whole = torch.cat([inputs["input_ids"], following], dim=1)
    ones = torch.ones_like(following)
    mask = torch.cat([inputs["attention_mask"], ones], dim=1)
    with torch.no_grad():
        expected = enabled(**{**inputs, "input_ids": whole, "attention_mask": mask}).logits[:, -3:]
        cache = enabled(**inputs).past_key_values
        start = inputs["input_ids"].shape[1]
        several = enabled(
            input_ids=following,
            attention_mask=mask,
            position_ids=torch.arange(start, start + 3)[None],
            past_key_values=copy.deepcopy(cache),
        ).logits
        singly = [
            enabled(
                input_ids=following[:, i : i + 1],
                attention_mask=mask[:, : start + i + 1],
                past_key_values=cache,
            ).logits
            for i in range(3)
        ]
    torch.testing.assert_close(several, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(singly, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE_ARGUMENT}))
def test_the_base_model_takes_a_cache_by_its_old_and_its_new_name(enabled, prompts, name):
    """Past the outer model, which passes on the new name only."""
    inputs, _ = prompts
    last, cache = torch.full((3, 1), 9), DynamicCache()
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(last)], dim=1)
    ids = torch.cat([inputs["input_ids"], last], dim=1)
    with torch.no_grad():
        expected = enabled.model(**{**inputs, "input_ids": ids, "attention_mask": mask})[0][:, -1]
        enabled.model(**inputs, **{name: cache})
        state = enabled.model(input_ids=last, attention_mask=mask, **{name: cache})[0][:, -1]
    torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)


def test_prompts_without_voco_tokens_leave_no_trace(enabled):
    inputs, _ = tiny.batch_of(enabled, [(0, 6), (0, 3)])
    cache = enabled(**inputs).past_key_values
    assert cache.voco_hidden is None


def test_refuses_a_prompt_in_pieces(enabled):
    inputs, kinds = tiny.batch_of(enabled, [(2, 40)])
    start = kinds[0].index("c")
    with pytest.raises(ValueError, match="got 2; the mask of a prompt read in pieces"):
        enabled.generate(**inputs, **STEPS, prefill_chunk_size=start)
    # With the VoCo tokens in the first piece, Transformers 5.17 loses the pixels on the way, which is
    # refused; 5.23 encodes the image first, and then the answer has to be right.
    try:
        tokens = enabled.generate(**inputs, **STEPS, prefill_chunk_size=start + 4)
    except ValueError as error:
        assert "generate drops them when prefill_chunk_size is set" in str(error)
    else:
        assert torch.equal(tokens, enabled.generate(**inputs, **STEPS))
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="got inputs_embeds only"):
        enabled.generate(inputs_embeds=enabled.get_input_embeddings()(ids), **STEPS)


def test_refuses_a_cache_whose_rows_were_selected(enabled):
    inputs, _ = tiny.batch_of(enabled, [(2, 6), (2, 6)])
    cache = enabled(**inputs).past_key_values
    cache.batch_repeat_interleave(2)
    mask = torch.ones(4, inputs["input_ids"].shape[1] + 1)
    with pytest.raises(ValueError, match="for the 2 rows whose prompt is in the cache"):
        enabled(input_ids=torch.full((4, 1), 9), attention_mask=mask, past_key_values=cache)


def test_stock_generate_takes_a_compact_cache(enabled, compact):
    """What voco_model.generate hands over; entries of 2 and 3 tokens in one batch."""
    cache, prompt = compact()
    assert cache.prefix_mask.tolist() == [[False, True, True], [True, True, True]]
    assert enabled.generate(**prompt, past_key_values=cache, **STEPS).shape == (2, 6 + 6)


def test_refuses_a_compact_cache_with_wrong_neighbours(enabled, compact):
    def refused(message, **changes):
        cache, prompt = compact()
        prompt = {**prompt, **changes}
        given = {name: value for name, value in prompt.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            enabled.generate(**given, past_key_values=cache, **STEPS)

    _, prompt = compact()
    refused("got .*; without them the text takes the image's positions", position_ids=None)
    refused("without them the text takes", position_ids=prompt["position_ids"] + 1)
    ones = torch.ones_like(prompt["attention_mask"])
    refused("starting with the cache's prefix_mask", attention_mask=ones)
    text_only = {name: value[:, 3:] for name, value in prompt.items()}
    refused(r"of shape \[2, 6\] .* got \[2, 3\]", **text_only)
    with pytest.raises(ValueError, match="got none; without them"), torch.no_grad():
        cache, prompt = compact()
        enabled(
            input_ids=prompt["input_ids"][:, 3:],
            attention_mask=prompt["attention_mask"],
            past_key_values=cache,
        )


def test_refuses_a_compact_cache_that_generate_has_grown(enabled, compact):
    cache, prompt = compact()
    fresh = enabled.generate(**prompt, past_key_values=cache, **STEPS)
    grown = cache.get_seq_length()
    with pytest.raises(
        ValueError, match=rf"with 3 VoCo slots, got one with {grown}.*crop\(-{grown - 3}\)"
    ):
        enabled.generate(**prompt, past_key_values=cache, **STEPS)
    cache.crop(3 - grown)
    assert torch.equal(enabled.generate(**prompt, past_key_values=cache, **STEPS), fresh)


def test_refuses_prompt_lookup_on_a_compact_cache(enabled):
    inputs, _ = tiny.batch_of(enabled, [(2, 6)])
    entries = voco_model.compress(enabled, inputs=inputs)
    cache = CompactCache(entries, _layer_devices(enabled), enabled.dtype)
    prompt = _second_pass_prompt(enabled, cache, [[7, 8, 9, 7, 8, 9, 7, 8]])
    # Which of the two goes wrong first depends on the version of Transformers.
    refusal = (
        "starting with the cache's prefix_mask|position_ids that continue after the first pass"
    )
    with pytest.raises(ValueError, match=refusal):
        enabled.generate(**prompt, past_key_values=cache, **STEPS, prompt_lookup_num_tokens=2)


def test_refuses_a_compact_cache_without_its_voco_tokens(enabled, compact):
    cache, prompt = compact()
    cache.crop(-1)
    with pytest.raises(ValueError, match="with 3 VoCo slots, got one with 2"):
        enabled.generate(**prompt, past_key_values=cache, **STEPS)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            None,
            "a question, a conversation, a list of either or token ids in a tensor, got NoneType",
        ),
        (5, "got int"),
        ([5, 6], "token ids as an int64 tensor"),
        ([None], "expected a question or messages in a list, got NoneType"),
        ([{"role": "user"}], "expected messages with content that is a string or parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "expected messages with content"),
    ],
)
def test_what_is_no_text(kind, text, message):
    model, processor = tiny.tiny_llava(kind), tiny.tiny_processor(kind)
    voco_model.enable(model, processor, num_voco=2)
    (entry,) = voco_model.compress(model, tiny.picture(1), processor=processor)
    with pytest.raises((TypeError, ValueError), match=message):
        voco_model.generate(model, entry, text, processor=processor)

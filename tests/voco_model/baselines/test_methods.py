"""``full``, ``voco`` and ``untrained``; what all methods share."""

from __future__ import annotations

import pytest
import torch

import voco_model
from tests.voco_model import tiny
from tests.voco_model.vlm.test_enable import assert_same, snapshot
from voco_model import baselines

OPTIONS = {"fastv": {"layer": 1}, "qformer": {"width": 32, "heads": 2}}
PICTURES, QUESTIONS = [tiny.picture(0), tiny.picture(1, (32, 64))], ["what is it?", "why"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
NO_IMAGE = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("name", baselines.METHODS)
def test_undo_restores_everything(name):
    model = tiny.tiny_llava("llava", vocab_size=tiny.VOCO)
    processor = tiny.tiny_processor("llava")
    inputs, _ = tiny.batch_of(model, [(0, 6)])
    inputs |= processor(images=PICTURES[:1], text="<image> a", return_tensors="pt")
    logits = model(**inputs).logits
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    more = (processor.num_additional_image_tokens, model.model.multi_modal_projector, hooks)
    before = snapshot(model, processor)
    options = {"num_voco": 2} if name == "full" else OPTIONS.get(name, {})
    method = baselines.apply(
        name, model, processor, None if name == "full" else 2, **options, style="mistral"
    )
    assert method.model is model and method.processor is processor
    assert method.prompt("why").endswith("[INST] why [/INST]")
    answers = method.answer(PICTURES, QUESTIONS, **GREEDY)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    with pytest.raises(ValueError, match="one that is enabled or has a method applied"):
        baselines.apply("full", model, processor)
    method.undo()
    method.undo()  # a second time is nothing
    processor.tokenizer._tokenizer.no_padding()  # it keeps how it was called last
    assert_same(before, snapshot(model, processor))
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert more == (
        processor.num_additional_image_tokens,
        model.model.multi_modal_projector,
        hooks,
    )
    assert torch.equal(model(**inputs).logits, logits)


def test_full_is_the_model_itself(model, processor):
    with baselines.apply("full", model, processor) as method:
        assert method.prompt("why").startswith("<image>\n A chat between")
        assert "<VoCo>" not in method.prompt("why")
        inputs = method.inputs(PICTURES, QUESTIONS)
        tokens = method.generate(PICTURES, QUESTIONS, **GREEDY)
    assert inputs["attention_mask"][:, -1].all()
    length = inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(**inputs, **GREEDY)[:, length:], tokens)


def test_prompts_have_as_many_images_as_the_messages(model, processor):
    two = [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "a"}]}]
    with baselines.apply("full", model, processor) as method:
        assert method.prompt(two).startswith("<image>\n<image>\n A chat")
        assert method.prompt(NO_IMAGE, add_generation_prompt=False).startswith("A chat")
        assert "pixel_values" not in method.inputs(None, [NO_IMAGE])
        assert len(method.generate(PICTURES, [two, NO_IMAGE], **GREEDY)) == 2
        given = [{"type": "image", "image": picture} for picture in PICTURES]
        in_parts = [{"role": "user", "content": [*given, {"type": "text", "text": "a"}]}]
        expected = method.generate(PICTURES, [two], **GREEDY)
        assert torch.equal(method.generate(None, [in_parts], **GREEDY), expected)
        with pytest.raises(ValueError, match="expected 2 images for 2 prompts, got 1"):
            method.inputs(PICTURES[:1], QUESTIONS)
        with pytest.raises(ValueError, match="expected a list of questions"):
            method.inputs(PICTURES[:1], "why")


def test_full_with_voco_tokens_has_an_unmodified_mask(model, processor):
    with baselines.apply("full", model, processor, num_voco=2) as method:
        assert method.prompt("why").startswith("<image>\n<VoCo><VoCo>\n A chat")
        inputs = method.inputs(PICTURES, QUESTIONS)
        assert (inputs["input_ids"] == tiny.VOCO).sum(1).tolist() == [2, 2]
        logits = model(**inputs).logits
        tokens = method.generate(PICTURES, QUESTIONS, **GREEDY)
        model.train()
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels).loss.backward()
        assert model.get_input_embeddings().weight.grad[tiny.VOCO].any()
        model.eval()
    real = inputs["attention_mask"].bool()
    plain = model(**inputs).logits  # the same ids, to a model that knows nothing of VoCo tokens
    assert torch.allclose(logits[real], plain[real], rtol=0, atol=1e-5)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(**inputs, **GREEDY)[:, length:], tokens)


def test_upper_bound_is_saved_for_the_lower_one(tmp_path):
    model, processor = tiny.tiny_llava("llava", vocab_size=tiny.VOCO), tiny.tiny_processor("llava")
    method = baselines.apply("full", model, processor, num_voco=2, distinct=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.VOCO :] *= 10
    tokens = method.generate(PICTURES, QUESTIONS, **GREEDY)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    upper = baselines.load(tmp_path)
    assert (upper.name, upper.num_tokens) == ("full", 18)
    assert torch.equal(upper.generate(PICTURES, QUESTIONS, **GREEDY), tokens)
    lower = baselines.load(tmp_path, "untrained")
    assert (lower.name, lower.num_tokens, lower.trained) == ("untrained", 2, False)
    assert lower.model.config.voco_distinct and lower.model.config.voco_baseline is None
    rows = model.get_input_embeddings().weight[tiny.VOCO :]
    assert torch.equal(lower.model.get_input_embeddings().weight[tiny.VOCO :], rows)
    pruned = baselines.load(tmp_path, "fastv", num_tokens=2, layer=1, dtype=torch.float64)
    assert (pruned.num_tokens, pruned.layer, pruned.model.dtype) == (2, 1, torch.float64)


@pytest.mark.parametrize("name", ["voco", "untrained"])
def test_voco_is_the_masked_pass_in_two(model, processor, name):
    with baselines.apply(name, model, processor, 2, distinct=False) as method:
        assert voco_model.prompt("why", 2) == method.prompt("why")
        inputs = method.inputs(PICTURES, QUESTIONS)
        masked = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(method.generate(PICTURES, QUESTIONS, **GREEDY), masked)
        mixed = method.generate(PICTURES[:1], [QUESTIONS[0], NO_IMAGE], **GREEDY)
        assert torch.equal(mixed[0], masked[0])


def test_loads_what_a_training_run_left(tmp_path):
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a method's name for the plain model"):
        baselines.load(tmp_path)
    with voco_model.enable(model, processor, num_voco=3):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    method = baselines.load(tmp_path)
    assert (method.name, method.num_tokens, method.model.training) == ("voco", 3, False)
    with pytest.raises(
        ValueError, match="wasn't trained to compress for untrained, got .*, which was"
    ):
        baselines.load(tmp_path, "untrained")


def test_refuses_wrong_arguments(model, processor):
    with pytest.raises(ValueError, match="expected a method among full, voco, .*, got 'fast'"):
        baselines.apply("fast", model, processor)
    with pytest.raises(TypeError, match="expected a LlavaForConditionalGeneration or"):
        baselines.apply("full", model.model, processor)
    with pytest.raises(TypeError, match="expected a processor with a tokenizer"):
        baselines.apply("full", model, processor.tokenizer)
    with pytest.raises(ValueError, match="expected no num_tokens, got 8"):
        baselines.apply("full", model, processor, 8)
    with pytest.raises(TypeError, match="unexpected keyword"):
        baselines.apply("pooling", model, processor, 2, layers=2)
    with pytest.raises(ValueError, match="expected a prompt style"):
        baselines.apply("voco", model, processor, 2, style="none")
    with voco_model.enable(model, processor), pytest.raises(ValueError, match="that is enabled"):
        baselines.apply("full", model, processor)
    with baselines.apply("full", model, processor) as method:
        model.train()
        with pytest.raises(ValueError, match="eval mode"):
            method.generate(PICTURES, QUESTIONS)
        model.eval()
    baselines.apply("full", model, processor).undo()  # nothing was left behind


def test_every_method_says_where_it_comes_from():
    assert [*baselines.METHODS] == [
        "full",
        "voco",
        "untrained",
        "fastv",
        "random",
        "pooling",
        "qformer",
    ]
    for name, cls in baselines.METHODS.items():
        assert cls.name == name and cls.label and "arXiv" in cls.source
        assert "Source:" in cls.__doc__
    assert [name for name, cls in baselines.METHODS.items() if cls.trained] == [
        "full",
        "voco",
        "pooling",
        "qformer",
    ]

"""Tiny checkpoints in the layout of the authors: to Transformers' and back."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers import processors as post
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import voco_model
from tests.voco_model import instruction, tiny
from voco_model import baselines
from voco_model.cli import app
from voco_model.convert import from_authors, to_authors
from voco_model.convert import tokenizer as convert_tokenizer
from voco_model.train import make_config, train

HIDDEN, LAYERS = 64, 2
BOS, UNK, VOCO = 1, 0, 259  # <unk>, <s>, </s>, the bytes, <voco>: as Vicuna's tokenizer has them
TOWER = "model.vision_tower.vision_tower.vision_model."


def tiny_tokenizer(pad: str | None = "<unk>", voco: str = "<voco>") -> PreTrainedTokenizerFast:
    vocab = {"<unk>": UNK, "<s>": BOS, "</s>": 2}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[byte] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = post.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens=[voco],
    )


CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "vocab_size": VOCO + 1,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "use_cache": True,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "flat",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "tokenizer_model_max_length": 2048,
    "freeze_mm_mlp_adapter": False,
    "use_mm_proj": True,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Their models, built apart: CLIP, Llama, projector; and CLIP's folder."""
    torch.manual_seed(0)
    vision = tiny.tiny_llava("llava").config.vision_config
    clip = CLIPVisionModel(vision).eval()
    fields = LlamaConfig.__annotations__.keys() | {"rope_theta", "rope_scaling"}
    # a copy: LlamaConfig completes the dict of rope
    text = {key: value for key, value in json.loads(json.dumps(CONFIG)).items() if key in fields}
    llama = LlamaForCausalLM(LlamaConfig(**text)).eval()
    mlp = [torch.nn.Linear(32, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN)]
    projector = torch.nn.Sequential(*mlp)
    with torch.no_grad():  # fresh weights are so small that attention is uniform
        for module in (clip, llama):
            for parameter in module.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(6.0)
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    CLIPImageProcessorPil(size=32, crop_size=32).save_pretrained(folder)
    return clip, llama, projector, folder


def their_tensors(parts, tower: bool = True) -> dict[str, torch.Tensor]:
    clip, llama, projector, _ = parts
    tensors = {name: value.clone() for name, value in llama.state_dict().items()}
    for name, value in projector.state_dict().items():
        tensors[f"model.mm_projector.{name}"] = value.clone()
    if tower:
        tensors |= {TOWER + name: value.clone() for name, value in clip.state_dict().items()}
    return tensors


def write_bin(tensors: dict, folder) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def write_bin_shards(tensors: dict, folder) -> None:
    pattern = "pytorch_model{suffix}.bin"
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=pattern, max_shard_size=100_000
    )
    assert split.is_sharded
    for file, names in split.filename_to_tensors.items():
        torch.save({name: tensors[name] for name in names}, folder / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


WRITERS = {
    "bin": write_bin,
    "bin shards": write_bin_shards,
    "safetensors": save_torch_state_dict,
    "safetensors shards": partial(save_torch_state_dict, max_shard_size=100_000),
}


def write_theirs(
    folder, parts, *, tensors=None, writer="safetensors", tokenizer=None, **changes
) -> None:
    folder.mkdir()
    WRITERS[writer](their_tensors(parts) if tensors is None else tensors, folder)
    config = {**CONFIG, "mm_vision_tower": str(parts[3]), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)


def read_all(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def theirs(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "theirs"
    write_theirs(folder, parts)
    return folder


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    return from_authors(theirs, tmp_path_factory.mktemp("made") / "ours", num_voco=2)


def their_logits(parts, text: str, image: Image.Image) -> torch.Tensor:
    """As their code computes: features are put in where the text is cut at ``<image>``."""
    clip, llama, projector, folder = parts
    tokenizer = tiny_tokenizer()
    preprocess = CLIPImageProcessorPil.from_pretrained(folder)
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * x) for x in preprocess.image_mean))
    square.paste(image, tuple((side - length) // 2 for length in image.size))
    pixels = preprocess(square, return_tensors="pt")["pixel_values"]
    features = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    before, behind = text.split("<image>")
    head = torch.tensor([tokenizer(before).input_ids])
    tail = torch.tensor([tokenizer(behind, add_special_tokens=False).input_ids])
    embed = llama.model.embed_tokens
    joined = torch.cat([embed(head), projector(features), embed(tail)], dim=1)
    return llama(inputs_embeds=joined).logits


@torch.no_grad()
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("own_tower", [True, False], ids=["own tower", "tower elsewhere"])
def test_converts_and_comes_back(parts, tmp_path, writer, own_tower):
    tensors = their_tensors(parts, tower=own_tower)
    write_theirs(tmp_path / "theirs", parts, tensors=tensors, writer=writer)
    target = tmp_path / "new" / "ours"
    assert from_authors(tmp_path / "theirs", target, num_voco=2) == target
    assert [path.name for path in target.parent.iterdir()] == ["ours"]  # nothing is left over

    model, info = LlavaForConditionalGeneration.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = LlavaProcessor.from_pretrained(target)
    image = tiny.picture(1, (40, 64))
    inputs = processor(images=image, text="<image>\nWhat?", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    logits = model.eval()(**inputs).logits
    expected = their_logits(parts, "<image>\nWhat?", image)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits[..., : VOCO + 1], expected, atol=1e-5, rtol=1e-5)

    assert to_authors(target, tmp_path / "back") == tmp_path / "back"
    assert_same_tensors(read_all(tmp_path / "back"), tensors)
    before, after = config_of(tmp_path / "theirs"), config_of(tmp_path / "back")
    assert {key: after[key] for key in before} == before
    text = "a<voco><voco>\nb"
    back = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    assert back(text).input_ids == tiny_tokenizer()(text).input_ids
    assert back.get_vocab() == tiny_tokenizer().get_vocab()


@torch.no_grad()
def test_enable_works_on_the_result(ours):
    model = LlavaForConditionalGeneration.from_pretrained(ours).eval()
    processor = LlavaProcessor.from_pretrained(ours)
    voco_model.enable(model, processor)
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids("<VoCo>") == tokenizer.voco_token_id == VOCO
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == VOCO + 1
    assert tokenizer.pad_token_id == UNK and len(tokenizer) == VOCO + 2
    assert "<voco>" not in tokenizer.get_vocab()
    config = model.config
    assert (config.voco_token_id, config.num_voco, config.voco_prompt) == (VOCO, 2, "authors")
    assert config.voco_isolated is False and config.text_config.vocab_size == VOCO + 2
    assert config.text_config.rope_parameters["factor"] == 2.0

    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    assert text.startswith("<image>\n<VoCo><VoCo>\nA chat")
    ids = processor(images=tiny.picture(0), text=text, return_tensors="pt")["input_ids"][0]
    assert ids[0] == BOS and (ids == VOCO).sum() == 2
    (entry,) = voco_model.compress(model, tiny.picture(0), processor=processor)
    answer = voco_model.generate(model, entry, ["Who?"], processor=processor, max_new_tokens=3)
    assert answer.shape[0] == 1


def test_the_processor_says_what_the_template_is_before_enable(ours):
    processor = LlavaProcessor.from_pretrained(ours)
    assert processor.chat_template == voco_model.chat_template(2, "authors")


@pytest.fixture(scope="module")
def original(parts, tmp_path_factory):
    """As liuhaotian/llava-v1.5-7b: no ``<voco>``, no tower, pickled shards, model_type llava."""
    folder = tmp_path_factory.mktemp("made") / "llava-v1.5"
    tensors = their_tensors(parts, tower=False)
    spare = tiny_tokenizer(voco="<spare>")
    write_theirs(folder, parts, tensors=tensors, writer="bin shards", tokenizer=spare)
    config = config_of(folder) | {"model_type": "llava"}
    del config["mm_patch_merge_type"]  # which its config hasn't
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_an_original_llava_becomes_a_plain_one(parts, original, tmp_path):
    target = from_authors(original, tmp_path / "plain")
    model = LlavaForConditionalGeneration.from_pretrained(target).eval()
    processor = LlavaProcessor.from_pretrained(target)
    assert model.config.image_token_id == processor.tokenizer.image_token_id == VOCO + 1
    assert not {"<VoCo>", "<voco>"} & processor.tokenizer.get_vocab().keys()
    assert processor.chat_template is None
    facts = ("num_voco", "voco_token_id", "voco_prompt", "voco_baseline")
    assert not [name for name in facts if hasattr(model.config, name)]
    image = tiny.picture(1, (40, 64))
    inputs = processor(images=image, text="<image>\nWhat?", return_tensors="pt")
    expected = their_logits(parts, "<image>\nWhat?", image)
    logits = model(**inputs).logits[..., : VOCO + 1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_an_original_llava_is_trained_and_exported(original, tmp_path):
    plain = from_authors(original, tmp_path / "plain")
    values = instruction.config(
        plain, instruction.write_data(tmp_path / "data", 8), tmp_path / "run", prompt="authors"
    )
    train(make_config(values | {"optimizer": {"steps": 1}}))
    model, processor = voco_model.load(tmp_path / "run" / "model")
    assert (model.config.num_voco, model.config.voco_token_id) == (2, VOCO + 2)
    back = to_authors(tmp_path / "run" / "model", tmp_path / "back")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(back)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<voco>"]) == [VOCO + 1, VOCO + 2]
    again = from_authors(back, tmp_path / "again", num_voco=2)
    assert_same_tensors(read_all(again), read_all(tmp_path / "run" / "model"))


def test_num_voco_of_an_original_llava_is_a_warning(original, tmp_path, caplog):
    target = from_authors(original, tmp_path / "plain", num_voco=2, prompt="vicuna")
    (record,) = [
        record for record in caplog.records if record.name.startswith("voco_model.convert")
    ]
    assert record.getMessage() == (
        f"{original} is converted as an original LLaVA, ignoring num_voco=2: its tokenizer has no <voco>"
    )
    config = config_of(target)
    assert "num_voco" not in config and config["voco_prompt"] == "vicuna"


def command(*arguments) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    return found.exit_code, found.output


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_who_meets_the_other_layout_is_sent_here(original, tmp_path, model_type):
    """With model_type llava, Transformers would draw all weights at random; and the advice works."""
    source = tmp_path / "theirs"
    shutil.copytree(original, source)
    config = config_of(source) | {"model_type": model_type}
    (source / "config.json").write_text(json.dumps(config))
    values = instruction.config(source, instruction.write_data(tmp_path / "data"), tmp_path / "run")
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    (tmp_path / "0.png").write_bytes((tmp_path / "data" / "0.png").read_bytes())
    eval_options = ["--tasks", "gqa", "--method", "full", "--output", tmp_path / "out"]
    advice = "python -m voco_model convert from-authors SOURCE TARGET"
    for told in (
        command("train", tmp_path / "run.yaml", "--dry-run"),
        command("explain", tmp_path / "0.png", "--model", source),
        command("eval", "--model", source, *eval_options),
    ):
        assert told[0] == 2 and advice in told[1], told
    for load in (voco_model.load, baselines.load):
        with pytest.raises(TypeError, match=advice):
            load(source)
    assert command("convert", "from-authors", source, tmp_path / "plain")[0] == 0
    voco_model.load(tmp_path / "plain")
    again = command("train", tmp_path / "run.yaml", "--dry-run", "--model", tmp_path / "plain")
    assert again[0] == 0, again


@pytest.mark.parametrize("aspect", ["pad", "square", None])
def test_preprocessing_is_clips(parts, tmp_path, aspect):
    write_theirs(tmp_path / "theirs", parts, image_aspect_ratio=aspect)
    processor = LlavaProcessor.from_pretrained(
        from_authors(tmp_path / "theirs", tmp_path / "ours", num_voco=1)
    )
    assert processor.image_processor.do_pad is (aspect == "pad")
    image = tiny.picture(3, (50, 64))
    if aspect == "pad":
        padded = Image.new("RGB", (64, 64), (122, 116, 104))  # CLIP's mean
        padded.paste(image, (0, 7))
        expected = CLIPImageProcessorPil.from_pretrained(parts[3])(padded, return_tensors="pt")
    else:
        expected = CLIPImageProcessorPil.from_pretrained(parts[3])(image, return_tensors="pt")
    found = processor.image_processor(image, return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"])
    back = config_of(to_authors(tmp_path / "ours", tmp_path / "back"))
    assert back["image_aspect_ratio"] == aspect


def test_new_rows_are_the_mean_and_never_the_answer(parts, tmp_path):
    tokenizer = tiny_tokenizer(pad="</s>")
    write_theirs(tmp_path / "theirs", parts, tokenizer=tokenizer)
    ours = from_authors(tmp_path / "theirs", tmp_path / "ours", num_voco=1)
    tokenizer = LlavaProcessor.from_pretrained(ours).tokenizer
    assert (tokenizer.image_token_id, tokenizer.pad_token_id) == (VOCO + 1, VOCO + 2)
    model = LlavaForConditionalGeneration.from_pretrained(ours)
    assert model.config.text_config.pad_token_id == VOCO + 2
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert weight.shape == (VOCO + 3, HIDDEN)
        mean = weight[: VOCO + 1].mean(0)
        torch.testing.assert_close(weight[VOCO + 1 :], mean.expand(2, -1))
    back = to_authors(ours, tmp_path / "back")
    assert_same_tensors(read_all(back), their_tensors(parts))
    assert config_of(back)["vocab_size"] == VOCO + 1


def test_spare_rows_are_used_and_kept(parts, tmp_path):
    """Embeddings padded to a multiple of 64, as some trainers do."""
    tensors = their_tensors(parts)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(60, HIDDEN)])
    write_theirs(tmp_path / "theirs", parts, tensors=tensors, vocab_size=320)
    ours = from_authors(tmp_path / "theirs", tmp_path / "ours", num_voco=1)
    assert config_of(ours)["text_config"]["vocab_size"] == 320
    back = to_authors(ours, tmp_path / "back")
    assert_same_tensors(read_all(back), tensors)
    assert "<image>" not in PreTrainedTokenizerFast.from_pretrained(back).get_vocab()


def test_dtypes_are_kept_unless_one_is_given(parts, tmp_path):
    tensors = their_tensors(parts)
    tensors = {
        name: value if name.startswith(TOWER) else value.bfloat16()
        for name, value in tensors.items()
    }
    write_theirs(tmp_path / "theirs", parts, tensors=tensors, writer="bin")
    ours = from_authors(tmp_path / "theirs", tmp_path / "ours", num_voco=1)
    back = to_authors(ours, tmp_path / "back")
    assert_same_tensors(read_all(back), tensors)
    assert config_of(back)["torch_dtype"] == "bfloat16"
    half = from_authors(tmp_path / "theirs", tmp_path / "half", num_voco=1, dtype="float16")
    assert {value.dtype for value in read_all(half).values()} == {torch.float16}
    assert config_of(half)["dtype"] == "float16"


def test_a_tower_elsewhere_has_the_dtype_of_the_language_model(parts, tmp_path):
    tensors = {name: value.bfloat16() for name, value in their_tensors(parts, False).items()}
    write_theirs(tmp_path / "theirs", parts, tensors=tensors, mm_vision_tower="not/there")
    ours = from_authors(tmp_path / "theirs", tmp_path / "ours", num_voco=1, vision_tower=parts[3])
    assert {value.dtype for value in read_all(ours).values()} == {torch.bfloat16}
    assert config_of(to_authors(ours, tmp_path / "back"))["mm_vision_tower"] == "not/there"


def test_buffers_of_old_releases_are_left_out(parts, tmp_path):
    tensors = their_tensors(parts)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors[TOWER + "embeddings.position_ids"] = torch.arange(17)[None]
    write_theirs(tmp_path / "theirs", parts, tensors=tensors, writer="bin")
    ours = from_authors(tmp_path / "theirs", tmp_path / "ours", num_voco=1)
    assert_same_tensors(read_all(to_authors(ours, tmp_path / "back")), their_tensors(parts))


def test_a_model_of_transformers_own(tmp_path):
    """Enabled, saved, exported: <pad> and <image> come before <VoCo>, so all rows are kept."""
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    handle = voco_model.enable(model, processor, num_voco=2)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    handle.undo()
    with pytest.raises(
        ValueError, match=r"expected the name of the vision tower .* got none; .*--vision-tower"
    ):
        to_authors(tmp_path / "ours", tmp_path / "theirs")
    config = config_of(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"voco_distinct": True}))
    # What no option can mend is refused before what an option is missing for.
    with pytest.raises(ValueError, match="expected one embedding row shared by all VoCo tokens"):
        to_authors(tmp_path / "ours", tmp_path / "theirs")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    tower = tmp_path / "clip"
    model.model.vision_tower.save_pretrained(tower)
    processor.image_processor.save_pretrained(tower)
    theirs = to_authors(tmp_path / "ours", tmp_path / "theirs", vision_tower=tower)
    config = config_of(theirs)
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert (config["model_type"], config["vocab_size"]) == ("llava_llama", tiny.VOCO + 1)
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    assert (config["mm_vision_select_layer"], config["mm_vision_select_feature"]) == (-2, "patch")
    assert config["image_aspect_ratio"] == "square"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(theirs)
    assert tokenizer.convert_tokens_to_ids("<voco>") == tiny.VOCO
    assert tokenizer.convert_tokens_to_ids("<image>") == tiny.IMAGE
    tensors = read_all(theirs)
    assert tensors["lm_head.weight"].shape[0] == tiny.VOCO + 1
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)

    again = from_authors(theirs, tmp_path / "again", num_voco=2)
    assert_same_tensors(read_all(again), read_all(tmp_path / "ours"))


def test_tokens_that_were_added_later_stay(ours, tmp_path):
    """A token behind <image> would move if that went."""
    model = LlavaForConditionalGeneration.from_pretrained(ours)
    processor = LlavaProcessor.from_pretrained(ours)
    processor.tokenizer.add_tokens(["<later>"])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    processor.save_pretrained(tmp_path / "grown")
    back = to_authors(tmp_path / "grown", tmp_path / "back")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(back)
    names = ["<voco>", "<image>", "<later>"]
    assert tokenizer.convert_tokens_to_ids(names) == [VOCO, VOCO + 1, VOCO + 2]
    assert config_of(back)["vocab_size"] == VOCO + 3


def test_a_sentencepiece_tokenizer_goes_along(theirs, tmp_path):
    """Their code reads tokenizer.model and these files; the model file is copied as it is."""
    source = tmp_path / "theirs"
    shutil.copytree(theirs, source)
    (source / "tokenizer.model").write_bytes(b"pieces")
    ours = from_authors(source, tmp_path / "ours", num_voco=2)
    back = to_authors(ours, tmp_path / "back")
    assert (back / "tokenizer.model").read_bytes() == b"pieces"
    settings = json.loads((back / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizer" and settings["legacy"] is True
    assert settings["additional_special_tokens"] == ["<voco>"]
    assert settings["added_tokens_decoder"][str(VOCO)]["content"] == "<voco>"
    assert settings["added_tokens_decoder"][str(VOCO)]["special"] is True
    assert not {"voco_token", "image_token"} & settings.keys()


@pytest.mark.parametrize("legacy", [False, True, None])
def test_llamas_tokenizer_gives_the_same_ids(parts, tmp_path, legacy):
    """With their Transformers, a config without ``legacy`` meant a legacy tokenizer."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"what is in picture {n} of {n * n} images?" for n in range(200)))
    source = tmp_path / "theirs"
    write_theirs(source, parts)
    for file in source.glob("*token*"):
        file.unlink()
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(source / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    voco = {"content": "<voco>", "lstrip": False, "normalized": False, "rstrip": False}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "additional_special_tokens": ["<voco>"],
        "added_tokens_decoder": {"300": {**voco, "single_word": False, "special": True}},
    } | ({} if legacy is None else {"legacy": legacy})
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tensors = their_tensors(parts)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(301, HIDDEN)
    save_torch_state_dict(tensors, source)
    config = config_of(source) | {"vocab_size": 301}
    (source / "config.json").write_text(json.dumps(config))

    ours = from_authors(source, tmp_path / "ours", num_voco=2)
    back = to_authors(ours, tmp_path / "back")
    (back / "tokenizer.json").unlink()  # as the authors' code, which asks for the slow tokenizer
    again = from_authors(back, tmp_path / "again", num_voco=2)
    pieces = spm.SentencePieceProcessor(str(source / "tokenizer.model"))
    newline = pieces.piece_to_id("<0x0A>")
    behind = [newline] if legacy is False else [pieces.piece_to_id("▁"), newline]
    for folder in (ours, again):
        tokenizer = LlavaProcessor.from_pretrained(folder).tokenizer
        assert (tokenizer.voco_token_id, tokenizer.image_token_id) == (300, 301)
        ids = tokenizer("what is<VoCo><VoCo>\nin").input_ids
        assert ids[0] == 1 and ids[1 : ids.index(300)] == pieces.encode("what is")
        rest = ids[ids.index(300) :]
        assert rest[:2] == [300, 300] and rest[2 : 2 + len(behind)] == behind


WRONG_CONFIG = [
    (
        {"model_type": "llava_mistral"},
        "expected model_type 'llava_llama' or 'llava', got 'llava_mis",
    ),
    (
        {"architectures": ["LlavaMptForCausalLM"]},
        r"expected architectures \['LlavaLlamaForCausalLM",
    ),
    ({"quantization_config": {"bits": 4}}, "expected quantization_config missing, got {'bits': 4}"),
    ({"mm_projector_type": "linear"}, "expected mm_projector_type 'mlp2x_gelu', got 'linear'"),
    ({"mm_projector_type": None}, "expected mm_projector_type 'mlp2x_gelu', got None"),
    (
        {"mm_patch_merge_type": "spatial_unpad"},
        "expected mm_patch_merge_type 'flat', got 'spatial_u",
    ),
    (
        {"image_aspect_ratio": "anyres"},
        "expected image_aspect_ratio 'pad' or 'square', got 'anyres'",
    ),
    ({"mm_use_im_start_end": True}, "expected mm_use_im_start_end False, got True"),
    ({"mm_resampler_type": "perceiver"}, "expected mm_resampler_type missing, got 'perceiver'"),
    (
        {"mm_vision_select_feature": "cls"},
        "expected mm_vision_select_feature 'patch' or 'cls_patch'",
    ),
    ({"tie_word_embeddings": True}, "expected tie_word_embeddings False, got True"),
    ({"mm_vision_select_layer": [-2]}, r"expected mm_vision_select_layer as an integer .* \[-2\]"),
    (
        {"mm_vision_tower": None},
        "expected mm_vision_tower in the config, got none; pass vision_tower",
    ),
    ({"mm_vision_tower": "/not/there"}, "expected a readable vision tower, got /not/there"),
    ({"hidden_size": 32}, r"expected the shapes of the config, .*, got \[.*check .*config.json"),
    ({"num_hidden_layers": 3}, r"got 9 missing \(model.layers.2.* and 4 more\) and 0 unexpected"),
]


@pytest.mark.parametrize("changes, message", WRONG_CONFIG)
def test_another_layout_is_refused(parts, tmp_path, changes, message):
    write_theirs(tmp_path / "theirs", parts, **changes)
    refused(tmp_path, message)


def refused(tmp_path, message, error=ValueError, **options) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        from_authors(tmp_path / "theirs", tmp_path / "ours", **{"num_voco": 2, **options})
    assert sorted(tmp_path.iterdir()) == before, "something was written"


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda tensors: tensors.pop("model.mm_projector.2.bias"),
            r"got 1 missing \(model.mm_projector.2.bias\) and 0 unexpected \(none\); convert the",
        ),
        (
            lambda tensors: tensors.update({"model.image_newline": torch.ones(HIDDEN)}),
            r"got 0 missing \(none\) and 1 unexpected \(model.image_newline\)",
        ),
        (
            lambda tensors: tensors.pop(TOWER + "post_layernorm.bias"),
            r"got 1 missing \(model.vision_tower.vision_tower.vision_model.post_layernorm.bias\)",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(260, 64).to(torch.int8)}),
            r"expected floating point tensors in .*, got others: lm_head.weight; convert",
        ),
    ],
)
def test_other_tensors_are_refused(parts, tmp_path, edit, message):
    tensors = their_tensors(parts)
    edit(tensors)
    write_theirs(tmp_path / "theirs", parts, tensors=tensors)
    refused(tmp_path, message)


def test_a_tower_that_isnt_clip_or_isnt_whole_is_refused(parts, tmp_path):
    tensors = their_tensors(parts, tower=False)
    llama, part = tmp_path / "llama", tmp_path / "part"
    write_theirs(tmp_path / "theirs", parts, tensors=tensors)
    parts[1].config.save_pretrained(llama)
    refused(tmp_path, "expected a CLIP model as vision tower, got .*'llama'", vision_tower=llama)
    shutil.copytree(parts[3], part)
    weights = load_file(part / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("post_layernorm.bias")))
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    refused(
        tmp_path, "expected a complete CLIP vision model in .*post_layernorm", vision_tower=part
    )
    (part / "preprocessor_config.json").unlink()
    refused(tmp_path, "expected preprocessor_config.json in the vision tower", vision_tower=part)


def test_another_tokenizer_is_refused(parts, tmp_path):
    write_theirs(tmp_path / "theirs", parts, tokenizer=tiny_tokenizer(voco="<VoCo>"))
    refused(tmp_path, "expected a tokenizer without <VoCo>, got one where it has the id 259")
    tokenizer = tiny_tokenizer(voco="<other>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<voco>"]})
    tokenizer.save_pretrained(tmp_path / "theirs")
    refused(tmp_path, "expected an embedding row for <voco> = 260, got 260 rows")
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    refused(tmp_path, "expected tokenizer.json or tokenizer.model in .*, got neither")


def test_sentencepiece_is_asked_for(parts, tmp_path, monkeypatch):
    write_theirs(tmp_path / "theirs", parts)
    (tmp_path / "theirs" / "tokenizer.json").rename(tmp_path / "theirs" / "tokenizer.model")
    monkeypatch.setattr(convert_tokenizer, "is_sentencepiece_available", lambda: False)
    refused(tmp_path, "expected sentencepiece and protobuf to read .*; pip install", ImportError)


def test_wrong_arguments_and_folders_are_refused(parts, tmp_path):
    theirs = tmp_path / "theirs"
    refused(
        tmp_path, "expected a local folder with a checkpoint, got .*theirs, without config.json"
    )
    write_theirs(theirs, parts, writer="safetensors shards")
    for num_voco in (0, True, 1.0):
        refused(tmp_path, f"expected an int num_voco >= 1, got {num_voco}", num_voco=num_voco)
    refused(tmp_path, "expected num_voco for a tokenizer with <voco>, got none", num_voco=None)
    refused(tmp_path, "expected a prompt style among .*, got 'theirs'", prompt="theirs")
    for dtype in ("half float", "int8", torch.int8):
        refused(tmp_path, "expected dtype as a floating point dtype of torch", dtype=dtype)
    next(theirs.glob("model-*.safetensors")).unlink()
    refused(tmp_path, "expected all files of the index in .*, got none named model-0")
    (theirs / "model.safetensors.index.json").unlink()
    refused(tmp_path, "expected weights in .*, got none; merge adapters")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "file").touch()
    refused(tmp_path, "expected a target that is missing or an empty folder, got .*ours")
    with pytest.raises(ValueError, match="expected a target that is missing or an empty folder"):
        to_authors(theirs, tmp_path / "ours")


def test_an_error_while_writing_leaves_nothing(theirs, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(LlavaProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        from_authors(theirs, tmp_path / "ours", num_voco=2)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "ours").mkdir()  # an empty one is filled
    assert (from_authors(theirs, tmp_path / "ours", num_voco=2) / "config.json").is_file()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llava_next"}, "expected model_type 'llava', got 'llava_next'"),
        (
            {"text_config.model_type": "mistral"},
            "expected text_config.model_type 'llama', got 'mist",
        ),
        (
            {"vision_config.model_type": "siglip_vision_model"},
            "vision_config.model_type 'clip_visio",
        ),
        ({"projector_hidden_act": "relu"}, "expected projector_hidden_act 'gelu', got 'relu'"),
        (
            {"multimodal_projector_bias": False},
            "expected multimodal_projector_bias True, got False",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "expected quantization_config missing, got {'bits': 4}",
        ),
        ({"text_config.mlp_bias": True}, "expected text_config.mlp_bias False, got True"),
        (
            {"text_config.rope_parameters.rope_type": "llama3"},
            "rope_type 'default' or 'linear' or ",
        ),
        ({"vision_feature_layer": [-2, -3]}, r"expected one vision_feature_layer, got \[-2, -3\]"),
        (
            {"voco_distinct": True},
            "expected one embedding row shared by all VoCo tokens, .* with 2 VoCo tokens",
        ),
        ({"voco_token_id": 7}, "expected the same id for <VoCo> in config and .*, got 7 and 259"),
        (
            {"text_config.num_hidden_layers": 3},
            r"got 9 missing \(model.layers.2.*; convert the complete",
        ),
    ],
)
def test_what_theirs_has_no_place_for_is_refused(ours, tmp_path, changes, message):
    source = tmp_path / "ours"
    source.mkdir()
    for file in ours.iterdir():
        (source / file.name).symlink_to(file)
    config = config_of(ours)
    for key, value in changes.items():
        *path, last = key.split(".")
        part = config
        for name in path:
            part = part[name]
        part[last] = value
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        to_authors(source, tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"], "something was written"


def test_names_of_later_files_are_known(ours, tmp_path):
    """A model's own names, which some releases write."""
    source = tmp_path / "ours"
    shutil.copytree(ours, source)
    state = LlavaForConditionalGeneration.from_pretrained(ours).state_dict()
    save_file(state, source / "model.safetensors")
    expected = read_all(to_authors(ours, tmp_path / "one"))
    assert_same_tensors(read_all(to_authors(source, tmp_path / "two")), expected)


def test_gelu_is_exact():
    """Theirs is torch.nn.GELU(); Transformers' "gelu" isn't the tanh approximation."""
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(ACT2FN["gelu"](x), F.gelu(x), atol=0, rtol=0)

"""Checkpoints of VoCo-LLaMA's authors and of the original LLaVA, to Transformers' layout and back.

Both layouts hold the same tensors under other names. Theirs has the token ``<voco>``, and no row for
the image: a negative id stands for it until its features are put in. Transformers' LLaVA has a token
``<image>``. ``docs/convert.md`` tells what is kept and what theirs doesn't record.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import (
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    is_protobuf_available,
    is_sentencepiece_available,
    is_torchvision_available,
)

from voco_model.checkpoint_files import check_files, listed, weight_files
from voco_model.vlm.prompt import IMAGE_TOKEN, VOCO_TOKEN, chat_template, style_of

logger = logging.getLogger(__name__)

AUTHORS_VOCO_TOKEN = "<voco>"
PAD_TOKEN = "<pad>"

# Names of tensors: what they begin with in a LlavaForConditionalGeneration, and in the authors' files.
_NAMES = {
    "lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}
_TOWER = _NAMES["model.vision_tower."]
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
# The same in files that Transformers has written: its releases differ. The longest that fits.
_NAMES_IN_FILES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.": "model.vision_tower.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "model.vision_tower.vision_model.": "model.vision_tower.",
}
# Buffers that old releases have saved; they follow from the config.
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")

# What their config may say, where it decides what is computed.
_KNOWN = {
    "model_type": ("llava_llama", "llava"),
    "architectures": (["LlavaLlamaForCausalLM"],),
    "quantization_config": (None,),
    "tie_word_embeddings": (None, False),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": (None, "flat"),
    "mm_resampler_type": (None,),
    "mm_vision_select_feature": (None, "patch", "cls_patch"),
    "mm_use_im_start_end": (None, False),
    "image_aspect_ratio": (None, "pad", "square"),
}
# What a config of Transformers may say, to have a counterpart in theirs; dots lead into its parts.
_CONVERTIBLE = {
    "model_type": ("llava",),
    "text_config.model_type": ("llama",),
    "vision_config.model_type": ("clip_vision_model",),
    "quantization_config": (None,),
    "tie_word_embeddings": (None, False),
    "projector_hidden_act": (None, "gelu"),
    "multimodal_projector_bias": (None, True),
    "text_config.mlp_bias": (None, False),
    "text_config.rope_parameters.rope_type": (None, "default", "linear", "dynamic"),
}
_STRATEGY = {"patch": "default", "cls_patch": "full"}
# The fields of a LlamaConfig that theirs has as well, under the same names.
_LLAMA_FIELDS = set(LlamaConfig.__annotations__) - {"rope_parameters", "mlp_bias", "head_dim"}


def from_authors(
    source: str | Path,
    target: str | Path,
    *,
    num_voco: int | None = None,
    vision_tower: str | Path | None = None,
    prompt: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write a checkpoint of the authors, or an original LLaVA-1.5, in Transformers' layout.

    What is written is a ``LlavaForConditionalGeneration`` with its processor. For a checkpoint of the
    authors ``voco_model.enable(model, processor)`` then needs no more arguments: ``<voco>`` becomes
    ``<VoCo>`` under the same id. A tokenizer without ``<voco>`` is of the original LLaVA, from which
    training starts: it stays without VoCo tokens and without a chat template; ``enable`` or ``python -m
    voco_model train`` adds both. Behind the tokens that are there come the new ones ``<image>`` and,
    where the tokenizer has no padding token, or the end of sequence for it, ``<pad>``. Embeddings and
    output layer ``[rows, hidden]`` grow for those that have no row yet, by the mean of all rows: the
    logit of such a row is a mean of logits, so it is never the largest. Other tensors stay as they are,
    to the bit; buffers that follow from the
    config are left out. The config remembers the authors' in ``converted_from``, for ``to_authors``.

    Args:
        source: a folder with ``config.json``, the tokenizer, and weights in safetensors or
            ``pytorch_model.bin``, in one file or several. Weights are mapped, not copied.
        target: the folder to write; missing or empty. It appears when all is written.
        num_voco: VoCo tokens an image, which the authors' checkpoints don't record; their published
            code has 2. Of an original LLaVA it is not written, with a warning.
        vision_tower: folder or name of a CLIP model, by default the config's ``mm_vision_tower``. It
            gives the vision config and the preprocessing; its weights, in the dtype of the language
            model, only where the checkpoint has none of its own.
        prompt: the style of prompts, a name of ``vlm.prompt.STYLES``; by default ``"authors"``,
            of an original LLaVA none is written.
        dtype: of all tensors, ``torch.bfloat16`` or ``"bfloat16"``; by default each keeps its own.

    Returns:
        ``target``.

    Raises:
        ValueError: a target that isn't empty, a checkpoint of another layout (what is missing or too
            much is named), files that are missing or break off, ``<voco>`` without ``num_voco``, or
            arguments out of range. Nothing is written then.
        ImportError: a ``tokenizer.model`` alone, without sentencepiece and protobuf to read it.

    Source: https://github.com/Yxxxb/VoCo-LLaMA, ``llava/model/llava_arch.py``, ``multimodal_projector``,
    ``multimodal_encoder`` and ``llava/train/train_compress.py`` at 3b6e14d.
    """
    source, target = _checked_source(source), _checked_target(target)
    if num_voco is not None and (type(num_voco) is not int or num_voco < 1):
        raise ValueError(f"expected num_voco >= 1, got {num_voco!r}")
    if prompt is not None:
        style_of(prompt)
    dtype = _checked_dtype(dtype)
    theirs = _read_config(source, _KNOWN)
    tensors = _read_tensors(source)
    own_tower = any(name.startswith(_TOWER) for name in tensors)
    tower = vision_tower or theirs.get("mm_vision_tower")
    config = _config_from(theirs, _vision_config(tower))
    _check_tensors(tensors, _names_and_shapes(config, with_tower=own_tower), source)
    tokenizer, added = _tokenizer_from(_load_tokenizer(source))
    facts = _voco_facts(tokenizer, source, num_voco, prompt)
    rows = config.text_config.vocab_size
    if facts.get("voco_token_id", 0) >= rows:
        raise ValueError(
            f"expected an embedding row for {AUTHORS_VOCO_TOKEN} = {facts['voco_token_id']}, got "
            f"{rows} rows in {source}; its tokenizer and its weights come from different checkpoints"
        )
    processor = _processor(config, tokenizer, tower, theirs.get("image_aspect_ratio") == "pad")
    if "num_voco" in facts:
        processor.chat_template = chat_template(num_voco, facts["voco_prompt"])
    if not own_tower:
        tensors |= _tower_tensors(tower, dtype or tensors["lm_head.weight"].dtype)
    for name in _EMBEDDINGS:
        tensors[name] = _with_mean_rows(tensors[name], len(tokenizer))

    config.text_config.vocab_size = max(rows, len(tokenizer))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    config.image_token_index = tokenizer.image_token_id
    facts["converted_from"] = {
        "config": theirs,
        "rows": rows,
        "added_tokens": added,
        "vision_tower_weights": own_tower,
    }
    for name, value in facts.items():
        setattr(config, name, value)

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    state = {name: tensors.pop(_renamed(name, _NAMES)) for name in model.state_dict()}
    if dtype is not None:
        state = {name: state.pop(name).to(dtype) for name in list(state)}
    model.load_state_dict(state, assign=True)
    with _appearing(target) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        _copy_sentencepiece(source, folder)
    return target


def to_authors(
    source: str | Path, target: str | Path, *, vision_tower: str | Path | None = None
) -> Path:
    """Write a LLaVA-1.5 with VoCo tokens in the authors' layout; the inverse of ``from_authors``.

    What ``from_authors`` has converted comes back with the same tensors, to the bit, and the same
    config, but for what was changed since. ``<VoCo>`` becomes ``<voco>`` under the same id. Tokens that
    were added for Transformers go, with their rows; in a model that wasn't converted, ``<image>`` and
    ``<pad>``. They go only where all of them stand behind all other tokens, since no id may move; rows
    are kept up to the last token that stays. In a model whose ``<image>`` and ``<pad>`` come before
    ``<VoCo>``, as in one that ``enable`` has given the token, that is ``<VoCo>``, and its id isn't
    32000, which the authors' code has as a literal.

    Args:
        source: a folder that ``model.save_pretrained`` and ``processor.save_pretrained`` have written.
        target: the folder to write; missing or empty. It appears when all is written.
        vision_tower: what to write for ``mm_vision_tower``, from where their code takes the vision
            tower. Needed only where the model wasn't converted by ``from_authors``.

    Returns:
        ``target``. The tower's weights are in it unless they were missing in the authors' checkpoint.

    Raises:
        ValueError: a target that isn't empty, a model or a tokenizer that the authors' layout has no
            place for, or tensors missing or too much. Nothing is written then.
    """
    source, target = _checked_source(source), _checked_target(target)
    _read_config(source, _CONVERTIBLE)
    config = LlavaConfig.from_pretrained(source)
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"expected one vision_feature_layer, got {config.vision_feature_layer}; the authors' "
            "layout has mm_vision_select_layer, an integer"
        )
    if getattr(config, "voco_distinct", False) and config.num_voco > 1:
        raise ValueError(
            f"expected one embedding row for all VoCo tokens, got voco_distinct=True with "
            f"{config.num_voco} of them; the authors' layout has one"
        )
    record = getattr(config, "converted_from", None)
    tower = vision_tower or (record and record["config"].get("mm_vision_tower"))
    if not tower:
        raise ValueError(
            "expected the name of the vision tower, got a model that wasn't converted by from_authors; "
            "pass vision_tower='openai/clip-vit-large-patch14-336', or what it was made from"
        )
    tensors = _to_authors_names(_read_tensors(source), config, source)
    processor = LlavaProcessor.from_pretrained(source)
    tokenizer, last = _tokenizer_to(processor.tokenizer, config, record)
    rows = max(last + 1, record["rows"] if record else 0)
    if rows > config.text_config.vocab_size:
        raise ValueError(
            f"expected at least {rows} embedding rows, one for each token, got "
            f"{config.text_config.vocab_size} in {source}"
        )

    for name in _EMBEDDINGS:
        tensors[name] = tensors[name][:rows].clone()
    if record and not record["vision_tower_weights"]:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TOWER)}
    theirs = {
        "architectures": _KNOWN["architectures"][0],
        "model_type": _KNOWN["model_type"][0],
        **(record["config"] if record else {}),
        **_llama_fields(config.text_config),
        "vocab_size": rows,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": str(tensors["lm_head.weight"].dtype).removeprefix("torch."),
        **_vision_fields(config, str(tower), processor.image_processor.do_pad, record),
    }
    with _appearing(target) as folder:
        save_torch_state_dict(tensors, folder)
        (folder / "config.json").write_text(json.dumps(theirs, indent=2, sort_keys=True) + "\n")
        tokenizer.save_pretrained(folder)
        if _copy_sentencepiece(source, folder):
            _describe_for_sentencepiece(tokenizer, folder)
    return target


def _voco_facts(tokenizer, source: Path, num_voco: int | None, prompt: str | None) -> dict:
    """What the config says of VoCo tokens; of an original LLaVA no more than a style that was given."""
    voco_token_id = tokenizer.get_vocab().get(VOCO_TOKEN)
    if voco_token_id is None:
        if num_voco is not None:
            logger.warning(
                "%s is converted as an original LLaVA, without num_voco=%s: its tokenizer has no %s",
                source,
                num_voco,
                AUTHORS_VOCO_TOKEN,
            )
        return {} if prompt is None else {"voco_prompt": prompt}
    if num_voco is None:
        raise ValueError(
            f"expected num_voco for a tokenizer with {AUTHORS_VOCO_TOKEN}, got none; pass the number "
            "that the model was trained with, 2 in the authors' code"
        )
    return {
        "voco_token_id": voco_token_id,
        "num_voco": num_voco,
        "voco_isolated": False,
        "voco_distinct": False,
        "voco_prompt": prompt or "authors",
    }


def _checked_source(source: str | Path) -> Path:
    source = Path(source)
    if not (source / "config.json").is_file():
        raise ValueError(
            f"expected a local folder with a checkpoint, got {source}, without config.json; download it "
            "first"
        )
    check_files(source)
    return source


def _checked_target(target: str | Path) -> Path:
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"expected a target that is missing or an empty folder, got {target}, which isn't; give "
            "another, or remove it"
        )
    return target


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or isinstance(known, torch.dtype) and known.is_floating_point:
        return known
    raise ValueError(
        f"expected dtype as a floating point dtype of torch or its name, got {dtype!r}"
    )


def _read_config(source: Path, known: Mapping[str, tuple]) -> dict:
    """``config.json``, if it says what we know."""
    config = json.loads((source / "config.json").read_text())
    wrong = []
    for key, allowed in known.items():
        value = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed if choice is not None)
            wrong.append(f"{key} {choices or 'missing'}, got {value!r}")
    if wrong:
        raise ValueError(
            f"expected {'; expected '.join(wrong)} in {source / 'config.json'}; no other layout can be "
            "converted"
        )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors by name, mapped from the files; safetensors where there are both kinds."""
    files = weight_files(folder)
    if not files:
        raise ValueError(
            f"expected weights in {folder}, {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, whole or with an "
            "index, got none; merge adapters (LoRA, a projector alone) into their base model first"
        )
    tensors = {}
    for file in files:
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        else:
            tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    tensors = {name: value for name, value in tensors.items() if not name.endswith(_BUFFERS)}
    others = [
        name
        for name, value in tensors.items()
        if not isinstance(value, Tensor) or not value.is_floating_point()
    ]
    if others:
        raise ValueError(
            f"expected floating point tensors, got others in {folder}: {listed(others)}; convert the "
            "checkpoint that this one was quantized from"
        )
    return tensors


def _vision_config(tower: str | Path | None) -> CLIPVisionConfig:
    if not tower:
        raise ValueError(
            "expected mm_vision_tower in the config, got none; pass vision_tower, a folder or a name"
        )
    check_files(tower)
    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a vision tower that can be read, got {tower}: {error}; pass vision_tower, a "
            "folder or a name"
        ) from error
    config = getattr(config, "vision_config", config)
    if not isinstance(config, CLIPVisionConfig):
        raise ValueError(
            f"expected a CLIP model as vision tower, got {tower} with model_type {config.model_type!r}; "
            "pass the one that the checkpoint was trained with as vision_tower"
        )
    return config


def _config_from(theirs: Mapping, vision: CLIPVisionConfig) -> LlavaConfig:
    """Still with their rows, without a token for the image."""
    layer = theirs.get("mm_vision_select_layer")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(
            f"expected mm_vision_select_layer as an integer in the config, got {layer!r}; LLaVA-1.5 "
            "has -2"
        )
    fields = _LLAMA_FIELDS | {"rope_theta", "rope_scaling"}
    text = {name: value for name, value in theirs.items() if name in fields}
    feature = theirs.get("mm_vision_select_feature") or "patch"
    patches = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=vision,
        vision_feature_layer=layer,
        vision_feature_select_strategy=_STRATEGY[feature],
        image_seq_length=patches + (feature == "cls_patch"),
    )


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """The name with another beginning, where the table has one for it: the longest."""
    old = max(filter(name.startswith, table), key=len, default="")
    return table.get(old, "") + name.removeprefix(old)


def _names_and_shapes(config: LlavaConfig, *, with_tower: bool) -> dict[str, torch.Size]:
    """What a checkpoint of the authors holds."""
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    named = {_renamed(name, _NAMES): value.shape for name, value in state.items()}
    return {
        name: shape for name, shape in named.items() if with_tower or not name.startswith(_TOWER)
    }


def _check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: Path
) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"expected the tensors of the config in {source}, got {len(missing)} missing "
            f"({listed(missing)}) and {len(unexpected)} unexpected ({listed(unexpected)}); convert "
            "the whole, merged checkpoint of a LLaVA-1.5"
        )
    wrong = [name for name, shape in expected.items() if tensors[name].shape != shape]
    if wrong:
        shapes = listed(
            f"{name} {list(expected[name])}, got {list(tensors[name].shape)}" for name in wrong
        )
        raise ValueError(
            f"expected the shapes of the config, {shapes}; check {source / 'config.json'} and "
            "vision_tower"
        )


def _tower_tensors(tower: str | Path, dtype: torch.dtype) -> dict[str, Tensor]:
    model, info = CLIPVisionModel.from_pretrained(tower, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"expected a whole CLIP vision model in {tower}, got one without "
            f"{listed(sorted(info['missing_keys']))}; pass another vision_tower"
        )
    return {_TOWER + name: value for name, value in model.state_dict().items()}


def _with_mean_rows(weight: Tensor, rows: int) -> Tensor:
    """``[old, hidden]`` to ``[max(old, rows), hidden]``."""
    more = rows - len(weight)
    if more <= 0:
        return weight
    mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(more, -1)])


def _load_tokenizer(source: Path):
    has_json = (source / "tokenizer.json").is_file()
    has_model = (source / "tokenizer.model").is_file()
    if not has_json and not has_model:
        raise ValueError(
            f"expected tokenizer.json or tokenizer.model in {source}, got neither; copy the tokenizer "
            "of the checkpoint there"
        )
    if not has_json and not (is_sentencepiece_available() and is_protobuf_available()):
        raise ImportError(
            f"expected sentencepiece and protobuf, to read {source / 'tokenizer.model'}, got an "
            "environment without them; pip install sentencepiece protobuf"
        )
    path = source / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    # The defaults of a Llama tokenizer in the authors' Transformers (4.37); they are others now.
    defaults = {"legacy": True, "add_bos_token": True, "add_eos_token": False}
    if not str(settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
        defaults = {}
    unsaid = {name: value for name, value in defaults.items() if settings.get(name) is None}
    # A config of our own: Transformers would ask theirs for the class, and warn that it knows none.
    return AutoTokenizer.from_pretrained(source, config=LlamaConfig(), **unsaid)


def _tokenizer_from(tokenizer) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Our tokenizer from theirs, and the tokens that are new in it."""
    vocab = tokenizer.get_vocab()
    if VOCO_TOKEN in vocab:
        raise ValueError(
            f"expected a tokenizer without {VOCO_TOKEN}, got one where it is {vocab[VOCO_TOKEN]}; a "
            "checkpoint of the authors has " + AUTHORS_VOCO_TOKEN
        )
    has_voco = AUTHORS_VOCO_TOKEN in vocab
    backend = _edited(tokenizer, {AUTHORS_VOCO_TOKEN: VOCO_TOKEN})
    pad = tokenizer.pad_token
    if pad is None or pad in (tokenizer.eos_token, tokenizer.bos_token, AUTHORS_VOCO_TOKEN):
        pad = PAD_TOKEN
    added = [token for token in (IMAGE_TOKEN, pad) if token not in vocab]
    backend.add_special_tokens([IMAGE_TOKEN, pad])
    names = {"image_token": IMAGE_TOKEN} | ({"voco_token": VOCO_TOKEN} if has_voco else {})
    return _rebuilt(tokenizer, backend, pad, names), added


def _tokenizer_to(tokenizer, config: LlavaConfig, record: Mapping | None):
    """Their tokenizer from ours, and the largest id in it."""
    vocab = tokenizer.get_vocab()
    voco_token_id = getattr(config, "voco_token_id", None)
    if voco_token_id is None or vocab.get(VOCO_TOKEN) != voco_token_id:
        raise ValueError(
            f"expected one id of {VOCO_TOKEN} in config and tokenizer, got {voco_token_id} and "
            f"{vocab.get(VOCO_TOKEN)}; call voco_model.enable(model, processor) and save both"
        )
    added = record["added_tokens"] if record else (IMAGE_TOKEN, PAD_TOKEN)
    last = max(id for token, id in vocab.items() if token not in added)
    # Ids must not move: only what stands behind all others can go.
    dropped = {token for token in added if vocab.get(token, -1) > last}
    if any(token in vocab for token in set(added) - dropped):
        dropped, last = set(), max(vocab.values())
    backend = _edited(tokenizer, {VOCO_TOKEN: AUTHORS_VOCO_TOKEN}, dropped)
    pad = None if tokenizer.pad_token in dropped else tokenizer.pad_token
    return _rebuilt(tokenizer, backend, pad, [AUTHORS_VOCO_TOKEN]), last


def _edited(tokenizer, renamed: Mapping[str, str], dropped: Iterable[str] = ()) -> Tokenizer:
    """A copy with other names under the same ids; the tokenizers library can't rename or remove."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [
        {
            **token,
            "content": renamed.get(token["content"], token["content"]),
            "special": token["special"] or token["content"] in renamed,
        }
        for token in state["added_tokens"]
        if token["content"] not in dropped
    ]
    vocab = state["model"]["vocab"]
    for token in set(dropped) & vocab.keys():
        del vocab[token]
    for old in renamed.keys() & vocab.keys():
        vocab[renamed[old]] = vocab.pop(old)
    return Tokenizer.from_str(json.dumps(state))


def _rebuilt(tokenizer, backend: Tokenizer, pad: str | None, extra) -> PreTrainedTokenizerFast:
    kept = {
        name: getattr(tokenizer, name)
        for name in ("bos_token", "eos_token", "unk_token", "padding_side", "model_max_length")
    }
    for name in (
        "legacy",
        "clean_up_tokenization_spaces",
    ):  # legacy: no effect here, for the way back
        value = getattr(tokenizer, name, tokenizer.init_kwargs.get(name))
        kept |= {} if value is None else {name: value}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, extra_special_tokens=extra, **kept
    )


def _processor(config: LlavaConfig, tokenizer, tower: str | Path, pad: bool) -> LlavaProcessor:
    # By name: without torchvision, to import the other one is to get a warning.
    name = "LlavaImageProcessor" if is_torchvision_available() else "LlavaImageProcessorPil"
    image_processor_class = getattr(transformers, name)
    try:
        # The settings of CLIP's image processor, whose class has no padding.
        image_processor = image_processor_class.from_pretrained(tower, do_pad=pad)
    except OSError as error:
        raise ValueError(
            f"expected preprocessor_config.json in the vision tower, got {tower}: {error}; pass "
            "vision_tower, a folder or a name"
        ) from error
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLS
    )


def _to_authors_names(
    tensors: dict[str, Tensor], config: LlavaConfig, source: Path
) -> dict[str, Tensor]:
    native = {_renamed(name, _NAMES_IN_FILES): value for name, value in tensors.items()}
    named = {_renamed(name, _NAMES): value for name, value in native.items()}
    _check_tensors(named, _names_and_shapes(config, with_tower=True), source)
    return named


def _llama_fields(text: LlamaConfig) -> dict:
    """As Transformers 4.37 reads them, where rope has two fields."""
    rope = text.rope_parameters
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {"type": rope["rope_type"], "factor": rope["factor"]}
    fields = {name: getattr(text, name) for name in _LLAMA_FIELDS}
    return fields | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _vision_fields(config: LlavaConfig, tower: str, pad: bool, record: Mapping | None) -> dict:
    feature = {theirs: ours for ours, theirs in _STRATEGY.items()}
    fields = {
        "mm_vision_tower": tower,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": feature[config.vision_feature_select_strategy],
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
    }
    if record is None:
        fields |= {
            "use_mm_proj": True,
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "tokenizer_padding_side": "left",
        }
    was_padded = record is not None and record["config"].get("image_aspect_ratio") == "pad"
    if record is None or pad != was_padded:
        fields["image_aspect_ratio"] = "pad" if pad else "square"
    return fields


def _copy_sentencepiece(source: Path, folder: Path) -> bool:
    """``tokenizer.model``, which the authors' code needs and Transformers doesn't write."""
    there = (source / "tokenizer.model").is_file()
    if there:
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    return there


def _describe_for_sentencepiece(tokenizer, folder: Path) -> None:
    """The files with which Transformers 4.37 makes a ``LlamaTokenizer`` from ``tokenizer.model``."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for name in ("backend", "extra_special_tokens"):
        settings.pop(name, None)
    around = tokenizer("").input_ids
    settings |= {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": tokenizer.bos_token_id in around,
        "add_eos_token": tokenizer.eos_token_id in around,
        "legacy": settings.get("legacy", True),
        "additional_special_tokens": [AUTHORS_VOCO_TOKEN],
        "added_tokens_decoder": {
            str(id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for id, token in tokenizer.added_tokens_decoder.items()
        },
    }
    path.write_text(json.dumps(settings, indent=2) + "\n")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes the target at the end, or vanishes on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        yield folder
        if target.exists():
            target.rmdir()  # it's empty; not all systems rename onto a folder
        folder.rename(target)

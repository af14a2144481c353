"""``from_authors``: a checkpoint of VoCo-LLaMA's authors, or an original LLaVA-1.5, to Transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.utils import is_torchvision_available

from voco_model.arguments import whole_number
from voco_model.checkpoint_files import check_files, listed
from voco_model.convert.checkpoint import (
    EMBEDDINGS,
    KNOWN,
    LLAMA_FIELDS,
    NAMES,
    STRATEGY,
    TOWER,
    appearing,
    check_tensors,
    checked_dtype,
    checked_source,
    checked_target,
    names_and_shapes,
    read_config,
    read_tensors,
    renamed,
)
from voco_model.convert.tokenizer import (
    AUTHORS_VOCO_TOKEN,
    copy_sentencepiece,
    load_tokenizer,
    tokenizer_from,
)
from voco_model.vlm.prompt import VOCO_TOKEN, chat_template, style_of

logger = logging.getLogger(__name__)


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

    The result is a ``LlavaForConditionalGeneration`` with its processor. For an authors' checkpoint,
    ``voco_model.enable(model, processor)`` then needs no more arguments: ``<voco>`` becomes ``<VoCo>``
    under the same id. A tokenizer without ``<voco>`` belongs to the original LLaVA, from which training
    starts: the result has neither VoCo tokens nor a chat template until ``enable`` or ``python -m
    voco_model train`` adds them.

    New tokens follow the existing ones: ``<image>``, and ``<pad>`` if the tokenizer has no padding token
    or pads with BOS or EOS. Embeddings and output layer ``[rows, hidden]`` grow as needed. A new row is
    the mean of all others: its logit is a mean of logits and therefore never the largest. All other
    tensors are kept to the bit; buffers that follow from the config are left out. ``converted_from`` in
    the new config records the old one, for ``to_authors``.

    Args:
        source: a folder with ``config.json``, the tokenizer, and weights in safetensors or
            ``pytorch_model.bin``, in one file or several. Weights are mapped, not copied.
        target: the folder to write, missing or empty. It appears once complete.
        num_voco: VoCo tokens per image, which the authors' checkpoints don't record; their code has 2.
            For an original LLaVA it is ignored with a warning.
        vision_tower: folder or name of a CLIP model, by default the config's ``mm_vision_tower``. It
            provides the vision config and the preprocessing. Its weights, in the language model's dtype,
            are used only if the checkpoint contains none.
        prompt: the prompt style, a name in ``vlm.prompt.STYLES``; by default ``"authors"``, or none for
            an original LLaVA.
        dtype: dtype of all tensors, such as ``torch.bfloat16`` or ``"bfloat16"``; by default each keeps
            its own.

    Returns:
        ``target``.

    Raises:
        ValueError: a target that isn't empty, a checkpoint in another layout (missing and unexpected
            tensors are named), missing or truncated files, ``<voco>`` without ``num_voco``, or arguments
            out of range. Nothing is written then.
        ImportError: only a ``tokenizer.model``, without sentencepiece and protobuf to read it.

    Source: https://github.com/Yxxxb/VoCo-LLaMA, ``llava/model/llava_arch.py``, ``multimodal_projector``,
    ``multimodal_encoder`` and ``llava/train/train_compress.py`` at 3b6e14d.
    """
    source, target = checked_source(source), checked_target(target)
    if num_voco is not None:
        num_voco = whole_number("num_voco", num_voco, at_least=1)
    if prompt is not None:
        style_of(prompt)
    dtype = checked_dtype(dtype)
    theirs = read_config(source, KNOWN)
    tensors = read_tensors(source)
    own_tower = any(name.startswith(TOWER) for name in tensors)
    tower = vision_tower or theirs.get("mm_vision_tower")
    config = _config_from(theirs, _vision_config(tower))
    check_tensors(tensors, names_and_shapes(config, with_tower=own_tower), source)
    tokenizer, added = tokenizer_from(load_tokenizer(source))
    facts = _voco_facts(tokenizer, source, num_voco, prompt)
    rows = config.text_config.vocab_size
    if facts.get("voco_token_id", 0) >= rows:
        raise ValueError(
            f"expected an embedding row for {AUTHORS_VOCO_TOKEN} = {facts['voco_token_id']}, got "
            f"{rows} rows in {source}; tokenizer and weights come from different checkpoints"
        )
    processor = _processor(config, tokenizer, tower, theirs.get("image_aspect_ratio") == "pad")
    if "num_voco" in facts:
        processor.chat_template = chat_template(num_voco, facts["voco_prompt"])
    if not own_tower:
        tensors |= _tower_tensors(tower, dtype or tensors["lm_head.weight"].dtype)
    for name in EMBEDDINGS:
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
    state = {name: tensors.pop(renamed(name, NAMES)) for name in model.state_dict()}
    if dtype is not None:
        state = {name: state.pop(name).to(dtype) for name in list(state)}
    model.load_state_dict(state, assign=True)
    with appearing(target) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        copy_sentencepiece(source, folder)
    return target


def _voco_facts(tokenizer, source: Path, num_voco: int | None, prompt: str | None) -> dict:
    """The config's entries about VoCo tokens; for an original LLaVA, only an explicit prompt style."""
    voco_token_id = tokenizer.get_vocab().get(VOCO_TOKEN)
    if voco_token_id is None:
        if num_voco is not None:
            logger.warning(
                "%s is converted as an original LLaVA, ignoring num_voco=%s: its tokenizer has no %s",
                source,
                num_voco,
                AUTHORS_VOCO_TOKEN,
            )
        return {} if prompt is None else {"voco_prompt": prompt}
    if num_voco is None:
        raise ValueError(
            f"expected num_voco for a tokenizer with {AUTHORS_VOCO_TOKEN}, got none; pass the number "
            "that the model was trained with (num_voco=..., --num-voco on the command line), 2 in the "
            "authors' code"
        )
    return {
        "voco_token_id": voco_token_id,
        "num_voco": num_voco,
        "voco_isolated": False,
        "voco_distinct": False,
        "voco_prompt": prompt or "authors",
    }


def _vision_config(tower: str | Path | None) -> CLIPVisionConfig:
    if not tower:
        raise ValueError(
            "expected mm_vision_tower in the config, got none; pass vision_tower (--vision-tower on the "
            "command line), a folder or a hub name"
        )
    check_files(tower)
    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a readable vision tower, got {tower}: {error}; pass vision_tower (--vision-tower "
            "on the command line), a folder or a hub name"
        ) from error
    config = getattr(config, "vision_config", config)
    if not isinstance(config, CLIPVisionConfig):
        raise ValueError(
            f"expected a CLIP model as vision tower, got {tower} with model_type {config.model_type!r}; "
            "pass the one that the checkpoint was trained with as vision_tower (--vision-tower on the "
            "command line)"
        )
    return config


def _config_from(theirs: Mapping, vision: CLIPVisionConfig) -> LlavaConfig:
    """Transformers' config for the tensors as they are, before a token for the image is added."""
    layer = theirs.get("mm_vision_select_layer")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(
            f"expected mm_vision_select_layer as an integer in the config, got {layer!r}; it is -2 in "
            "LLaVA-1.5"
        )
    fields = LLAMA_FIELDS | {"rope_theta", "rope_scaling"}
    text = {name: value for name, value in theirs.items() if name in fields}
    feature = theirs.get("mm_vision_select_feature") or "patch"
    patches = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=vision,
        vision_feature_layer=layer,
        vision_feature_select_strategy=STRATEGY[feature],
        image_seq_length=patches + (feature == "cls_patch"),
    )


def _tower_tensors(tower: str | Path, dtype: torch.dtype) -> dict[str, Tensor]:
    model, info = CLIPVisionModel.from_pretrained(tower, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"expected a complete CLIP vision model in {tower}, got one without "
            f"{listed(sorted(info['missing_keys']))}; pass another vision_tower"
        )
    return {TOWER + name: value for name, value in model.state_dict().items()}


def _with_mean_rows(weight: Tensor, rows: int) -> Tensor:
    """``[old, hidden]`` extended to ``[max(old, rows), hidden]``."""
    more = rows - len(weight)
    if more <= 0:
        return weight
    mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(more, -1)])


def _processor(config: LlavaConfig, tokenizer, tower: str | Path, pad: bool) -> LlavaProcessor:
    # By name: importing the other class without torchvision gives a warning.
    name = "LlavaImageProcessor" if is_torchvision_available() else "LlavaImageProcessorPil"
    image_processor_class = getattr(transformers, name)
    try:
        # CLIP's own image processor has no padding: its settings are read into LLaVA's class.
        image_processor = image_processor_class.from_pretrained(tower, do_pad=pad)
    except OSError as error:
        raise ValueError(
            f"expected preprocessor_config.json in the vision tower, got {tower}: {error}; pass "
            "vision_tower (--vision-tower on the command line), a folder or a hub name"
        ) from error
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLS
    )

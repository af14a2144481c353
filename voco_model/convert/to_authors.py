"""``to_authors``: a LLaVA-1.5 with VoCo tokens to the layout of VoCo-LLaMA's authors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig, LlavaProcessor

from voco_model.convert.checkpoint import (
    EMBEDDINGS,
    KNOWN,
    LLAMA_FIELDS,
    NAMES,
    STRATEGY,
    TOWER,
    appearing,
    check_tensors,
    checked_source,
    checked_target,
    names_and_shapes,
    read_config,
    read_tensors,
    renamed,
)
from voco_model.convert.tokenizer import AUTHORS_VOCO_TOKEN, copy_sentencepiece, tokenizer_to

# Values of a Transformers config with a counterpart in theirs; a dot enters a sub-config.
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
# Prefixes of tensor names in Transformers' files, which differ between releases; the longest match wins.
_NAMES_IN_FILES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.": "model.vision_tower.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "model.vision_tower.vision_model.": "model.vision_tower.",
}


def to_authors(
    source: str | Path, target: str | Path, *, vision_tower: str | Path | None = None
) -> Path:
    """Write a LLaVA-1.5 with VoCo tokens in the authors' layout; the inverse of ``from_authors``.

    A checkpoint from ``from_authors`` comes back with the same tensors, to the bit, and the same config,
    except for what has changed since. ``<VoCo>`` becomes ``<voco>`` under the same id.

    Tokens that were added for Transformers are removed with their rows (``<image>`` and ``<pad>`` in a
    model that wasn't converted), but only if they all follow every other token, because ids must not
    move. Rows are kept up to the last remaining token. If ``<image>`` and ``<pad>`` precede ``<VoCo>``,
    as in a model to which ``enable`` added the token, they stay, and ``<VoCo>`` hasn't the id 32000 that
    is hard-coded in the authors' code.

    Args:
        source: a folder written by ``model.save_pretrained`` and ``processor.save_pretrained``.
        target: the folder to write, missing or empty. It appears once complete.
        vision_tower: value of ``mm_vision_tower``, from which their code loads the tower. Required
            unless the model was converted by ``from_authors``.

    Returns:
        ``target``. It contains the tower's weights unless the authors' checkpoint had none.

    Raises:
        ValueError: a target that isn't empty, a model or tokenizer that the authors' layout can't hold,
            or missing or unexpected tensors. Nothing is written then.
    """
    source, target = checked_source(source), checked_target(target)
    read_config(source, _CONVERTIBLE)
    config = LlavaConfig.from_pretrained(source)
    record = getattr(config, "converted_from", None)
    if getattr(config, "voco_distinct", False) and config.num_voco > 1:
        raise ValueError(
            f"expected one embedding row shared by all VoCo tokens, got voco_distinct=True with "
            f"{config.num_voco} VoCo tokens; the authors' layout has no place for more rows: train with "
            "voco.distinct: false"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"expected one vision_feature_layer, got {config.vision_feature_layer}; the authors' "
            "mm_vision_select_layer is a single integer"
        )
    tower = vision_tower or (record and record["config"].get("mm_vision_tower"))
    if not tower:
        raise ValueError(
            "expected the name of the vision tower for a model that wasn't converted by from_authors, "
            "got none; pass the CLIP model that it was made from (vision_tower=..., --vision-tower on "
            "the command line), such as openai/clip-vit-large-patch14-336"
        )
    tensors = _to_authors_names(read_tensors(source), config, source)
    processor = LlavaProcessor.from_pretrained(source)
    tokenizer, last = tokenizer_to(processor.tokenizer, config, record)
    rows = max(last + 1, record["rows"] if record else 0)
    if rows > config.text_config.vocab_size:
        raise ValueError(
            f"expected at least {rows} embedding rows, one per token, got "
            f"{config.text_config.vocab_size} in {source}"
        )

    for name in EMBEDDINGS:
        tensors[name] = tensors[name][:rows].clone()
    if record and not record["vision_tower_weights"]:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(TOWER)}
    theirs = {
        "architectures": KNOWN["architectures"][0],
        "model_type": KNOWN["model_type"][0],
        **(record["config"] if record else {}),
        **_llama_fields(config.text_config),
        "vocab_size": rows,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": str(tensors["lm_head.weight"].dtype).removeprefix("torch."),
        **_vision_fields(config, str(tower), processor.image_processor.do_pad, record),
    }
    with appearing(target) as folder:
        save_torch_state_dict(tensors, folder)
        (folder / "config.json").write_text(json.dumps(theirs, indent=2, sort_keys=True) + "\n")
        tokenizer.save_pretrained(folder)
        if copy_sentencepiece(source, folder):
            _describe_for_sentencepiece(tokenizer, folder)
    return target


def _to_authors_names(
    tensors: dict[str, Tensor], config: LlavaConfig, source: Path
) -> dict[str, Tensor]:
    native = {renamed(name, _NAMES_IN_FILES): value for name, value in tensors.items()}
    named = {renamed(name, NAMES): value for name, value in native.items()}
    check_tensors(named, names_and_shapes(config, with_tower=True), source)
    return named


def _llama_fields(text: LlamaConfig) -> dict:
    """The fields as Transformers 4.37 reads them, with rope in two fields."""
    rope = text.rope_parameters
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {"type": rope["rope_type"], "factor": rope["factor"]}
    fields = {name: getattr(text, name) for name in LLAMA_FIELDS}
    return fields | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _vision_fields(config: LlavaConfig, tower: str, pad: bool, record: Mapping | None) -> dict:
    feature = {theirs: ours for ours, theirs in STRATEGY.items()}
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


def _describe_for_sentencepiece(tokenizer, folder: Path) -> None:
    """Adapt ``tokenizer_config.json`` for Transformers 4.37, to load ``tokenizer.model``."""
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

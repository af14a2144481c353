"""The model of a run: loaded, enabled, and what is trained of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig

from voco_model.pictures import WHITE
from voco_model.train.config import LoRAConfig, TrainConfig
from voco_model.vlm.attach import attach
from voco_model.vlm.load import load_weights, model_class


@dataclass(frozen=True)
class Part:
    """A part of the model: how many numbers it has, and how many of them are trained."""

    name: str
    total: int
    trained: int


def build_model(config: TrainConfig, processor, dtype: torch.dtype):
    """Load, enable, freeze; after ``TrainingArguments`` exist, by which ZeRO-3 shards.

    Raises:
        TypeError: no LLaVA-1.5 or LLaVA-NeXT.
    """
    model = load_weights(model_class(config.model), config.model, dtype=dtype)
    attach(
        model,
        processor,
        config.voco.most,
        isolated=config.voco.isolated,
        distinct=config.voco.distinct,
        prompt=config.prompt,
    )
    if config.data.ground != WHITE:  # what is trained on black is served on black
        model.config.voco_ground = list(config.data.ground)
    model.model.vision_tower.requires_grad_(config.train_vision_tower)
    if config.train_vision_tower:
        _freeze_behind_features(model)
    if config.lora is not None:
        model = _with_lora(model, config.lora, config.voco.most if config.voco.distinct else 1)
        for parameter in model.parameters():
            if parameter.requires_grad:  # AdamW's small steps would be lost in 16 bits
                parameter.data = parameter.data.float()
    return model


def _freeze_behind_features(model) -> None:
    """The tower's layers that nobody looks at have no gradient, for which DDP would wait."""
    layer = model.config.vision_feature_layer
    used = max(n for n in ([layer] if isinstance(layer, int) else layer)) + 1
    for name, module in model.model.vision_tower.named_modules():
        if name.endswith("encoder.layers") and used <= 0:
            for unseen in list(module)[len(module) + used :]:
                unseen.requires_grad_(False)
        if name.endswith("post_layernorm"):
            module.requires_grad_(False)


def _with_lora(model, lora: LoRAConfig, rows: int):
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package peft, which LoRA needs; pip install 'voco-kernels[train]'"
        ) from error
    first = model.config.voco_token_id
    names = "|".join(lora.targets)
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=rf".*language_model.*\.({names})",
            modules_to_save=["multi_modal_projector"],
            # Of the embeddings, VoCo's own rows alone.
            trainable_token_indices={"embed_tokens": list(range(first, first + rows))},
        ),
    )


def parts_of(model: nn.Module) -> list[Part]:
    """What a run trains, for people to check before it starts."""
    names = {
        "vision_tower": "vision tower",
        "multi_modal_projector": "projector",
        "image_newline": "projector",
        "language_model": "language model",
        "lm_head": "language model",
    }
    totals = {name: [0, 0] for name in dict.fromkeys(names.values())}
    seen = set()
    for path, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        part = next((names[key] for key in names if key in path), "language model")
        size = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 a shard is here
        totals[part][0] += size
        totals[part][1] += size if parameter.requires_grad else 0
    return [Part(name, total, trained) for name, (total, trained) in totals.items()]


def layer_classes(model_name: str) -> list[str]:
    """The names of the layer classes of both towers, each of which FSDP shards on its own."""
    with torch.device("meta"):
        model = model_class(model_name)(AutoConfig.from_pretrained(model_name))
    found = {}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            found[type(module[0]).__name__] = None
    return list(found)

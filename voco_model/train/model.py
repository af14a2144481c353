"""The model of a run: loading, enabling, and choosing what is trained."""

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
    """A part of the model: its number of parameters, and how many of them are trained."""

    name: str
    total: int
    trained: int


def build_model(config: TrainConfig, processor, dtype: torch.dtype):
    """Load the model, enable it, and freeze what isn't trained.

    Call this after ``TrainingArguments`` exist: ZeRO-3 shards weights as they are loaded, as these say.

    Raises:
        TypeError: neither a LLaVA-1.5 nor a LLaVA-NeXT.
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
    _complete_special_tokens(model, processor.tokenizer)
    if config.data.ground != WHITE:  # serving then uses the ground of training
        model.config.voco_ground = list(config.data.ground)
    model.model.vision_tower.requires_grad_(config.train_vision_tower)
    if config.train_vision_tower:
        _freeze_unused_layers(model)
    if config.lora is not None:
        model = _with_lora(model, config.lora, config.voco.most if config.voco.distinct else 1)
        for parameter in model.parameters():
            if parameter.requires_grad:  # AdamW's small steps would be lost in 16 bits
                parameter.data = parameter.data.float()
    return model


def _complete_special_tokens(model, tokenizer) -> None:
    """Fill in the special tokens that the configs leave open; LLaVAs have them in their text config.

    The Trainer would do the same, with a warning that the tokenizer has new ones.
    """
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        for config in (model.config, model.generation_config):
            if getattr(config, name, None) is None:
                setattr(config, name, getattr(tokenizer, name))


def _freeze_unused_layers(model) -> None:
    """Freeze the tower's layers after the features: they get no gradient, and DDP would wait for one."""
    layer = model.config.vision_feature_layer
    used = max(n for n in ([layer] if isinstance(layer, int) else layer)) + 1
    for name, module in model.model.vision_tower.named_modules():
        if name.endswith("encoder.layers") and used <= 0:
            for unseen in list(module)[len(module) + used :]:
                unseen.requires_grad_(False)
        if name.endswith("post_layernorm"):
            module.requires_grad_(False)


def _with_lora(model, lora: LoRAConfig, rows: int):
    import peft

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
            # Only VoCo's own embedding rows.
            trainable_token_indices={"embed_tokens": list(range(first, first + rows))},
        ),
    )


def parts_of(model: nn.Module) -> list[Part]:
    """The parts of the model and how much of each is trained, printed before a run starts."""
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
        size = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3, numel is a shard's
        totals[part][0] += size
        totals[part][1] += size if parameter.requires_grad else 0
    return [Part(name, total, trained) for name, (total, trained) in totals.items()]


def layer_classes(model_name: str) -> list[str]:
    """Names of the layer classes of vision tower and language model, the units that FSDP shards."""
    with torch.device("meta"):
        model = model_class(model_name)(AutoConfig.from_pretrained(model_name))
    found = {}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            found[type(module[0]).__name__] = None
    return list(found)

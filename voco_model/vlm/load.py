"""``load``: a trained VoCo model and its processor, enabled."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.processing_utils import ProcessorMixin

from voco_model.checkpoint_files import check_files, check_folder, listed
from voco_model.vlm.attach import SUPPORTED, Enabled, enable


class Loaded(tuple):
    """``(model, processor)``, with what ``enable`` returned as ``handle``.

    Attributes:
        model: enabled, in eval mode.
        processor: its processor.
        handle: ``handle.undo()`` gives the plain LLaVA back.
    """

    model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
    processor: ProcessorMixin
    handle: Enabled

    def __new__(cls, model: PreTrainedModel, processor: ProcessorMixin, handle: Enabled) -> Loaded:
        loaded = super().__new__(cls, (model, processor))
        loaded.model, loaded.processor, loaded.handle = model, processor, handle
        return loaded


def load(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    isolated: bool | None = None,
    **options: Any,
) -> Loaded:
    """A model and its processor, enabled, in eval mode: ``model, processor = load(path)``.

    The model's config records the number of VoCo tokens, whether they are distinct or isolated, and the
    prompt style.

    Args:
        path: folder or hub name of a checkpoint in Transformers' layout. A plain LLaVA gets one VoCo
            token.
        isolated: as for ``enable``; by default what the config says.
        options: passed to ``from_pretrained``, such as ``device_map``.

    Returns:
        the pair of model and processor, whose ``handle`` has ``undo()``.

    Raises:
        FileNotFoundError: no such folder, or one without a checkpoint.
        TypeError: a checkpoint of another model.
        ValueError: a checkpoint with a baseline's projector, which ``voco_model.baselines.load`` reads;
            missing files or weights.

    Warns:
        VoCoWarning: a model that wasn't trained with VoCo tokens, by its config.
    """
    model = load_weights(model_class(path), path, dtype=dtype, **options).eval()
    if device is not None:
        model.to(device)
    processor = load_processor(path)
    return Loaded(model, processor, enable(model, processor, isolated=isolated))


def load_weights(
    cls: type[PreTrainedModel], path: str | os.PathLike, **options: Any
) -> PreTrainedModel:
    """``cls.from_pretrained(path)``, which alone would initialize missing weights at random.

    Raises:
        ValueError: weights that are in no file of the checkpoint.
    """
    model, found = cls.from_pretrained(path, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"expected all weights of a {cls.__name__} in {path}, got none for {listed(missing)}; "
            "download the checkpoint again, or merge adapters into their base model first"
        )
    return model


def read_config(path: str | os.PathLike) -> PreTrainedConfig:
    """A checkpoint's config, after a check of its files.

    Raises:
        FileNotFoundError: no such folder, or one without a checkpoint.
        TypeError: a checkpoint in the layout of the authors' code and of the original LLaVA.
        ValueError: missing files, see ``checkpoint_files``, or a type that Transformers doesn't know.
    """
    check_folder(path)
    check_files(path)
    raw, _ = PreTrainedConfig.get_config_dict(path)
    # Some of these say model_type "llava" as well, and Transformers would read none of their weights.
    if "mm_vision_tower" in raw or str(raw.get("model_type")).startswith("llava_llama"):
        raise TypeError(
            f"expected a checkpoint in Transformers' layout, got {path} in the layout of the authors "
            "and of the original LLaVA; convert a LLaVA-1.5 with: "
            "python -m voco_model convert from-authors "
            "SOURCE TARGET"
        )
    return AutoConfig.from_pretrained(path)


def load_processor(path: str | os.PathLike) -> ProcessorMixin:
    """A checkpoint's processor.

    Raises:
        FileNotFoundError: no such folder, or one without a checkpoint.
    """
    check_folder(path)
    return AutoProcessor.from_pretrained(path)


def model_class(path: str | os.PathLike, *, replaced_projector: bool = False) -> type:
    """A checkpoint's model class.

    Args:
        replaced_projector: whether to accept the projector of a baseline, whose weights the class itself
            would not read.

    Raises:
        TypeError: a class that ``enable`` doesn't support, or another layout.
        ValueError: a baseline's projector, unless accepted; or as ``read_config``.
    """
    config = read_config(path)
    baseline = (getattr(config, "voco_baseline", None) or {}).get("name", "full")
    if baseline != "full" and not replaced_projector:
        raise ValueError(
            f"expected a LLaVA with its own projector, got {path}, made for {baseline!r}; load it with "
            "voco_model.baselines.load"
        )
    classes = {cls.config_class: cls for cls in SUPPORTED}
    if type(config) not in classes:
        names = " or ".join(cls.__name__ for cls in SUPPORTED)
        raise TypeError(
            f"expected a checkpoint of {names}, got {path} of a {type(config).__name__}"
        )
    return classes[type(config)]

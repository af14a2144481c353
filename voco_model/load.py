"""``load``: a VoCo model as a training run has left it, ready to answer."""

from __future__ import annotations

import os

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from voco_model.attach import SUPPORTED, enable


def load(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    **options,
) -> tuple[LlavaForConditionalGeneration | LlavaNextForConditionalGeneration, object]:
    """A model and its processor, enabled, in eval mode.

    How many VoCo tokens an image has, whether they are distinct or isolated, and how prompts are
    written stands in the model's config.

    Args:
        path: folder or hub name of a checkpoint in the Hugging Face layout; a plain LLaVA gets one VoCo
            token.
        options: more for ``from_pretrained``, such as ``device_map``.

    Returns:
        model and processor.

    Raises:
        TypeError: a checkpoint of another model.
        ValueError: one whose projector is a baseline's: ``voco_model.baselines.load`` reads these.
    """
    model = model_class(path).from_pretrained(path, dtype=dtype, **options).eval()
    if device is not None:
        model.to(device)
    processor = load_processor(path)
    enable(model, processor)
    return model, processor


def load_processor(path: str | os.PathLike):
    """The processor of a checkpoint, as ``enable`` takes it."""
    return AutoProcessor.from_pretrained(path)


def model_class(path: str | os.PathLike, *, replaced_projector: bool = False) -> type:
    """The class of a checkpoint.

    Args:
        replaced_projector: whether it may be one of a baseline with another projector, whose weights the
            class itself would leave unread.

    Raises:
        TypeError: none that ``enable`` takes.
        ValueError: a baseline's projector where there may be none.
    """
    config = AutoConfig.from_pretrained(path)
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
            f"expected a checkpoint of {names}, got {path} of a {type(config).__name__}; turn one "
            "of the authors' layout around with: python -m voco_model convert from-authors"
        )
    return classes[type(config)]

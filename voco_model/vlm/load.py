"""``load``: a VoCo model as a training run has left it, ready to answer."""

from __future__ import annotations

import os

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
)

from voco_model.checkpoint_files import check_files, listed
from voco_model.vlm.attach import SUPPORTED, enable


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
        ValueError: one whose projector is a baseline's: ``voco_model.baselines.load`` reads these; files
            or weights that are missing.
    """
    model = load_weights(model_class(path), path, dtype=dtype, **options).eval()
    if device is not None:
        model.to(device)
    processor = load_processor(path)
    enable(model, processor)
    return model, processor


def load_weights(cls: type, path: str | os.PathLike, **options):
    """``cls.from_pretrained(path)``, which alone would draw weights that are missing at random.

    Raises:
        ValueError: weights that no file of the checkpoint has.
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
    """A checkpoint's config, once its files are all there.

    Raises:
        TypeError: a checkpoint in the layout of the authors' code and of the original LLaVA.
        ValueError: files that are missing, see ``checkpoint_files``, or a type that Transformers doesn't
            know.
    """
    check_files(path)
    raw, _ = PreTrainedConfig.get_config_dict(path)
    # One of these has model_type "llava" as well, and Transformers would read none of its weights.
    if "mm_vision_tower" in raw or str(raw.get("model_type")).startswith("llava_llama"):
        raise TypeError(
            f"expected a checkpoint in Transformers' layout, got {path} in that of the authors and "
            "of the original LLaVA; turn a LLaVA-1.5 around with: python -m voco_model convert "
            "from-authors SOURCE TARGET"
        )
    return AutoConfig.from_pretrained(path)


def load_processor(path: str | os.PathLike):
    """The processor of a checkpoint, as ``enable`` takes it."""
    return AutoProcessor.from_pretrained(path)


def model_class(path: str | os.PathLike, *, replaced_projector: bool = False) -> type:
    """The class of a checkpoint.

    Args:
        replaced_projector: whether it may be one of a baseline with another projector, whose weights the
            class itself would leave unread.

    Raises:
        TypeError: none that ``enable`` takes, or in another layout.
        ValueError: a baseline's projector where there may be none; see ``read_config``.
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

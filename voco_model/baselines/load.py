"""``load``: a checkpoint, by the method that it was made for or another."""

from __future__ import annotations

import os

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from voco_model.baselines.base import Method
from voco_model.baselines.methods import method_class
from voco_model.baselines.replaced import Replaced
from voco_model.vlm.load import load_processor, load_weights, model_class, read_config
from voco_model.vlm.warn import training_gap, warn_once


def load(
    path: str | os.PathLike,
    name: str | None = None,
    *,
    num_tokens: int | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    **options,
) -> Method:
    """A method applied to a checkpoint's model, in eval mode.

    Args:
        path: folder or hub name in the Hugging Face layout, with a processor.
        name: of ``METHODS``. By default what the checkpoint was made for: ``config.voco_baseline``, else
            ``"voco"`` where the config has ``num_voco``.
        num_tokens, options: as for ``apply``; by default the checkpoint's.

    Raises:
        TypeError: a checkpoint of another model.
        ValueError: no name where the checkpoint is a plain LLaVA, or one that doesn't fit it.
    """
    config = read_config(path)
    saved = dict(getattr(config, "voco_baseline", None) or {})
    made_for = saved.pop("name", "voco" if hasattr(config, "num_voco") else None)
    name = name or made_for
    if name is None:
        raise ValueError(f"expected a method's name for the plain model {path}, got None")
    if (name, made_for) == ("untrained", "voco"):
        raise ValueError(
            f"expected for untrained a model that wasn't trained to compress, got {path}, which is of "
            "voco; load the upper bound, or a plain LLaVA"
        )
    cls, loaded_class = method_class(name), model_class(path, replaced_projector=True)
    if saved and issubclass(method_class(made_for), Replaced):
        if name != made_for:
            raise ValueError(
                f"expected {made_for!r}, which {path} was made for, got {name!r}; the projector "
                "that other methods need is gone"
            )
        loaded_class = _Rebuilt
    elif name == made_for:
        options = {**saved, **options}
    model = load_weights(loaded_class, path, dtype=dtype).eval()
    if loaded_class is _Rebuilt:
        # It was saved as this one, and is to be saved so again.
        model.__class__ = LlavaForConditionalGeneration
    if device is not None:
        model.to(device)
    gap = training_gap(config, num_tokens) if name == "voco" else None
    if gap is not None:
        warn_once(model, gap)
    return cls(model, load_processor(path), num_tokens, **options)


class _Rebuilt(LlavaForConditionalGeneration):
    """With the module of ``config.voco_baseline`` in the projector's place before weights are loaded."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        build = method_class(config.voco_baseline["name"]).build
        self.model.multi_modal_projector = build(config, self.model.multi_modal_projector)

    @classmethod
    def is_custom_code(cls) -> bool:
        # Transformers translates the names of weights for its own classes only, by which this was saved.
        return False

"""``load``: a checkpoint, with the method that it was trained for or another one."""

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
        name: a key of ``METHODS``. By default the checkpoint's method: ``config.voco_baseline``, else
            ``"voco"`` if the config has ``num_voco``.
        num_tokens, options: as for ``apply``; by default the checkpoint's.

    Raises:
        FileNotFoundError: no such folder, or one without a checkpoint.
        TypeError: a checkpoint of another model.
        ValueError: a plain LLaVA without a name, or a method that doesn't fit the checkpoint.

    Warns:
        VoCoWarning: ``"voco"`` on a model that wasn't trained for it.
    """
    config = read_config(path)
    saved = dict(getattr(config, "voco_baseline", None) or {})
    made_for = saved.pop("name", "voco" if hasattr(config, "num_voco") else None)
    name = name or made_for
    if name is None:
        raise ValueError(f"expected a method's name for the plain model {path}, got None")
    if (name, made_for) == ("untrained", "voco"):
        raise ValueError(
            f"expected a model that wasn't trained to compress for untrained, got {path}, which was; "
            "load the upper bound, or a plain LLaVA"
        )
    cls, loaded_class = method_class(name), model_class(path, replaced_projector=True)
    if saved and issubclass(method_class(made_for), Replaced):
        if name != made_for:
            raise ValueError(
                f"expected {made_for!r}, for which {path} was made, got {name!r}; other methods need "
                "LLaVA's own projector, which this checkpoint hasn't"
            )
        loaded_class = _Rebuilt
    elif name == made_for:
        options = {**saved, **options}
    model = load_weights(loaded_class, path, dtype=dtype).eval()
    if loaded_class is _Rebuilt:
        # The class that it was saved as, and is to be saved as again.
        model.__class__ = LlavaForConditionalGeneration
    if device is not None:
        model.to(device)
    gap = training_gap(config, num_tokens) if name == "voco" else None
    if gap is not None:
        warn_once(model, gap)
    return cls(model, load_processor(path), num_tokens, **options)


class _Rebuilt(LlavaForConditionalGeneration):
    """A LLaVA whose projector is replaced, by ``config.voco_baseline``, before weights are loaded."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        build = method_class(config.voco_baseline["name"]).build
        self.model.multi_modal_projector = build(config, self.model.multi_modal_projector)

    @classmethod
    def is_custom_code(cls) -> bool:
        # Transformers translates names of weights only for its own classes, as which this was saved.
        return False

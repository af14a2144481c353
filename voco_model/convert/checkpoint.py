"""Checkpoint files of both layouts: names and shapes of their tensors, reading, checking, writing.

Both layouts hold the same tensors under different names. The authors' has the token ``<voco>`` and no
token for the image: a negative id marks its place until the features are inserted. Transformers' LLaVA
has the token ``<image>``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from voco_model.checkpoint_files import check_files, listed, weight_files

# Prefixes of tensor names, from a LlavaForConditionalGeneration to the authors' files.
NAMES = {
    "lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}
TOWER = NAMES["model.vision_tower."]
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
# Buffers saved by old releases; they follow from the config.
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
# Supported values of the entries in the authors' config that affect the computation.
KNOWN = {
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
STRATEGY = {"patch": "default", "cls_patch": "full"}
# Fields of a LlamaConfig that the authors' config has under the same names.
LLAMA_FIELDS = set(LlamaConfig.__annotations__) - {"rope_parameters", "mlp_bias", "head_dim"}


def checked_source(source: str | Path) -> Path:
    source = Path(source)
    if not (source / "config.json").is_file():
        raise ValueError(
            f"expected a local folder with a checkpoint, got {source}, without config.json; download it "
            "first"
        )
    check_files(source)
    return source


def checked_target(target: str | Path) -> Path:
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"expected a target that is missing or an empty folder, got {target}, which has content; "
            "choose another, or remove it"
        )
    return target


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or isinstance(known, torch.dtype) and known.is_floating_point:
        return known
    raise ValueError(
        f"expected dtype as a floating point dtype of torch or its name, got {dtype!r}"
    )


def read_config(source: Path, known: Mapping[str, tuple]) -> dict:
    """``config.json``; ``ValueError`` if an entry has none of its ``known`` values."""
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


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors by name, mapped from the files; safetensors are preferred."""
    files = weight_files(folder)
    if not files:
        raise ValueError(
            f"expected weights in {folder}, {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, in one file or "
            "with an index, got none; merge adapters (LoRA, a projector alone) into the base model first"
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
            f"expected floating point tensors in {folder}, got others: {listed(others)}; convert "
            "the checkpoint that this one was quantized from"
        )
    return tensors


def renamed(name: str, table: Mapping[str, str]) -> str:
    """The name with its longest prefix in ``table`` replaced."""
    old = max(filter(name.startswith, table), key=len, default="")
    return table.get(old, "") + name.removeprefix(old)


def names_and_shapes(config: LlavaConfig, *, with_tower: bool) -> dict[str, torch.Size]:
    """Tensors of a checkpoint in the authors' layout."""
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    named = {renamed(name, NAMES): value.shape for name, value in state.items()}
    return {
        name: shape for name, shape in named.items() if with_tower or not name.startswith(TOWER)
    }


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: Path
) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"expected the tensors of the config in {source}, got {len(missing)} missing "
            f"({listed(missing)}) and {len(unexpected)} unexpected ({listed(unexpected)}); convert "
            "the complete, merged checkpoint of a LLaVA-1.5"
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


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` at the end, or is removed on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        yield folder
        if target.exists():
            target.rmdir()  # it's empty; not all systems rename onto a folder
        folder.rename(target)

"""The models of bench/two_pass.py: true shapes, random weights, made where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
)
from transformers.processing_utils import ProcessorMixin

from voco_model import small

# CLIP ViT-L/14 at 336 pixels.
CLIP_LARGE = dict(
    image_size=336,
    patch_size=14,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    projection_dim=768,
)
# The tower of voco_model.small, and its language model.
CLIP_SMALL = dict(
    image_size=336,
    patch_size=14,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
)
TEXT_SMALL = dict(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=264,
)
CLIP_TINY = dict(
    image_size=56,
    patch_size=14,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
)
TEXT_TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=264,
)


@dataclass(frozen=True)
class Spec:
    """A model to measure.

    Attributes:
        title: for tables.
        tiled: LLaVA-NeXT, whose images are cut into tiles.
        text: of the language model's config; ``text_class`` is that config's class.
        vision: of CLIP's config.
        picture: pixels of the pictures that are shown, (width, height).
        std: of the weights; small models want more, so that what they see changes what they say.
        grids: of NeXT, in tiles, (high, wide).
    """

    title: str
    text: Mapping
    vision: Mapping = field(default_factory=lambda: CLIP_LARGE)
    tiled: bool = False
    text_class: type = LlamaConfig
    picture: tuple[int, int] = (336, 336)
    std: float = 0.02
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


SPECS = {
    "llava-1.5-7b": Spec(
        "LLaVA-1.5-7B",
        dict(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32064,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
        ),
    ),
    "llava-1.5-13b": Spec(
        "LLaVA-1.5-13B",
        dict(
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
            vocab_size=32064,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
        ),
    ),
    "llava-1.6-mistral-7b": Spec(
        "LLaVA-1.6-Mistral-7B",
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=32064,
            rms_norm_eps=1e-5,
            max_position_embeddings=32768,
            rope_theta=1e6,
            sliding_window=None,
        ),
        tiled=True,
        text_class=MistralConfig,
        picture=(672, 672),
    ),
    "llava-1.6-34b": Spec(
        "LLaVA-1.6-34B",
        dict(
            hidden_size=7168,
            intermediate_size=20480,
            num_hidden_layers=60,
            num_attention_heads=56,
            num_key_value_heads=8,
            vocab_size=64064,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            rope_theta=5e6,
        ),
        tiled=True,
        picture=(672, 672),
    ),
    "small": Spec("the demo's small LLaVA", TEXT_SMALL, CLIP_SMALL, std=0.1),
    "small-next": Spec(
        "a small LLaVA-NeXT",
        {**TEXT_SMALL, "num_key_value_heads": 1, "sliding_window": None},
        CLIP_SMALL,
        tiled=True,
        text_class=MistralConfig,
        picture=(672, 672),
        std=0.1,
    ),
    "tiny": Spec("a tiny LLaVA", TEXT_TINY, CLIP_TINY, picture=(56, 56), std=0.1),
    "tiny-next": Spec(
        "a tiny LLaVA-NeXT",
        {**TEXT_TINY, "sliding_window": None},
        CLIP_TINY,
        tiled=True,
        text_class=MistralConfig,
        picture=(112, 112),
        std=0.1,
    ),
}
DEFAULT = {
    "cuda": ("llava-1.5-7b", "llava-1.6-mistral-7b", "llava-1.5-13b", "llava-1.6-34b"),
    "cpu": ("small", "small-next"),
}
"""The models that are measured on each device type, the most important first."""

BRIEF = ("small-next",)
"""Models that are measured with single answers alone, unless named with --model: more takes too long."""


def build_processor(spec: Spec) -> ProcessorMixin:
    """The demo's processor, with a tokenizer of single bytes, for this model's geometry."""
    processor = small.build_processor()
    side = spec.vision["image_size"]
    sizes = dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    if spec.tiled:
        return LlavaNextProcessor(
            image_processor=LlavaNextImageProcessorPil(
                **sizes, image_grid_pinpoints=_pinpoints(spec)
            ),
            tokenizer=processor.tokenizer,
            patch_size=spec.vision["patch_size"],
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    for name, value in sizes.items():
        setattr(processor.image_processor, name, value)
    processor.patch_size = spec.vision["patch_size"]
    return processor


def build_config(spec: Spec, tokenizer) -> LlavaConfig | LlavaNextConfig:
    ids = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    parts = dict(
        vision_config=CLIPVisionConfig(**spec.vision),
        text_config=spec.text_class(**spec.text, **ids),
        image_token_id=tokenizer.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    if spec.tiled:
        return LlavaNextConfig(**parts, image_grid_pinpoints=_pinpoints(spec))
    side = spec.vision["image_size"] // spec.vision["patch_size"]
    return LlavaConfig(**parts, image_seq_length=side**2)


def build_model(
    config: LlavaConfig | LlavaNextConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    std: float = 0.02,
    seed: int = 0,
):
    """A model of random weights, in eval mode, made on its device: no copy passes through the host, and
    nothing is initialized twice.

    Matrices are normal with this standard deviation; norms are 1, biases 0. What it says is noise; how
    long it takes doesn't depend on that.

    Raises:
        torch.OutOfMemoryError: it doesn't fit.
        ValueError: the model has buffers that can't be filled here.
    """
    tiled = hasattr(config, "image_grid_pinpoints")
    model_class = LlavaNextForConditionalGeneration if tiled else LlavaForConditionalGeneration
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype)
    model.to_empty(device=device)
    fill_buffers(model, device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() < 2 and "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=std, generator=generator)
    return model.eval()


def fill_buffers(model, device: torch.device) -> None:
    """Fill buffers whose memory was just allocated.

    Raises:
        ValueError: there are others than Llama's and CLIP's.
    """
    language = model.model.language_model
    # float32 whatever the model's dtype: angles of far positions need it.
    language.rotary_emb = type(language.rotary_emb)(config=language.config).to(device)
    positions = model.get_buffer("model.vision_tower.embeddings.position_ids")
    positions.copy_(torch.arange(positions.shape[-1], device=device).expand_as(positions))
    known = {"position_ids", "inv_freq", "original_inv_freq"}
    others = [name for name, _ in model.named_buffers() if name.split(".")[-1] not in known]
    if others:
        raise ValueError(f"expected buffers named {sorted(known)}, got {', '.join(others)}, too")


def picture(spec: Spec, number: int) -> Image.Image:
    """Noise, different for each number."""
    width, height = spec.picture
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiles_of(spec: Spec) -> int:
    """Tiles that a picture is cut into, including the whole picture."""
    if not spec.tiled:
        return 1
    width, height = (pixels // spec.vision["image_size"] for pixels in spec.picture)
    return 1 + width * height


def language_bytes(model) -> int:
    """Bytes of weights that a forward pass of the language model reads: all but the embedding's, of
    which it reads one row per token."""
    language = model.model.language_model
    read = [*language.layers.parameters(), *language.norm.parameters(), *model.lm_head.parameters()]
    return sum(parameter.nbytes for parameter in read)


def _pinpoints(spec: Spec) -> list[list[int]]:
    side = spec.vision["image_size"]
    return [[side * high, side * wide] for high, wide in spec.grids]

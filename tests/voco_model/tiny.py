"""Tiny random LLaVAs, a tiny processor, and the mask written down a second time, densely."""

from __future__ import annotations

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
    MistralConfig,
)

from voco_model import small

PAD, BOS, EOS, UNK, IMAGE, VOCO = 0, 1, 2, 3, 4, 261
FIRST_TEXT = 5  # ids from here to VOCO are the bytes
KINDS = ("llava", "next")
GRIDS = [[32, 64], [64, 32], [64, 64]]
# LLaVA-NeXT cuts an image into tiles by its size: these give 16 * (1 + tiles) tokens and newlines.
SIZES = {(64, 64): 5, (32, 64): 3, (50, 64): 5}


def tiny_llava(kind: str, vocab_size: int = VOCO + 1, text_class=LlamaConfig, **text):
    """LLaVA-1.5 with a Llama (MHA) or LLaVA-NeXT with a Mistral (GQA), 3 layers, in eval mode.

    The embeddings have a row for <VoCo> by default. ``text`` goes to the text model's config.
    """
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,  # 16 patches
    )
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    both = {
        "vision_config": vision,
        "image_token_index": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    torch.manual_seed(0)
    if kind == "llava":
        config = LlavaConfig(text_config=text_class(**shared, **text), **both)
        model = LlavaForConditionalGeneration(config)
    else:
        grouped = {"num_key_value_heads": 2, "sliding_window": None, **text}
        config = LlavaNextConfig(
            text_config=MistralConfig(**shared, **grouped),
            image_grid_pinpoints=GRIDS,
            **both,
        )
        model = LlavaNextForConditionalGeneration(config)
    # Fresh weights are so small that attention is uniform, whatever the mask: make it choose.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6.0)
    return model.eval()


def tiny_processor(kind: str):
    """Bytes as tokens, BOS put in front by the tokenizer, no <VoCo> yet (its id will be VOCO)."""
    grids = {"llava": None, "next": GRIDS}[kind]
    processor = small.build_processor(32, 8, image_grid_pinpoints=grids)
    processor.chat_template = "{{ messages[0].content }}"
    return processor


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def vision_inputs(model, images: int, seed: int = 0) -> tuple[dict, list[int]]:
    """Random pictures for the model, and how many image tokens each of them takes."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, LlavaForConditionalGeneration):
        return {"pixel_values": torch.randn(images, 3, 32, 32, generator=generator)}, [16] * images
    sizes = [list(SIZES)[i % len(SIZES)] for i in range(images)]
    tiles = max(SIZES[size] for size in sizes)
    pixels = torch.randn(images, tiles, 3, 32, 32, generator=generator)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    with torch.no_grad():
        features = model.get_image_features(**inputs, return_dict=True).pooler_output
    return inputs, [len(feature) for feature in features]


def batch_of(
    model,
    rows: list[tuple[int, int]],
    side: str = "left",
    seed: int = 0,
    truncate: int | None = None,
) -> tuple[dict, list[str]]:
    """A padded batch, and for each row its kinds of tokens.

    Args:
        rows: numbers of (VoCo, text) tokens; 0 VoCo tokens is a row without image.
        truncate: cut all rows to the length of the largest image and this many tokens behind it.

    Returns:
        model inputs, and one letter a token: ``v`` context, ``c`` VoCo, ``t`` text, ``.`` padding.
    """
    generator = torch.Generator().manual_seed(seed)
    with_image = [row for row in rows if row[0]]
    vision, sizes = vision_inputs(model, len(with_image), seed) if with_image else ({}, [])
    counts = iter(sizes)
    ids, kinds = [], []
    for voco, text in rows:
        words = torch.randint(FIRST_TEXT, VOCO, (text,), generator=generator).tolist()
        if voco:
            image = next(counts)
            # BOS and the newline are context as well
            ids.append([BOS] + [IMAGE] * image + [FIRST_TEXT] + [VOCO] * voco + words)
            kinds.append("v" * (image + 2) + "c" * voco + "t" * text)
        else:
            ids.append([BOS] + words)
            kinds.append("t" * (text + 1))
    if truncate is not None:
        longest = max(sizes) + 2 + truncate
        ids, kinds = [row[:longest] for row in ids], [row[:longest] for row in kinds]
    length = max(map(len, ids))
    input_ids = torch.full((len(ids), length), PAD)
    padded = []
    for row, (tokens, letters) in enumerate(zip(ids, kinds, strict=True)):
        missing = length - len(tokens)
        start = missing if side == "left" else 0
        input_ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        padded.append("." * missing + letters if side == "left" else letters + "." * missing)
    attention_mask = torch.tensor([[letter != "." for letter in row] for row in padded]).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask, **vision}, padded


def two_images(model) -> tuple[dict, str]:
    """One row with text between two images; ``w`` and ``d`` are the second's context and VoCo."""
    vision, (first, second) = vision_inputs(model, 2)
    ids = [BOS] + [IMAGE] * first + [VOCO] * 2 + [50, 51, 52]
    ids += [IMAGE] * second + [VOCO] * 2 + [60, 61, 62, 63]
    letters = "v" * (first + 1) + "cc" + "ttt" + "w" * second + "dd" + "tttt"
    return {"input_ids": torch.tensor([ids]), **vision}, letters


def where(kinds: list[str], letters: str) -> torch.Tensor:
    """bool ``[B, S]``: the tokens of these kinds."""
    return torch.tensor([[letter in letters for letter in row] for row in kinds])


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def dense_mask(kinds: list[str]) -> torch.Tensor:
    """bool ``[B, S, S]`` from the definition, one segment a row: causal; text doesn't see
    context."""
    allowed = {("t", "c"), ("t", "t"), ("c", "v"), ("c", "c"), ("v", "v")}
    batch, length = len(kinds), len(kinds[0])
    mask = torch.zeros(batch, length, length, dtype=torch.bool)
    for row, letters in enumerate(kinds):
        for query in range(length):
            for key in range(query + 1):
                mask[row, query, key] = (letters[query], letters[key]) in allowed
    return mask


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A dense mask ``[B, 1, S, S]`` as stock eager attention adds it; its softmax is in float32."""
    hidden = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)[:, None]


def labels_of(inputs: dict, kinds: list[str]) -> torch.Tensor:
    """Text is learnt. BOS is not: in a row padded on the left, padding would be asked to predict
    it."""
    ids = inputs["input_ids"]
    return ids.masked_fill(~where(kinds, "t") | (ids == BOS), -100)

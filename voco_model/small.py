"""A small, untrained LLaVA and its processor, in place of a real checkpoint (demo, tests, benchmarks).

Its answers are noise, but every shape and code path is a real LLaVA's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

# The geometry of CLIP ViT-L/14 at 336 pixels, LLaVA-1.5's vision tower.
IMAGE_SIZE, PATCH_SIZE = 336, 14
VISION_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after ``<pad>``, ``<s>``, ``</s>``, ``<unk>`` and ``<image>``, ids 0 to 4."""
    special = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # it has no fixed order
    vocabulary = {token: index for index, token in enumerate((*special, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
    *,
    image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
) -> LlavaProcessor | LlavaNextProcessor:
    """A LLaVA-1.5's processor, or with ``image_grid_pinpoints`` a LLaVA-NeXT's.

    Args:
        image_size, patch_size: of the vision tower, in pixels.
    """
    sizes = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    parts = {
        "tokenizer": build_tokenizer(),
        "patch_size": patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # CLIP's class token
    }
    if image_grid_pinpoints is None:
        return LlavaProcessor(image_processor=LlavaImageProcessorPil(**sizes), **parts)
    tiles = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=image_grid_pinpoints)
    return LlavaNextProcessor(image_processor=tiles, **parts)


def build_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 with a few million random weights, in float32 and eval mode.

    Args:
        processor: from ``build_processor()``.
    """
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            # Larger than for training, so that the image has an influence on the answer.
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=VISION_TOKENS,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()

"""A LLaVA small enough to train from scratch on a CPU: CLIP tower, projector, Llama, processor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from voco_model.miniature.scenes import COLOURS, PLACES, SIZE
from voco_model.vlm.prompt import SYSTEM, SYSTEM_WITH_IMAGE, VOCO_TOKEN

PATCH = 4
GRID = SIZE // PATCH
VISION_TOKENS = GRID * GRID
MEAN, STD = 0.5, 0.5  # normalization of pixels

# All words of questions and answers; each becomes a token.
CORPUS = (
    SYSTEM,
    SYSTEM_WITH_IMAGE,
    " USER: Describe the picture. ASSISTANT: place none, place none",
    "USER: Which digit is in the place? ASSISTANT: none",
    "USER: Which colour is in the place? ASSISTANT: none",
    "USER: How many digits? ASSISTANT: none",
    "USER: Which digit is largest? ASSISTANT: none",
    "USER: Which digit is smallest? ASSISTANT: none",
    "USER: How many colours? ASSISTANT: none",
    " ".join(["", *PLACES, *COLOURS, *map(str, range(10))]),
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the language model and the vision tower."""

    hidden: int = 64
    inner: int = 128
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    tower_hidden: int = 64
    tower_layers: int = 2
    tower_heads: int = 2


def build_processor() -> LlavaProcessor:
    """A processor with a token for each word of the corpus (byte-level BPE), for 48 x 48 pictures."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=[MEAN] * 3,
            image_std=[STD] * 3,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            padding_side="left",
            # <VoCo> has the last id, so that further VoCo rows can follow.
            extra_special_tokens={"image_token": "<image>", "voco_token": VOCO_TOKEN},
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(
    processor: LlavaProcessor, shape: Shape, seed: int
) -> LlavaForConditionalGeneration:
    """A model with random float32 weights."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=SIZE,
            patch_size=PATCH,
            hidden_size=shape.tower_hidden,
            intermediate_size=2 * shape.tower_hidden,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=shape.tower_heads,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.head_dim,
            max_position_embeddings=1024,
            # Most of a head's few dimensions rotate slowly, which leaves them for content.
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            initializer_range=shape.hidden**-0.5,  # 0.02 suits widths of thousands
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=VISION_TOKENS,
        vision_feature_layer=-1,  # the tower has too few layers to skip one
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    # With CLIP's 0.02, positions would hardly count beside pixels in so short a training.
    embeddings = model.model.vision_tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=0.1)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.3)
    return model

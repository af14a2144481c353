"""Whether a processor fits a model: its image token, how many of them it writes, how answers end."""

from __future__ import annotations

from PIL import Image
from transformers.processing_utils import ProcessorMixin

from voco_model.vlm.prompt import style_of

# Tokens that a vision tower puts in front of the patches, by the type of its config.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def checked_tokenizer(model, processor):
    """The tokenizer of a model's processor.

    Raises:
        TypeError: not a processor with a tokenizer.
        ValueError: a processor whose image token isn't the model's.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(processor, ProcessorMixin) or tokenizer is None:
        raise TypeError(
            "expected a processor with a tokenizer (LlavaProcessor, LlavaNextProcessor), got "
            f"{type(processor).__name__}"
        )
    image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    if image_id != model.config.image_token_id:
        raise ValueError(
            "expected the processor's image token to be the model's "
            f"{model.config.image_token_id}, got {processor.image_token} = {image_id}; they come "
            "from different checkpoints"
        )
    return tokenizer


def check_processor(processor, config, style: str) -> None:
    """Raise ``ValueError`` for a processor that doesn't fit a model or a prompt style.

    Args:
        processor: with an image processor and a tokenizer.
        config: the model's.
        style: a name in ``voco_model.vlm.prompt.STYLES``.
    """
    _check_end(processor.tokenizer, style)
    vision = config.vision_config
    expected = {
        "patch_size": getattr(vision, "patch_size", None),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": _CLASS_TOKENS.get(vision.model_type),
    }
    for name, value in expected.items():
        got = getattr(processor, name, value)
        if value is not None and got != value:
            raise ValueError(
                f"expected a processor that counts image tokens as the model does, with {name} "
                f"{value!r}, got {got!r}; set processor.{name} = {value!r}, and save the processor"
            )
    side = getattr(vision, "image_size", None)
    if isinstance(side, int):
        _check_size(processor.image_processor, side)
    grids = getattr(config, "image_grid_pinpoints", None)
    got = getattr(processor.image_processor, "image_grid_pinpoints", grids)
    if grids is not None and [list(size) for size in got] != [list(size) for size in grids]:
        raise ValueError(
            f"expected an image processor with the model's image_grid_pinpoints {grids}, got {got}; set "
            "processor.image_processor.image_grid_pinpoints = model.config.image_grid_pinpoints"
        )


def _check_end(tokenizer, style: str) -> None:
    end = style_of(style).after_answer or tokenizer.eos_token
    if end is None:
        raise ValueError(
            f"expected a tokenizer with an eos_token, which ends answers in style {style!r}, got one "
            "without; set tokenizer.eos_token"
        )
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or (ids[0] == tokenizer.unk_token_id and end != tokenizer.unk_token):
        raise ValueError(
            f"expected a tokenizer with the token {end}, which ends answers in style {style!r}, got one "
            f"that reads {len(ids)} tokens; choose another prompt style, or add the token and train it"
        )


def _check_size(image_processor, side: int) -> None:
    # Twice as wide as high, to reveal a missing crop.
    picture = Image.new("RGB", (2 * side, side))
    pixels = image_processor(images=picture, return_tensors="pt")["pixel_values"]
    got = tuple(pixels.shape[-2:])
    if got != (side, side):
        raise ValueError(
            f"expected an image processor that makes pictures of {side} x {side} pixels, as the vision "
            f"tower reads them, got {got[0]} x {got[1]}; set size and crop_size of "
            f'processor.image_processor to {{"height": {side}, "width": {side}}}'
        )

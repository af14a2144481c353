"""Conversions between lmms-eval's requests and a model's inputs, options and answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from voco_model.pictures import WHITE, PictureError, decode
from voco_model.vlm.prompt import IMAGE_TOKEN

SEVERAL_IMAGES = ("refuse", "middle")
# For tasks without a limit of their own, whose answers are a letter or a few words.
MAX_NEW_TOKENS = 128


def question_of(context: str) -> str:
    """A task's text without ``<image>`` placeholders, since the prompt puts the image first anyway."""
    return context.replace(IMAGE_TOKEN, "").strip()


def turns_of(question: str, with_image: bool) -> list[dict]:
    """The question as messages, as ``voco_model.prompt`` takes them."""
    if not with_image:
        return [{"role": "user", "content": question}]
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
    ]


def image_of(
    visuals: Iterable | None, several: str, where: str, ground: tuple[int, int, int] = WHITE
) -> Image.Image | None:
    """The image of a question, decoded by the rules of ``voco_model.pictures``; None without one.

    Args:
        several: with several images, ``"refuse"`` the question or take the ``"middle"`` one, as LLaVA's
            authors do with the frames of a video.
        where: name of the question, for errors.
        ground: color behind transparent pixels.

    Raises:
        ValueError: several images that are refused; a video or sound; an image that can't be read.
    """
    visuals = list(visuals or ())
    if any(not isinstance(visual, Image.Image) for visual in visuals):
        kinds = sorted({type(visual).__name__ for visual in visuals})
        raise ValueError(f"expected images, got {', '.join(kinds)} in {where}; leave its task out")
    if len(visuals) > 1 and several == "refuse":
        raise ValueError(
            f"expected one image, got {len(visuals)} in {where}; leave its task out, or take the middle "
            'one of each question: several_images="middle"'
        )
    if not visuals:
        return None
    try:
        return decode(visuals[len(visuals) // 2], ground=ground)
    except PictureError as error:
        raise PictureError(f"{error}, in {where}") from error


# Tasks' names for the texts that end an answer, and for its most tokens.
_ENDS = ("until", "stop", "stop_sequences", "stop_strings")
_LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_gen_toks")
# Options of sampling, without effect on a greedy answer.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
# Other options that mean the same to tasks and to ``generate``.
_OTHERS = (
    "do_sample",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
)
# For the code of LLaVA's authors; here the checkpoint's processor decides how images are prepared.
_MEANT_FOR_OTHERS = ("image_aspect_ratio",)
_KNOWN = (*_ENDS, *_LENGTHS, *_SAMPLING, *_OTHERS, *_MEANT_FOR_OTHERS)


def generation_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's ``generation_kwargs`` as options of ``generate``, and the texts that end an answer.

    Greedy unless the task asks for samples. Options in ``unknown_options`` are dropped.
    """
    given = {name: value for name, value in given.items() if value is not None}
    options = {name: given[name] for name in (*_SAMPLING, *_OTHERS) if name in given}
    lengths = [given[name] for name in _LENGTHS if name in given]
    options["max_new_tokens"] = int(lengths[0]) if lengths else MAX_NEW_TOKENS
    for name in (*_SAMPLING, "repetition_penalty"):
        if name in options and name != "top_k":
            options[name] = float(options[name])  # generate refuses a temperature of 1
    temperature = options.get("temperature", 0)
    sampled = options.get("do_sample", temperature > 0) and options.get("temperature", 1) > 0
    if not sampled:
        options = {name: value for name, value in options.items() if name not in _SAMPLING}
    if options.get("num_beams") == 1:
        del options["num_beams"]
    ends = [given[name] for name in _ENDS if name in given]
    until = [text for end in ends for text in ([end] if isinstance(end, str) else end)]
    return {**options, "do_sample": bool(sampled)}, list(dict.fromkeys(until))


def unknown_options(given: Mapping[str, Any]) -> list[str]:
    """Names in a task's ``generation_kwargs`` that are meant for other models or servers."""
    return [name for name, value in given.items() if name not in _KNOWN and value is not None]


def cut(answer: str, until: Sequence[str]) -> str:
    """The answer up to the first of the texts that end it."""
    for text in until:
        if text:
            answer = answer.partition(text)[0]
    return answer.strip()

"""From a record to a sample: messages without placeholders, and the images in front of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voco_model.data.faults import DataError
from voco_model.data.pictures import Picture, frames_of
from voco_model.prompt import IMAGE_TOKEN, VOCO_TOKEN

# LLaVA's names for roles, and those of everyone else.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
_VIDEO_TOKEN = "<video>"


@dataclass(frozen=True)
class Sample:
    """A conversation and what it is about.

    Attributes:
        where: file and line, or data set and row.
        messages: ``{"role": ..., "content": text}``, user and assistant in turns, the last one an
            answer; perhaps a system message in front.
        pictures: in the order in which they stand in front of the text.
        loose: turns that were left out: answers in front of all questions, a question at the end.
    """

    where: str
    messages: list[dict[str, str]]
    pictures: list[Picture]
    loose: int = 0


def sample_of(
    record: Mapping[str, Any], where: str, folder: str | Path = ".", max_frames: int = 8
) -> Sample:
    """Read a record of LLaVA's instruction files.

    ``{"id", "image": name or names, "conversations": [{"from": "human" | "gpt", "value": text}]}``, or
    ``messages`` with ``role`` and ``content``, and ``images`` for ``image``. ``<image>`` is taken out of
    the texts: images go to the front (Listing 1 of the supplement). ``video`` is a video file, a folder
    of frames, or a list of frames; each frame counts as an image.

    Args:
        folder: of the images, for names that are relative.
        max_frames: of a video, spread evenly over it.

    Raises:
        DataError: with one of the kinds of fault.
    """
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise DataError("bad_record", where, "expected conversations or messages, got none")
    messages = [_message(turn, where) for turn in turns]
    pictures = _pictures(record, where, Path(folder), max_frames)
    placeholders = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    expected = len(pictures)
    if record.get("video") is not None:
        placeholders += sum(message["content"].count(_VIDEO_TOKEN) for message in messages)
        expected = 1
    if placeholders not in (0, expected):  # none at all: a file that leaves them out
        raise DataError(
            "misplaced_images",
            where,
            f"expected {IMAGE_TOKEN} once for each of {expected} images, got {placeholders}",
        )
    for message in messages:
        text = message["content"]
        if VOCO_TOKEN in text:
            raise DataError("misplaced_images", where, f"expected texts without {VOCO_TOKEN}")
        if record.get("video") is not None:
            text = text.replace(_VIDEO_TOKEN, "")
        if text != message["content"] or IMAGE_TOKEN in text:
            message["content"] = text.replace(IMAGE_TOKEN, "").strip()
    loose = _trim_turns(messages, where)
    return Sample(where, messages, pictures, loose)


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise DataError("bad_record", where, f"expected turns as objects, got {turn!r}")
    role = turn.get("from", turn.get("role"))
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError("unknown_role", where, f"expected one of {', '.join(_ROLES)}, got {role!r}")
    text = turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise DataError("bad_record", where, f"expected the text of a turn, got {text!r}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError("bad_record", where, "expected text, got half of a surrogate pair in it")
    return {"role": _ROLES[role], "content": text}


def _trim_turns(messages: list[dict[str, str]], where: str) -> int:
    """Leave out turns that don't pair, in place; how many they were."""
    before = len(messages)
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    # Some of LLaVA's conversations start with an answer, which its own code drops.
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
        messages.remove(next(m for m in messages if m["role"] == "assistant"))
    if turns and turns[-1]["role"] == "user":
        turns = turns[:-1]  # a last question that nobody answered
        messages.pop()
    if not turns:
        raise DataError("empty_answer", where, "expected at least one question and its answer")
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            got = message["role"]
            raise DataError("unknown_role", where, f"expected a turn of the {expected}, got {got}")
        if expected == "assistant" and not message["content"].strip():
            raise DataError(
                "empty_answer", where, f"expected an answer to question {index // 2 + 1}"
            )
    return before - len(messages)


def _pictures(
    record: Mapping[str, Any], where: str, folder: Path, max_frames: int
) -> list[Picture]:
    given = [record.get(name) for name in ("image", "images")]
    given = [value for value in given if value is not None]
    video = record.get("video")
    if len(given) + (video is not None) > 1:
        raise DataError("bad_record", where, "expected one of image, images and video, got several")
    if video is not None:
        return frames_of(video, where, folder, max_frames)
    if not given:
        return []
    images = given[0] if isinstance(given[0], list) else [given[0]]
    return [Picture.of(image, where, folder) for image in images]

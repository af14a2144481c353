"""Samples: a record's messages without image placeholders, and its images in order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voco_model.data.faults import DataError
from voco_model.data.image_values import in_column, in_part
from voco_model.data.pictures import Picture, frames_of
from voco_model.vlm.prompt import IMAGE_TOKEN, VOCO_TOKEN

# LLaVA's names for roles, and the usual ones.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
_VIDEO_TOKEN = "<video>"
_SOUND = ("audio", "audios")
_SHOWN = 80  # characters of a wrong value in a fault's message


@dataclass(frozen=True)
class Sample:
    """A conversation and its images.

    Attributes:
        where: file and line, or data set and row.
        messages: ``{"role": ..., "content": text}``, user and assistant alternating, ending with an
            answer; possibly a system message first.
        pictures: the images, in the order in which they precede the text.
        loose: number of turns left out: answers before the first question, a last unanswered question.
    """

    where: str
    messages: list[dict[str, str]]
    pictures: list[Picture]
    loose: int = 0


@dataclass
class _Place:
    """The place of an image in a turn: a placeholder or a content part.

    Attributes:
        image: the image in the part; None if it is in a column of the record.
        index: number of the image in the column; None for the next one.
    """

    image: Any = None
    index: int | None = None


@dataclass
class _Turn:
    role: str
    text: str
    places: list[_Place] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def sample_of(
    record: Mapping[str, Any], where: str, folder: str | Path = ".", max_frames: int = 8
) -> Sample:
    """Read a record of an instruction data set.

    Either ``conversations`` with ``{"from": "human" | "gpt", "value": text}`` (LLaVA), or ``messages``
    with ``{"role": "user" | "assistant", "content": text or parts}``. Parts are ``{"type": "text",
    "text": ...}`` and images: ``{"type": "image"}``, perhaps with ``index``, for one in a column of the
    record, or with the image itself under ``image``, ``path``, ``url`` or ``base64``, or OpenAI's
    ``{"type": "image_url", "image_url": ...}``. The columns ``image`` and ``images`` hold one image or a
    list. ``video`` is a video file, a folder of frames, or a list of frames; each frame counts as an
    image. Empty columns (None, NaN, empty lists) count as missing; conversations may be JSON text.

    ``<image>`` and image parts are removed from the texts: all images, also those of later turns, go to
    the front, in the order of their places (Listing 1 of the supplement). Turns that are left out lose
    their images too.

    Args:
        folder: folder that relative names of images start from.
        max_frames: most frames of a video, spread evenly over it.

    Raises:
        DataError: a fault of any kind in ``KINDS``.
    """
    columns = {name: value for name, value in record.items() if not _is_empty(value)}
    # With an empty column for videos, <video> in a text is the place of a missing video.
    has_video = any(record.get(name) is not None for name in ("video", "videos"))
    turns = _turns(columns, where, has_video)
    pictures = _in_columns(columns, where, Path(folder), max_frames)
    _place(turns, pictures, where, Path(folder))
    kept = _trimmed(turns, where)
    placed = any(turn.places for turn in turns)
    return Sample(
        where,
        [{"role": turn.role, "content": turn.text} for turn in kept],
        [p for turn in kept for p in turn.pictures] if placed else sum(pictures, []),
        len(turns) - len(kept),
    )


def _is_empty(value: Any) -> bool:
    """Whether a column is empty, as in merged data sets: None, NaN or an empty list, nested or not."""
    if isinstance(value, Mapping):
        return all(_is_empty(inner) for inner in value.values())
    missing = isinstance(value, float) and value != value  # as pandas writes it
    return value is None or missing or (isinstance(value, str | list) and not value)


def _turns(columns: Mapping[str, Any], where: str, has_video: bool) -> list[_Turn]:
    given = [name for name in ("conversations", "messages") if name in columns]
    if len(given) != 1:
        got = "both" if given else f"none among the columns {', '.join(columns) or '(all empty)'}"
        raise DataError("bad_record", where, f"expected conversations or messages, got {got}")
    turns = columns[given[0]]
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise DataError(
                "bad_record", where, f"expected {given[0]} as a list, or as JSON, got {error}"
            ) from error
    if not isinstance(turns, list) or not turns:
        raise DataError("bad_record", where, f"expected {given[0]} as a list, got {_shown(turns)}")
    turns = [_turn(turn, where, has_video) for turn in turns]
    system = columns.get("system")
    if isinstance(system, str) and turns[0].role != "system":
        turns.insert(0, _Turn("system", _checked_text(system, where)))
    return turns


def _turn(turn: Any, where: str, has_video: bool) -> _Turn:
    if not isinstance(turn, Mapping):
        raise DataError("bad_record", where, f"expected turns as objects, got {_shown(turn)}")
    role = _first(turn, "from", "role")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError("unknown_role", where, f"expected one of {', '.join(_ROLES)}, got {role!r}")
    content = _first(turn, "value", "content")
    if isinstance(content, list) and content:
        text, places = _joined(content, where)
    else:
        text, places = _checked_text(content, where), []
    written = text.count(IMAGE_TOKEN) + (text.count(_VIDEO_TOKEN) if has_video else 0)
    if written and places:
        raise DataError(
            "misplaced_images",
            where,
            f"expected images as parts or as {IMAGE_TOKEN} in the text, got both in one turn",
        )
    places = places or [_Place() for _ in range(written)]
    if has_video:
        text = text.replace(_VIDEO_TOKEN, "")
    if places:
        text = text.replace(IMAGE_TOKEN, "").strip()
    # Removing a token can spell a new one: <ima<image>ge>.
    if IMAGE_TOKEN in _checked_text(text, where).replace("\n", ""):
        raise DataError(
            "misplaced_images",
            where,
            f"expected {IMAGE_TOKEN} as the place of an image, got it inside "
            "another or across lines",
        )
    return _Turn(_ROLES[role], text, places)


def _joined(parts: list, where: str) -> tuple[str, list[_Place]]:
    """The text of all parts, and the places of their images."""
    texts, places = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(_checked_text(part.get("text"), where))
        elif kind in ("image", "image_url"):
            index = part.get("index")
            if isinstance(index, float):  # pandas stores integers as floats beside None
                index = int(index) if index.is_integer() else None
            places.append(_Place(in_part(part, where), index))
        else:
            raise DataError(
                "bad_record",
                where,
                f"expected parts of type text, image or image_url, got {_shown(part)}",
            )
    return "".join(texts), places


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise DataError("bad_record", where, f"expected the text of a turn, got {_shown(text)}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError("bad_record", where, "expected text, got half of a surrogate pair in it")
    if VOCO_TOKEN in text.replace("\n", ""):  # the authors' prompts delete newlines
        raise DataError("misplaced_images", where, f"expected texts without {VOCO_TOKEN}")
    return text


def _in_columns(
    columns: Mapping[str, Any], where: str, folder: Path, max_frames: int
) -> list[list[Picture]]:
    """The images in the record's columns, one list each; the frames of a video are one list."""
    sound = [name for name in _SOUND if name in columns]
    if sound:
        raise DataError("bad_record", where, f"expected images and text, got {sound[0]}")
    given = [name for name in ("image", "images", "video", "videos") if name in columns]
    if len(given) > 1:
        got = ", ".join(given)
        raise DataError("bad_record", where, f"expected one of image, images and video, got {got}")
    if not given:
        return []
    value = columns[given[0]]
    if given[0] == "videos":
        if not isinstance(value, list) or len(value) != 1:
            raise DataError("bad_record", where, f"expected one video, got {_shown(value)}")
        value = value[0]
    if given[0].startswith("video"):
        return [frames_of(value, where, folder, max_frames)]
    images = value if isinstance(value, list) else [value]
    return [[Picture.of(in_column(image, where), where, folder)] for image in images]


def _place(turns: list[_Turn], pictures: list[list[Picture]], where: str, folder: Path) -> None:
    """Assign the pictures to the turns that have their places, if any turn has one."""
    places = [place for turn in turns for place in turn.places]
    own = [place.image for place in places if place.image is not None]
    if own:
        if pictures or len(own) < len(places):
            raise DataError(
                "misplaced_images",
                where,
                "expected images in their parts or in a column, got some in each",
            )
        pictures = [[Picture.of(image, where, folder)] for image in own]
    if len(places) not in (0, len(pictures)):  # no places at all: the texts leave them out
        raise DataError(
            "misplaced_images",
            where,
            f"expected {IMAGE_TOKEN} or an image part once for each of {len(pictures)} images, got "
            f"{len(places)}",
        )
    order = [place.index for place in places]
    if any(index is not None for index in order):
        numbers = [index for index in order if type(index) is int]
        if own or len(numbers) < len(order) or sorted(numbers) != list(range(len(pictures))):
            raise DataError(
                "misplaced_images",
                where,
                f"expected each index from 0 to {len(pictures) - 1} in one image part, got {order}",
            )
        pictures = [pictures[index] for index in order]
    placed = iter(pictures)
    for turn in turns:
        turn.pictures = [picture for _ in turn.places for picture in next(placed)]


def _trimmed(turns: list[_Turn], where: str) -> list[_Turn]:
    """The turns that form pairs, after a system message if there is one."""
    start = 1 if turns[0].role == "system" else 0
    first, last = start, len(turns)
    # Some of LLaVA's conversations start with an answer, which LLaVA's code drops.
    while first < last and turns[first].role == "assistant":
        first += 1
    if first < last and turns[-1].role == "user":
        last -= 1  # a last question without an answer
    if first == last:
        raise DataError("empty_answer", where, "expected at least one question and its answer")
    for index, turn in enumerate(turns[first:last]):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise DataError(
                "unknown_role", where, f"expected a turn of the {expected}, got {turn.role}"
            )
        if expected == "assistant" and not turn.text.strip():
            raise DataError(
                "empty_answer", where, f"expected an answer to question {index // 2 + 1}"
            )
    return turns[:start] + turns[first:last]


def _first(turn: Mapping[str, Any], *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."

"""Images of a sample, opened only when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from voco_model.data.faults import DataError
from voco_model.pictures import PictureError, decode, size_of
from voco_model.pictures.sources import base64_in

_FRAME_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class Frame:
    """A frame of a video file.

    Attributes:
        index: number of the frame among the frames used.
        count: how many frames are used.
        spread: whether these are spread evenly over the file; else they are all of its frames.
        size: height and width, upright.
    """

    index: int
    count: int
    spread: bool
    size: tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """An image in a file, in memory as a file's bytes, as pixels, or a frame of a video file.

    Attributes:
        source: path, bytes, or a PIL image.
        where: place of the sample, for errors.
        frame: the frame, if ``source`` is a video.
    """

    source: Path | bytes | Image.Image
    where: str
    frame: Frame | None = None

    @classmethod
    def of(cls, value: Any, where: str, folder: Path) -> Picture:
        """From a file name, base64, or a value of ``datasets``: ``{"bytes", "path"}`` or a PIL image."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes | Image.Image):
            return cls(value, where)
        if not isinstance(value, str) or not value:
            raise DataError("bad_record", where, f"expected the name of an image, got {value!r}")
        path = folder / value
        if not _is_file(path):
            encoded = base64_in(value)
            if encoded is not None:
                return cls(encoded, where)
            raise DataError("missing_file", where, f"expected an image, got no such file: {path}")
        return cls(path, where)

    def size(self, **options) -> tuple[int, int]:
        """Height and width, upright, from the header alone.

        Args:
            options: ``limits`` and ``processor``, as for ``voco_model.pictures.size_of``.

        Raises:
            DataError: ``broken_image``: it can't be read, or exceeds the limits.
        """
        with self._faults():
            if self.frame is None:
                return size_of(self.source, **options)
            blank = Image.new("1", self.frame.size[::-1])  # limits hold for frames as well
            return size_of(blank, **options)

    def open(self, **options) -> Image.Image:
        """RGB, decoded, by the rules of ``voco_model.pictures.decode``.

        Args:
            options: as for ``decode``.

        Raises:
            DataError: like ``size``.
        """
        with self._faults():
            if self.frame is None:
                return decode(self.source, **options)
            return decode(_read_frame(self.source, self.frame, self.where), **options)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except PictureError as error:
            raise DataError("broken_image", self.where, str(error)) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


def frames_of(video: Any, where: str, folder: Path, max_frames: int) -> list[Picture]:
    """Frames of a video: a list of images, a folder of images ordered by name, or a video file.

    Returns ``max_frames`` frames, spread evenly from the first to the last, or all if there are fewer.

    Raises:
        DataError: no such file or folder, no frames in it, or a file that can't be decoded.
        ValueError: ``max_frames`` below 1.
    """
    if max_frames < 1:
        raise ValueError(f"expected max_frames >= 1, got {max_frames}")
    if isinstance(video, list):
        frames = [Picture.of(frame, where, folder) for frame in video]
    elif isinstance(video, str) and (folder / video).is_dir():
        files = sorted(p for p in (folder / video).iterdir() if p.suffix.lower() in _FRAME_FILES)
        frames = [Picture(file, where) for file in files]
    elif isinstance(video, str) and (folder / video).is_file():
        return _frames_of_file(folder / video, where, max_frames)
    elif isinstance(video, str):
        raise DataError(
            "missing_file", where, f"expected a video or a folder of frames, got {folder / video}"
        )
    else:
        raise DataError("bad_record", where, f"expected the name of a video, got {video!r}")
    if not frames:
        raise DataError("missing_file", where, f"expected frames in {video}, got none")
    if len(frames) > max_frames:
        chosen = np.linspace(0, len(frames) - 1, max_frames).round().astype(int)
        frames = [frames[i] for i in chosen]
    return frames


@contextmanager
def _opened(path: Path, where: str) -> Iterator[Any]:
    """A video's container; errors of PyAV while it is open become a ``DataError``."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package av, which reads video files; pip install 'voco-kernels[video]'"
        ) from error
    try:
        with av.open(str(path)) as container:
            yield container
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise DataError("broken_image", where, f"{path}: {error}") from error


def _frames_of_file(path: Path, where: str, max_frames: int) -> list[Picture]:
    with _opened(path, where) as container:
        stream = container.streams.video[0]
        # Frames are decoded, not just counted by packets: the first one has the rotation, and some
        # packets hold no frame. At most max_frames + 1 of them, however long the video is.
        first, count = None, 0
        for frame in islice(container.decode(stream), max_frames + 1):
            first, count = first or frame, count + 1
        if first is None:
            raise ValueError("no frame could be decoded")
        width, height = _upright(first).size
    spread = count > max_frames
    count = min(count, max_frames)
    return [Picture(path, where, Frame(i, count, spread, (height, width))) for i in range(count)]


def _read_frame(path: Path, wanted: Frame, where: str) -> Image.Image:
    with _opened(path, where) as container:
        stream = container.streams.video[0]
        if wanted.spread:
            frame = _frame_at(container, stream, wanted)
        else:
            frame = next(islice(container.decode(stream), wanted.index, None), None)
        if frame is None:
            raise ValueError("no frame could be decoded")
        return _upright(frame)


def _frame_at(container, stream, wanted: Frame) -> Any:
    """The first frame at or after its share of the way from the first frame to the last."""
    # By time, in units of the stream's clock: some files don't store a number of frames, and some
    # (Matroska) have a duration only for the whole file.
    length = stream.duration
    if length is None:
        length = int((container.duration or 0) * stream.time_base.denominator)
        length //= 1_000_000 * stream.time_base.numerator
    if stream.average_rate:  # the last frame begins before the end
        length -= int(1 / (stream.average_rate * stream.time_base))
    start = (stream.start_time or 0) + length * wanted.index // max(wanted.count - 1, 1)
    container.seek(start, stream=stream)
    best = None
    for frame in container.decode(stream):
        best = frame
        if frame.pts is None or frame.pts >= start:
            break
    return best


def _upright(frame) -> Image.Image:
    """The frame turned upright: phones store the sensor's view with a counterclockwise angle."""
    return frame.to_image().rotate(frame.rotation, expand=True)

"""Images of a sample: named first, opened when they are wanted."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from voco_model.data.faults import DataError

_FRAME_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
# What Pillow raises for a file that it can't read; AVIF's decoder has RuntimeError.
_UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """An image in a file, in memory as a file's bytes, as pixels, or a frame of a video file.

    Attributes:
        source: path, bytes, or a PIL image.
        where: of the sample, for errors.
        frame: of a video: which of how many, spread evenly.
    """

    source: Path | bytes | Image.Image
    where: str
    frame: tuple[int, int] | None = None

    @classmethod
    def of(cls, value: Any, where: str, folder: Path) -> Picture:
        """From a file name, or from what ``datasets`` gives: ``{"bytes", "path"}`` or a PIL image."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes | Image.Image):
            return cls(value, where)
        if not isinstance(value, str) or not value:
            raise DataError("bad_record", where, f"expected the name of an image, got {value!r}")
        path = folder / value
        if not _is_file(path):
            raise DataError(
                "missing_file", where, f"expected an image, got {path}, which isn't there"
            )
        return cls(path, where)

    def size(self) -> tuple[int, int]:
        """Height and width, from the header alone."""
        if self.frame is not None:
            width, height = self.open().size
            return height, width
        if isinstance(self.source, Image.Image):  # leaving a with block would close its file
            return self.source.height, self.source.width
        with self._opened() as image:
            return image.height, image.width

    def open(self) -> Image.Image:
        """RGB, decoded."""
        if self.frame is not None:
            return _frame(self.source, *self.frame, self.where)
        image = self._opened()
        try:
            return image.convert("RGB")
        except _UNREADABLE as error:
            raise DataError("broken_image", self.where, f"{self._name()}: {error}") from error

    def _opened(self) -> Image.Image:
        if isinstance(self.source, Image.Image):
            return self.source
        file = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        try:
            return Image.open(file)
        except _UNREADABLE as error:
            raise DataError("broken_image", self.where, f"{self._name()}: {error}") from error

    def _name(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else "an image in the data set"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def frames_of(video: Any, where: str, folder: Path, max_frames: int) -> list[Picture]:
    """Frames of a video: of a list of images, of a folder of images in order of name, or of a file.

    Raises:
        DataError: no such file or folder, or nothing in it.
    """
    if isinstance(video, list):
        frames = [Picture.of(frame, where, folder) for frame in video]
    elif isinstance(video, str) and (folder / video).is_dir():
        files = sorted(p for p in (folder / video).iterdir() if p.suffix.lower() in _FRAME_FILES)
        frames = [Picture(file, where) for file in files]
    elif isinstance(video, str) and (folder / video).is_file():
        return [Picture(folder / video, where, (i, max_frames)) for i in range(max_frames)]
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


def _frame(path: Path, index: int, count: int, where: str) -> Image.Image:
    """One of ``count`` frames that are spread evenly over a video file."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package av, which reads video files; pip install 'voco-kernels[video]'"
        ) from error
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            # In units of the stream's clock; some files don't say how many frames they have, and some
            # (Matroska) give a length only to the whole file.
            length = stream.duration
            if length is None:
                length = int((container.duration or 0) / av.time_base / stream.time_base)
            wanted = (stream.start_time or 0) + length * index // max(count - 1, 1)
            container.seek(int(wanted), stream=stream)
            best = None
            for frame in container.decode(stream):
                best = frame
                if frame.pts is None or frame.pts >= wanted:
                    break
            if best is None:
                raise ValueError("no frame could be decoded")
            return best.to_image().convert("RGB")
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise DataError("broken_image", where, f"{path}: {error}") from error

"""Videos: a folder of frames, a list of frames, a file; each frame is an image with VoCo tokens."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
from PIL import Image

from tests.voco_model import tiny
from tests.voco_model.data.conversation import learnt, text_of
from voco_model.data.encode import Encoder
from voco_model.data.faults import DataError
from voco_model.data.samples import sample_of

FRAMES = 25
STEP = 10  # of brightness, from a frame to the next


def frame(number: int) -> Image.Image:
    return Image.fromarray(np.full((32, 32, 3), STEP * number, dtype=np.uint8))


def number_of(picture) -> float:
    return float(np.asarray(picture.open()).mean()) / STEP


def record(video, text: str = "<video>\nWhat happens?") -> dict:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "It grows lighter."}]
    return {"video": video, "conversations": turns}


def write_folder(folder) -> str:
    (folder / "clip").mkdir()
    for number in reversed(range(FRAMES)):
        frame(number).save(folder / "clip" / f"{number:03}.png")
    (folder / "clip" / "notes.txt").write_text("no frame")
    return "clip"


def write_file(folder, name: str = "clip.mp4", frames: int = FRAMES) -> str:
    av = pytest.importorskip("av")
    with av.open(str(folder / name), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            for packet in stream.encode(av.VideoFrame.from_image(frame(number))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return name


@pytest.mark.parametrize("count, expected", [(1, [0]), (3, [0, 12, 24]), (5, [0, 6, 12, 18, 24])])
@pytest.mark.parametrize("form", ["folder", "list"])
def test_frames_are_spread_evenly(tmp_path, form, count, expected):
    video = write_folder(tmp_path)
    if form == "list":
        video = [f"clip/{number:03}.png" for number in range(FRAMES)]
    sample = sample_of(record(video), "data.json:1", tmp_path, max_frames=count)
    assert [number_of(picture) for picture in sample.pictures] == expected


@pytest.mark.parametrize("form", ["folder", "list"])
def test_few_frames_are_all_taken(tmp_path, form):
    video = write_folder(tmp_path)
    if form == "list":
        video = [f"clip/{number:03}.png" for number in range(FRAMES)]
    sample = sample_of(record(video), "data.json:1", tmp_path, max_frames=40)
    assert [number_of(picture) for picture in sample.pictures] == list(range(FRAMES))


@pytest.mark.parametrize("count, expected", [(1, [0]), (3, [0, 12, 24]), (5, [0, 6, 12, 18, 24])])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_frames_of_a_file_are_spread_evenly(tmp_path, name, count, expected):
    sample = sample_of(record(write_file(tmp_path, name)), "x", tmp_path, max_frames=count)
    assert [picture.size() for picture in sample.pictures] == [(32, 32)] * count
    found = [number_of(picture) for picture in sample.pictures]
    # A frame that was wanted between two others is the later of them; the codec loses a little.
    assert found == pytest.approx(expected, abs=1.3)


@pytest.mark.parametrize("asked", [3, 4, 8])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_a_short_file_gives_each_frame_once(tmp_path, name, asked):
    sample = sample_of(record(write_file(tmp_path, name, frames=3)), "x", tmp_path, asked)
    found = [number_of(picture) for picture in sample.pictures]
    assert found == pytest.approx([0, 1, 2], abs=0.5)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_the_last_frame_is_not_taken_twice(tmp_path, name):
    sample = sample_of(record(write_file(tmp_path, name, frames=6)), "x", tmp_path, 5)
    found = [round(number_of(picture)) for picture in sample.pictures]
    assert found[0] == 0 and found[-1] == 5 and len(set(found)) == 5


def rotated_file(folder, turn: tuple[int, ...]) -> str:
    """An mp4 of one frame, 48 x 32, white in its upper left quarter, shown by a display matrix."""
    av = pytest.importorskip("av")
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    pixels[:16, :24] = 255
    path = folder / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
            container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # behind its type: version, times, numbers; then the matrix
    a, b, c, d = (entry << 16 for entry in turn)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path.name


@pytest.mark.parametrize(
    "matrix, white",
    [
        ((1, 0, 0, 1), (0, 0)),
        ((0, 1, -1, 0), (0, 1)),  # turned clockwise: the upper left goes to the upper right
        ((-1, 0, 0, -1), (1, 1)),
        ((0, -1, 1, 0), (1, 0)),
    ],
)
def test_a_film_is_turned_as_its_matrix_says(tmp_path, matrix, white):
    sample = sample_of(record(rotated_file(tmp_path, matrix)), "x", tmp_path)
    (picture,) = sample.pictures
    seen = np.asarray(picture.open()).mean(-1)
    sideways = matrix[0] == 0
    assert picture.size() == seen.shape == ((48, 32) if sideways else (32, 48))
    half = [side // 2 for side in seen.shape]
    quarters = np.array(
        [[seen[: half[0], : half[1]].mean(), seen[: half[0], half[1] :].mean()],
         [seen[half[0] :, : half[1]].mean(), seen[half[0] :, half[1] :].mean()]]
    )  # fmt: skip
    assert np.unravel_index(quarters.argmax(), (2, 2)) == white
    assert quarters[white] > 240 and np.sort(quarters.ravel())[2] < 15


@pytest.mark.parametrize("form", ["folder", "list", "file"])
@pytest.mark.parametrize("text", ["<video>\nWhat happens?", "What happens?"])
def test_each_frame_is_a_segment_with_its_voco_tokens(processor, tmp_path, form, text):
    video = write_file(tmp_path) if form == "file" else write_folder(tmp_path)
    if form == "list":
        video = [f"clip/{number:03}.png" for number in range(3)]
    encoder = Encoder(processor, "vicuna", 4096)
    sample = sample_of(record(video, text), "data.json:1", tmp_path, max_frames=3)
    document = encoder.encode(sample, 2)
    written = text_of(processor, document.input_ids)
    part = "<image>\n<VoCo><VoCo>"
    assert written.startswith(f"<s>{part}\n{part}\n{part}\n A chat between")
    assert "of the given image. " in written
    assert written.endswith(" USER: What happens? ASSISTANT: It grows lighter.</s>")
    assert learnt(processor, document) == [" It grows lighter.</s>"]
    assert len(document.pixel_values) == 3
    assert encoder.length(sample, 2) == len(document.input_ids)
    assert (document.input_ids == tiny.VOCO).sum() == 6


def test_videos_that_cannot_be_read(tmp_path):
    (tmp_path / "garbage.mp4").write_bytes(b"not a film" * 100)
    whole = (tmp_path / write_file(tmp_path)).read_bytes()
    (tmp_path / "cut_off.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing.mp4").touch()
    (tmp_path / "empty").mkdir()
    for video in ("garbage.mp4", "cut_off.mp4", "nothing.mp4"):
        with pytest.raises(DataError, match=re.escape(video)) as caught:
            sample_of(record(video), "data.json:4", tmp_path)
        assert caught.value.fault.kind == "broken_image"
        assert caught.value.fault.where == "data.json:4"
    for video, kind in (
        ("nowhere.mp4", "missing_file"),
        ("empty", "missing_file"),
        (["clip/000.png"], "missing_file"),
        ([], "misplaced_images"),  # <video> in the text, and none in the column
        (7, "bad_record"),
    ):
        with pytest.raises(DataError) as caught:
            sample_of(record(video), "data.json:4", tmp_path)
        assert caught.value.fault.kind == kind
    with pytest.raises(ValueError, match="expected max_frames >= 1, got 0"):
        sample_of(record("clip.mp4"), "data.json:4", tmp_path, max_frames=0)
    with pytest.raises(DataError, match="once for each of 1 images, got 2"):
        sample_of(record("clip.mp4", "<video> and <video>"), "data.json:4", tmp_path)

"""One picture in every form in which it may be given: the same pixels and the same size."""

from __future__ import annotations

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.voco_model.pictures.files import encoded, noise, opened, oriented, png_chunk
from voco_model.pictures import PictureError, PictureLimits, as_images, decode, decode_each, size_of

PICTURE = noise()
PIXELS = np.asarray(PICTURE)
DATA = encoded(PICTURE)
BASE64 = base64.b64encode(DATA).decode()


class Named:  # what some libraries give in place of a path
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


# What is callable is called with the path of a PNG.
FORMS = {
    "itself": PICTURE,
    "str": str,
    "Path": Path,
    "PathLike": Named,
    "Image.open": Image.open,
    "Image.open, loaded": opened(DATA).copy(),
    "bytes": DATA,
    "bytearray": bytearray(DATA),
    "memoryview": memoryview(DATA),
    "file": io.BytesIO(DATA),
    "data URI": f"data:image/png;base64,{BASE64}",
    "base64": BASE64,
    "base64 in lines": base64.encodebytes(DATA).decode(),
    "row with bytes": {"bytes": DATA, "path": None},
    "row with a path": lambda path: {"bytes": None, "path": str(path)},
    "part with a path": lambda path: {"type": "image", "path": str(path)},
    "part with base64": {"type": "image", "base64": BASE64},
    "part with an image": {"type": "image", "image": PICTURE},
    "part of OpenAI's": {"image_url": {"url": f"data:image/png;base64,{BASE64}"}},
    "HWC": PIXELS.copy(),
    "CHW": np.ascontiguousarray(PIXELS.transpose(2, 0, 1)),
    "tensor HWC": torch.from_numpy(PIXELS.copy()),
    "tensor CHW": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1),
    "float32": PIXELS.astype(np.float32) / 255,
    "float64": PIXELS / 255,
    "float16 tensor": (torch.from_numpy(PIXELS.copy()).float() / 255).half(),
    "uint16": PIXELS.astype(np.uint16) * 257,
    "opaque alpha": np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]),
    "opaque RGBA": PICTURE.convert("RGBA"),
    "BMP": encoded(PICTURE, "BMP"),
    "TIFF": encoded(PICTURE, "TIFF"),
    "WebP": encoded(PICTURE, "WEBP", lossless=True),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_picture(tmp_path, form):
    (tmp_path / "photo.png").write_bytes(DATA)
    given = FORMS[form]
    given = given(tmp_path / "photo.png") if callable(given) else given
    assert size_of(given) == (30, 44)
    found = decode(given)
    assert type(found) is Image.Image and found.mode == "RGB" and not found.info
    assert np.array_equal(found, PIXELS)
    assert np.array_equal(decode(given), PIXELS), "it can be given again"


def test_what_is_decoded_is_not_decoded_again():
    found = decode(DATA)
    assert decode(found) is found
    assert decode(PICTURE) is PICTURE
    turned = PICTURE.copy()
    turned.getexif()[0x0112] = 3
    assert decode(turned) is not turned
    assert np.array_equal(decode(turned), PIXELS[::-1, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once_in_every_form(tmp_path, kind, orientation):
    stored = noise(16, 48)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(stored, kind, exif=oriented(orientation), **lossless)
    plain = np.asarray(opened(encoded(stored, kind, **lossless)))
    shown = {
        1: plain,
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.transpose(1, 0, 2),
        6: np.rot90(plain, -1),
        7: plain[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(plain),
    }[orientation]
    path = tmp_path / "photo"
    path.write_bytes(data)
    loaded = opened(data)
    loaded.load()
    for given in (
        path,
        data,
        opened(data),
        loaded,
        opened(data).convert("RGB"),
        {"bytes": data},
        ImageOps.exif_transpose(opened(data)),  # not turned twice
        decode(data),
    ):
        assert size_of(given) == shown.shape[:2]
        assert np.array_equal(decode(given), shown)


def test_multi_picture_files_turn_by_their_own_tag():
    pages = [noise(16, 48, seed) for seed in (0, 1)]
    data = encoded(pages[0], "MPO", save_all=True, append_images=pages[1:], exif=oriented(6))
    assert opened(data).format == "MPO"
    assert size_of(data) == (48, 16)
    assert decode(data).size == decode(opened(data)).size == (16, 48)


def test_a_png_may_say_behind_its_pixels_how_it_is_turned(monkeypatch):
    exif = oriented(6).tobytes()
    end = DATA.index(b"IEND") - 4
    turned = DATA[:end] + png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) + DATA[end:]
    noted = DATA[:end] + png_chunk(b"tEXt", b"date:create\x00today") + DATA[end:]
    for given in (turned, opened(turned)):
        assert size_of(given) == (44, 30)
        assert np.array_equal(decode(given), np.rot90(PIXELS, -1))
    # Its size takes no decoding, nor does one with other notes there.
    monkeypatch.setattr(Image.core, "new", None)
    assert size_of(DATA) == size_of(noted) == (30, 44)


def test_damaged_exif_data_is_as_none(recwarn):
    data = encoded(PICTURE, "PNG", exif=b"Exif\0\0no TIFF")
    assert np.array_equal(decode(data), PIXELS)
    assert size_of(data) == (30, 44)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_it_is_the_first_or_the_one_that_was_sought(kind):
    frames = [Image.new("RGB", (8, 8), (80 * number, 0, 0)) for number in range(3)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert decode(data).getpixel((0, 0)) == (0, 0, 0)
    image = opened(data)
    assert decode(image).getpixel((0, 0)) == (0, 0, 0)
    image.seek(2)
    assert decode(image).getpixel((0, 0)) == (160, 0, 0)


def test_threads_may_share_an_image_that_is_open_and_not_read(tmp_path):
    noise(900, 900).save(tmp_path / "photo.png")
    for _ in range(5):
        image = Image.open(tmp_path / "photo.png")
        found, threads = [], []
        start = threading.Barrier(4)

        def read(image=image, found=found, start=start):
            start.wait()
            found.append(decode(image).tobytes())

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [noise(900, 900).tobytes()] * 4


class Served(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        found = self.path == "/photo.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(DATA if found else b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = HTTPServer(("127.0.0.1", 0), Served)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    thread.join()
    served.server_close()


def test_urls(server):
    url = f"{server}/photo.png"
    for given in (url, {"type": "image", "url": url}, {"image_url": {"url": url}}):
        assert np.array_equal(decode(given), PIXELS)
    with pytest.raises(
        PictureError, match="reading http.*missing.png as an image failed: HTTPS.*404"
    ):
        decode(f"{server}/missing.png")
    with pytest.raises(PictureError, match=r"of at most 100 bytes, got http://127.*photo.png of"):
        decode(url, limits=PictureLimits(max_bytes=100))


def test_one_image_or_several():
    def one(images) -> int:
        return len(list(as_images(images)))

    for single in (
        PICTURE,
        DATA,
        "a.png",
        Path("a.png"),
        {"path": "a"},
        io.BytesIO(),
        PIXELS,
        None,
    ):
        assert one(single) == 1
    assert one([PICTURE, "a.png"]) == one(np.stack([PIXELS, PIXELS])) == 2
    assert one(image for image in (PICTURE, PICTURE, PICTURE)) == 3
    assert one([]) == 0
    with pytest.raises(
        PictureError, match=r"at least one image, got an array of shape \[0, 4, 4, 3\]"
    ):
        as_images(np.zeros((0, 4, 4, 3)))
    found = list(decode_each(torch.from_numpy(np.stack([PIXELS, PIXELS]))))
    assert [np.array_equal(each, PIXELS) for each in found] == [True, True]
    read = decode_each(iter([DATA, None]))
    assert np.array_equal(next(read), PIXELS)
    with pytest.raises(PictureError, match="^image 2: expected an image .*, got None"):
        next(read)
    with pytest.raises(PictureError, match="^image 3 of 5: expected an image, got nowhere.png"):
        list(decode_each([DATA, DATA, "nowhere.png", DATA, None]))


def test_a_mapping_that_holds_itself():
    given: dict = {}
    given["image"] = given
    with pytest.raises(PictureError, match="expected a mapping with bytes, image"):
        decode(given)


def test_a_ground_of_numpys():
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert decode(clear, ground=np.array([1, 2, 3])).getpixel((0, 0)) == (1, 2, 3)

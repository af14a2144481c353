"""Tests of MaskLayout.plot: it writes a PNG with every kind of token, and never a dense mask."""

from __future__ import annotations

import sys

import pytest

from tests.voco_kernels.cases import CASES, Case, image
from voco_kernels import MaskLayout
from voco_kernels.layout.plot import _COLOURS, _HIDDEN, PADDING, TEXT, VISION, VOCO

image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra bench has it")


def colours(path) -> dict[str, int]:
    """The number of pixels of each color that is used for areas."""
    picture = image_module.open(path)
    assert picture.format == "PNG" and min(picture.size) > 800
    counts = picture.convert("RGB").getcolors(1 << 24)
    return {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in counts if count > 200}


@pytest.mark.parametrize("name", ["one token", "5 isolated tiles", "padded left", "documents"])
def test_draws_all_kinds_of_layouts(name, tmp_path):
    layout = CASES[name].layout()
    for row in range(layout.batch):
        layout.plot(tmp_path / "mask.png", row)
        assert _COLOURS[TEXT] in colours(tmp_path / "mask.png")


def test_one_voco_token_among_576_can_be_seen(tmp_path):
    MaskLayout.from_lengths(576, 1, 114).plot(str(tmp_path / "mask"))  # a PNG by any name
    seen = colours(tmp_path / "mask")
    assert {_COLOURS[VISION], _COLOURS[VOCO], _COLOURS[TEXT], _HIDDEN} <= set(seen)
    assert seen[_COLOURS[VOCO]] > 4000
    assert _COLOURS[PADDING] not in seen


def test_64_images_can_be_seen(tmp_path):
    """39,000 tokens, whose dense mask would take 1.5 GB."""
    MaskLayout.from_spans([[*image(576, 1) * 64, ("text", 2048)]]).plot(tmp_path / "mask.png")
    seen = colours(tmp_path / "mask.png")
    assert {_COLOURS[VISION], _COLOURS[VOCO], _COLOURS[TEXT], _HIDDEN} <= set(seen)


def test_shows_padding(tmp_path):
    Case([[image(9, 1, 5)], [[("text", 4)]]]).layout().plot(tmp_path / "mask.png", row=1)
    assert {_COLOURS[TEXT], _COLOURS[PADDING]} <= set(colours(tmp_path / "mask.png"))


@pytest.mark.parametrize("row", [-1, 2])
def test_no_such_row(row, tmp_path):
    layout = MaskLayout.from_lengths(9, 1, 5, batch=2)
    with pytest.raises(IndexError, match=f"expected a row from 0 to 1, got {row}"):
        layout.plot(tmp_path / "mask.png", row)
    assert not list(tmp_path.iterdir())


def test_names_the_extra_when_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'voco-kernels\[bench\]'"):
        MaskLayout.from_lengths(9, 1, 5).plot(tmp_path / "mask.png")

"""Pictures and pages: what is in them, where it is, and how much of it."""

from __future__ import annotations

import base64
import io
import re
import sys
import warnings

import pytest
import torch
from PIL import Image

from voco_model import explain
from voco_model.explain import drawing

pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra bench has it")


def explanation(layers: int = 2, num_voco: int = 2, text: int = 6) -> explain.Explanation:
    """Random weights that sum to 1, tokens that a careless label would trip over."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).add(0.01)

    image, context = rows(layers, num_voco, 4, 4), rows(layers, num_voco, 2)
    own, tiles = rows(layers, num_voco, num_voco), torch.zeros(layers, num_voco)
    total = image.sum((2, 3)) + context.sum(2) + own.sum(2)
    taken = rows(layers, text, num_voco) / (2 * num_voco)
    return explain.Explanation(
        picture=torch.randint(0, 256, (48, 48, 3), generator=generator).byte(),
        voco_over_image=image / total[..., None, None],
        voco_over_tiles=tiles,
        voco_over_context=context / total[..., None],
        voco_over_voco=own / total[..., None],
        text_over_voco=taken,
        text_over_text=1 - taken.sum(2),
        context_tokens=("<s>", "\n"),
        text_tokens=tuple(["\n", " $x_{$", "", "$", *["word"] * text][:text]),
        answer_start=text - 2,
        question="What do $5 & <b>$6</b> buy?",
        answer="$x_{$",
    )


@pytest.mark.parametrize("layers, num_voco, text", [(2, 2, 6), (11, 1, 60), (1, 19, 3)])
def test_a_png_has_a_map_for_each_token_and_layer_shown(layers, num_voco, text, tmp_path):
    shown = explanation(layers, num_voco, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain.draw(shown, tmp_path / "out.png")
        figure = drawing._overview(shown)
    image = Image.open(tmp_path / "out.png")
    assert image.format == "PNG" and min(image.size) > 800
    maps = [axes for axes in figure.axes if axes.get_xlabel().endswith("%")]
    assert len(maps) == min(num_voco, 8) * (1 + min(layers, 8))
    total = shown.voco_over_image[:, 0].sum() / layers
    assert maps[0].get_title() == "mean of layers"
    assert maps[0].get_xlabel().startswith(f"{total:.0%}, peak ")
    labels = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
    assert ("word" in labels) == (text > 4) and labels.count("word") == min(max(text - 4, 0), 48)


def test_the_overlay_is_brightest_on_the_hottest_patch():
    """On the patch itself, not on its mirror image."""
    heat = torch.full((2, 4), 0.01)
    heat[1, 2] = 0.5
    overlay = drawing._overlay(torch.full((20, 40, 3), 255, dtype=torch.uint8), heat)
    bright = overlay.mean(-1) > 0.8
    assert bright[10:, 20:30].all() and bright.sum() == 100


def test_an_html_file_has_a_section_for_each_layer_and_needs_no_other(tmp_path):
    shown = explanation(layers=3, num_voco=10)
    explain.draw(shown, str(tmp_path / "out.html"))
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Overview", "Layer 0", "Layer 1", "Layer 2"]
    assert len(pictures) == 4 and page.count("src=") == 4
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()
    assert "<script" not in page and "http" not in page
    assert "What do $5 &amp; &lt;b&gt;$6&lt;/b&gt; buy?" in page and "<b>" not in page
    maps = [axes for axes in drawing._of_layer(shown, 1).axes if axes.get_xlabel().endswith("%")]
    assert [axes.get_title() for axes in maps] == [f"VoCo {token}" for token in range(10)]
    assert f"peak {shown.voco_over_image[1, 9].max():.1%}" in maps[9].get_xlabel()


def test_shares_by_layer_are_stacked_to_one():
    shown = explanation(layers=3)
    figure = drawing._overview(shown)
    for title, first in (
        ("of the VoCo tokens", shown.voco_over_image.sum((2, 3)).mean(1)),
        ("of the tokens that wrote the answer", shown.text_over_voco[:, 3:].sum(2).mean(1)),
    ):
        (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
        stacks = [[bar.get_height() for bar in stack] for stack in axes.containers]
        assert stacks[0] == pytest.approx(first.tolist(), abs=1e-6)
        assert torch.tensor(stacks).sum(0).tolist() == pytest.approx([1.0] * 3, abs=1e-6)


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"expected a file ending in .png or .html, got .*out.svg"):
        explain.draw(explanation(), tmp_path / "out.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'voco-kernels\[bench\]'"):
        explain.draw(explanation(), tmp_path / "out.png")
    assert not list(tmp_path.iterdir())

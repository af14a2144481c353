"""``draw``: an ``Explanation`` as a picture, or as an HTML page with a section per layer."""

from __future__ import annotations

import base64
import io
from html import escape
from os import PathLike
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from voco_model.explain.compute import Explanation
from voco_model.explain.output import check_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_MOST_LAYERS = 8  # columns of maps in the overview, beside the mean
_MOST_VOCO = 8  # rows of maps in the overview; maps side by side in a layer's section
_MOST_TEXT = 48  # tokens of text in a figure, the last ones
# Inches: a section's title, a map, the space left of maps, between maps, and around each for titles.
_TITLE, _MAP, _LEFT, _GAP, _AROUND = 0.4, 1.25, 0.8, 0.1, 0.5
_ABOVE_TEXT = 1.15  # to the upper edge of its heat map
_NARROWEST = 10.5
_DPI = 110
_DIMMED = 0.4  # the picture's brightness under a map
_HEAT = "inferno"
# Colours of what attention goes to, distinguishable when colour-blind (Okabe and Ito).
_IMAGE, _TILES, _CONTEXT, _VOCO, _TEXT = "#56b4e9", "#0072b2", "#c8c8c8", "#d55e00", "#009e73"


class _Map(NamedTuple):
    title: str
    heat: Tensor  # [rows, columns], shares of attention


def draw(explanation: Explanation, path: str | PathLike) -> None:
    """Write an explanation to a file.

    A ``.png`` has the overview: up to 8 VoCo tokens and 8 layers, evenly chosen, and the last 48 tokens
    of the text. An ``.html`` has the overview, then each layer with all VoCo tokens, in one file.

    Raises:
        ValueError: another suffix, or no such folder.
        ImportError: matplotlib is not installed.
    """
    suffix = check_path(path)
    overview = _png(_overview(explanation))
    if suffix == ".png":
        Path(path).write_bytes(overview)
        return
    layers = [_png(_of_layer(explanation, layer)) for layer in range(explanation.num_layers)]
    Path(path).write_text(_page(explanation, overview, layers), encoding="utf-8")


def _page(explanation: Explanation, overview: bytes, layers: list[bytes]) -> str:
    def figure(name: str, png: bytes) -> str:
        data = base64.b64encode(png).decode()
        return f'<h2>{name}</h2>\n<img alt="{name}" src="data:image/png;base64,{data}">'

    title = escape(explanation.question)
    sections = [figure("Overview", overview)]
    sections += [figure(f"Layer {number}", png) for number, png in enumerate(layers)]
    body = "\n".join(sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        "<style>body { font-family: sans-serif; margin: 2em; } img { max-width: 100%; }</style>\n"
        f"</head>\n<body>\n<h1>{title}</h1>\n<p>{escape(explanation.answer)}</p>\n{body}\n"
        "</body>\n</html>\n"
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _overview(explanation: Explanation) -> Figure:
    layers = _spread(explanation.num_layers, _MOST_LAYERS)
    voco = _spread(explanation.num_voco, _MOST_VOCO)
    over_image = explanation.voco_over_image
    lines = [
        [
            _Map("mean of layers", over_image[:, token].mean(0)),
            *(_Map(f"layer {layer}", over_image[layer, token]) for layer in layers),
        ]
        for token in voco
    ]
    chosen = ""
    if len(voco) < explanation.num_voco:
        chosen = f", {len(voco)} of {explanation.num_voco}"
    heights = [1.9, _maps_height(lines), _text_height(explanation), 2.9]
    figure, (head, maps, text, shares) = _figure(1 + len(layers), heights)
    _draw_head(head, explanation)
    _draw_title(maps, f"What each VoCo token looked at{chosen}")
    _draw_maps(maps, explanation, lines, [f"VoCo {token}" for token in voco])
    _draw_text(text, explanation, explanation.text_over_voco.mean(0), "mean of layers")
    _draw_shares(shares, explanation)
    return figure


def _of_layer(explanation: Explanation, layer: int) -> Figure:
    maps = [
        _Map(f"VoCo {token}", heat) for token, heat in enumerate(explanation.voco_over_image[layer])
    ]
    lines = [maps[start : start + _MOST_VOCO] for start in range(0, len(maps), _MOST_VOCO)]
    heights = [_maps_height(lines), _text_height(explanation)]
    figure, (above, text) = _figure(len(lines[0]), heights)
    _draw_title(above, f"What each VoCo token looked at in layer {layer}")
    _draw_maps(above, explanation, lines, [""] * len(lines))
    _draw_text(text, explanation, explanation.text_over_voco[layer], f"layer {layer}")
    return figure


def _spread(count: int, most: int) -> list[int]:
    """All numbers below ``count``, or ``most`` of them spread evenly, including first and last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _figure(columns: int, heights: list[float]) -> tuple[Figure, list[SubFigure]]:
    """A figure of stacked parts with these heights in inches, wide enough for ``columns`` maps."""
    from matplotlib.figure import Figure

    width = max(_LEFT + columns * (_MAP + _GAP), _NARROWEST)
    figure = Figure(figsize=(width, sum(heights)), dpi=_DPI)
    return figure, list(figure.subfigures(len(heights), 1, height_ratios=heights))


def _maps_height(lines: list[list[_Map]]) -> float:
    return _TITLE + len(lines) * (_MAP + _AROUND)


def _text_height(explanation: Explanation) -> float:
    return _ABOVE_TEXT + min(0.3 + 0.2 * explanation.num_voco, 4.0) + _below_text(explanation)


def _below_text(explanation: Explanation) -> float:
    """Height of the token labels, which are written vertically."""
    return 0.6 + 0.08 * max(map(len, map(_visible, explanation.text_tokens[-_MOST_TEXT:])))


def _axes(figure: SubFigure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a position in inches from the upper left corner."""
    total_width, total_height = _inches(figure)
    bottom = 1 - (top + height) / total_height
    return figure.add_axes((left / total_width, bottom, width / total_width, height / total_height))


def _inches(figure: SubFigure) -> tuple[float, float]:
    return figure.bbox.width / figure.figure.dpi, figure.bbox.height / figure.figure.dpi


def _draw_title(figure: SubFigure, title: str) -> None:
    _, height = _inches(figure)
    figure.text(0.012, 1 - 0.1 / height, title, fontsize=11, weight="bold", va="top")


def _draw_head(figure: SubFigure, explanation: Explanation) -> None:
    axes = _axes(figure, 0.15, 0.15, 1.6, 1.6)
    axes.imshow(explanation.picture.numpy())
    axes.set_axis_off()
    width, height = _inches(figure)
    room = int((width - 2) * 12.5)
    words = (
        f"Question: {explanation.question}",
        f"Answer: {explanation.answer or '(none)'}",
        "Attention is the mean over heads. Each map is brightest at its own peak; below it, how much of "
        "the VoCo token's attention the map has, and its peak. Layers and tokens count from 0. Where a "
        "model looks is neither what it knows nor why it answers.",
    )
    written = "\n".join(fill(text, room, max_lines=3) for text in words)
    figure.text(
        1.95 / width, 1 - 0.2 / height, written, va="top", fontsize=10, linespacing=1.4,
        parse_math=False,
    )  # fmt: skip


def _draw_maps(
    figure: SubFigure, explanation: Explanation, lines: list[list[_Map]], labels: list[str]
) -> None:
    """Draw lines of maps over the picture, each line after its label."""
    for row, (line, label) in enumerate(zip(lines, labels, strict=True)):
        for column, (title, heat) in enumerate(line):
            left, top = column * (_MAP + _GAP), row * (_MAP + _AROUND)
            axes = _axes(figure, _LEFT + left, _TITLE + 0.2 + top, _MAP, _MAP)
            axes.imshow(_overlay(explanation.picture, heat), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(title, fontsize=8.5, pad=3)
            axes.set_xlabel(f"{heat.sum():.0%}, peak {heat.max():.1%}", fontsize=7.5, labelpad=2)
            if column == 0 and label:
                axes.set_ylabel(label, fontsize=10, rotation=0, ha="right", va="center")


def _overlay(picture: Tensor, heat: Tensor) -> np.ndarray:
    """float ``[height, width, 3]``: the picture dimmed and grey, with the heat map in colour."""
    from matplotlib import colormaps

    height, width, _ = picture.shape
    rows, columns = heat.shape
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    strength = (heat / heat.max().clamp(min=1e-30)).numpy()[y][:, x, None]
    grey = picture.numpy().mean(-1, keepdims=True) / 255 * _DIMMED
    return grey * (1 - strength) + colormaps[_HEAT](strength[..., 0])[..., :3] * strength


def _draw_text(figure: SubFigure, explanation: Explanation, taken: Tensor, where: str) -> None:
    """Draw attention of text to VoCo tokens, ``taken`` ``[T, n]``, and its sums above."""
    start = max(len(explanation.text_tokens) - _MOST_TEXT, 0)
    taken = taken[start:]
    count, num_voco = taken.shape
    chosen = f", its last {count} tokens of {start + count}" if start else ""
    _draw_title(figure, f"What the text took from VoCo tokens, {where}{chosen}")
    width, height = _inches(figure)
    right = 1.1
    across, down = width - _LEFT - right, height - _ABOVE_TEXT - _below_text(explanation)
    sums = _axes(figure, _LEFT, 0.5, across, 0.55)
    heat = _axes(figure, _LEFT, _ABOVE_TEXT, across, down)

    sums.bar(range(count), taken.sum(1).numpy(), color=_VOCO, width=0.8)
    sums.set_xlim(-0.5, count - 0.5)
    sums.set_ylim(bottom=0)
    sums.set_xticks([])
    sums.locator_params(axis="y", nbins=3)
    sums.tick_params(labelsize=8)
    sums.set_ylabel("all", fontsize=9, rotation=0, ha="right", va="center", labelpad=12)
    sums.spines[["top", "right"]].set_visible(False)

    shown = heat.imshow(taken.T.numpy(), aspect="auto", cmap="Reds", vmin=0)
    tokens = _spread(num_voco, 16)
    heat.set_yticks(tokens, [f"VoCo {token}" for token in tokens], fontsize=8)
    heat.set_xticks(range(count), map(_visible, explanation.text_tokens[start:]), fontsize=8)
    answer = explanation.answer_start - start
    for position, label in enumerate(heat.get_xticklabels()):
        label.set(rotation=90, parse_math=False)
        if position >= answer:
            label.set(weight="bold", color=_VOCO)
    heat.set_xlabel("tokens of the text; the answer in bold", fontsize=8.5)
    for axes in (sums, heat):
        axes.axvline(answer - 0.5, color="black", linewidth=0.8)
    bar = figure.colorbar(shown, cax=_axes(figure, width - right + 0.15, _ABOVE_TEXT, 0.15, down))
    bar.set_label("attention", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.ax.locator_params(axis="y", nbins=4)


def _visible(token: str) -> str:
    for blank, sign in ((" ", "␣"), ("\n", "↵"), ("\t", "⇥")):
        token = token.replace(blank, sign)
    return token or "(nothing)"


def _draw_shares(figure: SubFigure, explanation: Explanation) -> None:
    """Draw stacked bars by layer, for the VoCo tokens and for the tokens that predict the answer."""
    _draw_title(figure, "Where attention went, by layer")
    writers = slice(explanation.answer_start - 1, None)
    by_voco = [
        ("image", _IMAGE, explanation.voco_over_image.flatten(2).sum(2)),
        ("other tiles", _TILES, explanation.voco_over_tiles),
        (_named_context(explanation), _CONTEXT, explanation.voco_over_context.sum(2)),
        ("VoCo tokens", _VOCO, explanation.voco_over_voco.sum(2)),
    ]
    by_writers = [
        ("VoCo tokens", _VOCO, explanation.text_over_voco[:, writers].sum(2)),
        ("text", _TEXT, explanation.text_over_text[:, writers]),
    ]
    if not explanation.voco_over_tiles.any():
        del by_voco[1]
    width, height = _inches(figure)
    across = width / 2 - 1.05
    for left, title, stacks in (
        (0.6, "of the VoCo tokens", by_voco),
        (0.6 + width / 2, "of the tokens that wrote the answer", by_writers),
    ):
        axes = _axes(figure, left, 0.7, across, height - 1.6)
        bottom = np.zeros(explanation.num_layers)
        for name, colour, shares in stacks:
            share = shares.mean(1).double().numpy()
            axes.bar(
                range(explanation.num_layers), share, bottom=bottom, color=colour, width=0.85,
                label=name,
            )  # fmt: skip
            bottom += share
        axes.set_title(title, fontsize=9.5, pad=4)
        axes.set_xticks(_spread(explanation.num_layers, 16))
        axes.set_xlabel("layer", fontsize=8.5, labelpad=1)
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        legend = axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, frameon=False, fontsize=8.5
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _named_context(explanation: Explanation) -> str:
    tokens = " ".join(map(_visible, explanation.context_tokens))
    return f"before: {tokens}" if len(tokens) <= 16 else "other tokens before"

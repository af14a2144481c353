"""Plots of one row's mask: a row per query, a column per key, colored by kind of key."""

from __future__ import annotations

from itertools import groupby
from os import PathLike
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from voco_kernels.layout.describe import PADDING, TEXT, VISION, VOCO, describe_row, token_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {VISION: "vision", VOCO: "VoCo", TEXT: "text", PADDING: "padding"}
# Okabe and Ito's palette, distinguishable with color blindness.
_COLOURS = {VISION: "#56b4e9", VOCO: "#d55e00", TEXT: "#009e73", PADDING: "#c8c8c8"}
_HIDDEN, _STRIPES, _UNSEEN = "#f6f1e4", "#e3d9bf", "#ffffff"
_PIXELS = 1200  # per side of the mask
_STRIPE_PERIOD = 28  # pixels
_NARROWEST = 0.035  # least share of an axis that a band takes, if there is room for all
_MOST_LABELS = 26  # with more bands on an axis, none is labelled and only the title describes them


class _Band(NamedTuple):
    """Adjacent tokens of one kind and document, and their place on an axis of length 1."""

    kind: int
    start: int
    stop: int
    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def label(self) -> str:
        return f"{_LABELS[self.kind]} {self.stop - self.start}"


def plot_row(visible_from: Tensor, visible_until: Tensor, path: str | PathLike) -> None:
    """Write a PNG of one row's mask to ``path``; ``visible_from`` and ``visible_until`` are ``[S]``.

    Short bands of tokens are drawn wider than to scale, so that one VoCo token next to 576 vision
    tokens can be seen. Their labels give the true numbers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "MaskLayout.plot needs matplotlib: pip install 'voco-kernels[bench]'"
        ) from error
    kinds, document_stop = (each.numpy() for each in token_kinds(visible_from, visible_until))
    bands = _bands(kinds, document_stop)
    # In inches: the mask is a square of 7.4, surrounded by its strips and labels.
    width, height = 9.4, 10.4
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_axes((1.75 / width, 1.35 / height, 7.4 / width, 7.4 / height))
    shown = _draw_mask(
        axes, visible_from.cpu().numpy(), visible_until.cpu().numpy(), kinds, document_stop, bands
    )
    _draw_strips(axes, bands)
    _draw_legend(axes, shown)
    figure.suptitle(
        fill(describe_row(visible_from, visible_until), 84), fontsize=12, y=0.985, va="top"
    )
    figure.savefig(path, format="png")


def _bands(kinds: np.ndarray, document_stop: np.ndarray) -> list[_Band]:
    tokens = zip(kinds.tolist(), document_stop.tolist(), strict=True)
    runs = [(kind, len(list(run))) for (kind, _), run in groupby(tokens)]
    lengths = np.array([length for _, length in runs])
    widths = np.maximum(lengths / lengths.sum(), min(_NARROWEST, 0.5 / len(runs)))
    edges = np.concatenate([[0], np.cumsum(widths / widths.sum())])
    stops = np.cumsum(lengths)
    return [
        _Band(kind, stop - length, stop, edges[index], edges[index + 1])
        for index, ((kind, length), stop) in enumerate(zip(runs, stops.tolist(), strict=True))
    ]


def _draw_mask(
    axes: Axes,
    visible_from: np.ndarray,
    visible_until: np.ndarray,
    kinds: np.ndarray,
    document_stop: np.ndarray,
    bands: list[_Band],
) -> dict[str, str]:
    """Draw the mask, sampled at pixels, and return the legend: colors by label."""
    from matplotlib.colors import to_rgb

    token = _tokens_at_pixels(bands)
    query, key = token[:, None], token[None, :]
    causal = key <= query
    visible = causal & (visible_from[query] <= key) & (query < visible_until[key])
    hidden = causal & ~visible & (document_stop[query] == document_stop[key])
    padding = (kinds[query] == PADDING) | (kinds[key] == PADDING)
    hidden &= ~padding

    image = np.full((_PIXELS, _PIXELS, 3), to_rgb(_UNSEEN))
    pixel = np.arange(_PIXELS)
    striped = (pixel[:, None] + pixel[None, :]) % _STRIPE_PERIOD < _STRIPE_PERIOD // 3
    image[hidden] = to_rgb(_HIDDEN)
    image[hidden & striped] = to_rgb(_STRIPES)
    image[padding] = to_rgb(_COLOURS[PADDING])
    shown = {}
    for kind in (VISION, VOCO, TEXT):
        of_kind = visible & (kinds[key] == kind)
        image[of_kind] = to_rgb(_COLOURS[kind])
        if of_kind.any():
            shown[f"{_LABELS[kind]} key, visible"] = _COLOURS[kind]
    axes.imshow(image, extent=(0, 1, 1, 0), interpolation="nearest", aspect="equal")

    if hidden.any():
        shown["hidden: never computed"] = _HIDDEN
        _label_largest_hidden_block(axes, bands, visible_until, document_stop)
    if padding.any():
        shown["padding: sees nothing, seen by nothing"] = _COLOURS[PADDING]
    if (~causal).any():
        others = len(set(document_stop.tolist()) - {0}) > 1
        shown["a later token, or another document" if others else "a later token"] = _UNSEEN
    return shown


def _tokens_at_pixels(bands: list[_Band]) -> np.ndarray:
    """int64 ``[_PIXELS]``: the token under each pixel of an axis."""
    pixel = (np.arange(_PIXELS) + 0.5) / _PIXELS
    which = np.searchsorted([band.high for band in bands[:-1]], pixel)
    start, stop, low, high = np.array([band[1:] for band in bands])[which].T
    offset = (pixel - low) / (high - low) * (stop - start)
    return np.clip(start + offset, start, stop - 1).astype(np.int64)


def _label_largest_hidden_block(
    axes: Axes, bands: list[_Band], visible_until: np.ndarray, document_stop: np.ndarray
) -> None:
    def block(key_band: _Band) -> tuple[float, float, float, float]:
        """Area, center x and y, and width of the block that these keys hide from later queries."""
        inside = [
            band
            for band in bands
            if visible_until[key_band.start] <= band.start < document_stop[key_band.start]
        ]
        top, bottom = min(b.low for b in inside), max(b.high for b in inside)
        width = key_band.high - key_band.low
        return width * (bottom - top), key_band.middle, (top + bottom) / 2, width

    blocks = [block(band) for band in bands if band.kind == VISION]
    area, x, y, width = max(blocks, default=(0, 0, 0, 0))
    if width > 0.28 and area / width > 0.04:
        axes.text(
            x, y, "hidden: never computed", ha="center", va="center", fontsize=13,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 3},
        )  # fmt: skip


def _draw_strips(axes: Axes, bands: list[_Band]) -> None:
    """Draw strips along both axes with the tokens' kinds and counts, and lines where they change."""
    from matplotlib.patches import Rectangle

    near, far = -0.034, -0.008  # next to the mask, which spans 0 to 1 on both axes
    few = len(bands) <= _MOST_LABELS
    for band in bands:
        length, colour = band.high - band.low, _COLOURS[band.kind]
        for corner, width, height in (
            ((band.low, near), length, far - near),
            ((near, band.low), far - near, length),
        ):
            axes.add_patch(
                Rectangle(
                    corner, width, height, facecolor=colour, clip_on=False,
                    edgecolor="white", linewidth=0.8 if few else 0,
                )
            )  # fmt: skip
        if not few:
            continue
        upright = length > 0.014 * len(band.label)
        axes.text(
            band.middle, near - 0.01, band.label, fontsize=10,
            ha="center", va="bottom", rotation=0 if upright else 90,
        )  # fmt: skip
        axes.text(near - 0.01, band.middle, band.label, ha="right", va="center", fontsize=10)
        if band.start:
            axes.plot([band.low, band.low], [0, 1], color="white", linewidth=0.8)
            axes.plot([0, 1], [band.low, band.low], color="white", linewidth=0.8)
    ends = [(band.low, band.start) for band in bands] + [(1.0, bands[-1].stop)]
    ends = ends if few else [ends[0], ends[-1]]
    axes.set_xticks(
        [place for place, _ in ends], [str(position) for _, position in ends], rotation=90
    )
    axes.set_yticks([])
    axes.set_xlabel("keys: the tokens looked at")
    axes.text(
        -0.215 if few else -0.07, 0.5, "queries: the tokens that look",
        rotation=90, ha="center", va="center",
    )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)


def _draw_legend(axes: Axes, shown: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(
            facecolor=colour,
            edgecolor=_STRIPES if colour == _HIDDEN else "#888888",
            hatch="////" if colour == _HIDDEN else None,
            label=label,
        )
        for label, colour in shown.items()
    ]
    axes.legend(
        handles=patches, loc="upper center", bbox_to_anchor=(0.42, -0.105), ncols=3, frameon=False
    )

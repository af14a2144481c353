"""The plots of bench/attn.py: useful TFLOP/s by shape and implementation, and under the roofline."""

from __future__ import annotations

from pathlib import Path

from bench.attention.questions import (
    DIRECTIONS,
    best_pieces,
    cases_of,
    intensity,
    our_row,
    panels_of,
    roof,
)
from bench.harness import figure
from bench.harness.records import is_on_gpu, timed

COLOURS = {
    "sdpa-two-call": "#1f4e79",
    "fa2-two-call": "#1f4e79",
    "cudnn-two-call": "#117a65",
    "fa2-varlen": "#5dade2",
    "flash-attn2-two-call": "#2e86c1",
    "flash-attn2-varlen": "#a9cce3",
    "flash-attn3-two-call": "#21618c",
    "flash-attn3-varlen": "#7fb3d5",
    "flash-attn4-two-call": "#154360",
    "flash-attn4-varlen": "#5499c7",
    "flex": "#8e44ad",
    "sdpa-dense": "#d4ac0d",
    "sdpa-causal": "#b2babb",
}
OTHER_COLOUR = "#566573"


def plot_attention(record: dict, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG: a panel for each direction and heads, a group of bars a shape.

    Ours are red. Rivals that are kernels alone are hatched; a grey bar is not this mask. A bar that is
    missing was not measured.

    Raises:
        ValueError: the record has no cases.
    """
    panels = panels_of(record)
    if not panels:
        raise ValueError("expected a record with cases to plot, got none")
    looks = _looks(record)
    unit, factor = ("TFLOP/s", 1.0) if is_on_gpu(record) else ("GFLOP/s", 1e3)
    drawn, axes = figure.panels(len(panels), columns=1, height=3.1)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, cases_of(record, panel), looks, factor)
        axis.set_title(f"{panel[0]}, heads {panel[1]}/{panel[2]}", loc="left", fontsize=10)
        axis.set_ylabel(f"useful {unit}")
    from matplotlib.patches import Rectangle

    handles = [Rectangle((0, 0), 1, 1, **look) for look in looks.values()]
    floor = "sdpa-causal"
    labels = [f"{name} (not this mask)" if name == floor else name for name in looks]
    figure.legend(drawn, handles, labels, title="implementation")
    figure.save(drawn, record, _subject(record), path, metadata)


def _subject(record: dict) -> str:
    settings = record["settings"]
    return f"{settings['dtype']}, {settings['size']} shapes (vision, VoCo, text x batch), medians"


ROOFLINE_LOOKS = {
    "ours": {"color": figure.OURS[0], "marker": "o", "s": 46, "zorder": 4},
    "drop-in": {"color": "#117a65", "marker": "_", "s": 110, "lw": 2.2, "zorder": 3},
    "kernels alone": {
        "facecolors": "white",
        "edgecolors": "#1f4e79",
        "marker": "D",
        "s": 22,
        "zorder": 3,
    },
}


def plot_roofline(record: dict, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG: for each direction and heads, every shape at its intensity, under the roof that
    the copy and the matrix product of the same run allow; above it, the share of the roof that ours
    reaches.

    Raises:
        ValueError: the record has no cases, or no ceilings.
    """
    if not record["cases"] or not record["ceilings"]:
        raise ValueError("expected a record with cases and ceilings to plot, got none")
    panels = panels_of(record)
    columns = -(-len(panels) // len({panel[0] for panel in panels}))
    drawn, axes = figure.panels(len(panels), columns=columns, height=4.4, sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_roofline(axis, record, cases_of(record, panel))
        axis.set_title(f"{panel[0]}, heads {panel[1]}/{panel[2]}", loc="left", fontsize=10)
    for axis in axes[::columns]:
        axis.set_ylabel("useful TFLOP/s")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.save(drawn, record, _subject(record), path, metadata)


def _draw_roofline(axis, record: dict, cases: list[dict]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    ceilings = record["ceilings"]
    peak, bandwidth = ceilings["matmul_tflops"], ceilings["copy_tb_per_s"]
    ridge = peak / bandwidth
    intensities = [intensity(case) for case in cases]
    low, high = min(*intensities, ridge) / 1.3, max(*intensities, ridge) * 1.3
    axis.loglog(
        [low, ridge, high],
        [low * bandwidth, peak, peak],
        color="black",
        lw=1.4,
        label=f"measured in the same run: copy {bandwidth:.2f} TB/s, matrix product {peak:.0f} TFLOP/s",
    )
    names = dict.fromkeys(row["name"] for case in cases if (row := our_row(case)))
    labels = {
        "ours": ", ".join(names),
        "drop-in": "fastest causal pieces, drop-in",
        "kernels alone": "fastest causal pieces, kernels alone",
    }
    for kind, label in labels.items():
        axis.scatter([], [], label=label, **ROOFLINE_LOOKS[kind])
    for case, x in zip(cases, intensities, strict=True):
        found = {
            "ours": our_row(case),
            "drop-in": best_pieces(case, drop_in=True),
            "kernels alone": best_pieces(case, drop_in=False),
        }
        limit = roof(record, case)
        for kind, row in found.items():
            if row is not None:
                axis.scatter(x, row["tflops"], **ROOFLINE_LOOKS[kind])
        own = found["ours"]
        share = "not measured" if own is None else f"{100 * own['tflops'] / limit:.0f}%"
        axis.annotate(
            f"{case['shape']}  {share}",
            (x, limit),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=90,
            fontsize=9,
            color=figure.OURS[0],
        )
        if own is not None:
            axis.plot([x, x], [own["tflops"], limit], color="#b2babb", lw=0.8, zorder=1)
    axis.set_xlim(low, high)
    axis.set_ylim(top=1.5 * peak)
    for sides, ticks in (
        (axis.xaxis, (50, 100, 200, 500, 1000, 2000)),
        (axis.yaxis, (50, 100, 200, 400, 800)),
    ):
        sides.set_major_locator(FixedLocator(ticks))
        sides.set_major_formatter("{x:.0f}")
        sides.set_minor_locator(NullLocator())
    gradients = "" if cases[0]["direction"] == DIRECTIONS[0] else " and their gradients"
    axis.set_xlabel(f"useful FLOPs a byte: q, k, v, out{gradients}, moved once each", fontsize=9)


def _looks(record: dict) -> dict[str, dict]:
    """Colour and hatch by name, in the order of the rows, for every name that was timed."""
    ours, rivals = [], []
    for case in record["cases"]:
        for row in timed(case):
            names = ours if row["ours"] else rivals
            if row["name"] not in names:
                names.append(row["name"])
    order = [row["name"] for case in record["cases"] for row in case["rows"]]
    rivals.sort(key=order.index)
    looks = {
        name: {"facecolor": figure.OURS[index % len(figure.OURS)], "edgecolor": "black", "lw": 0.6}
        for index, name in enumerate(ours)
    }
    for name in rivals:
        colour = COLOURS.get(name.removesuffix("-parts"), OTHER_COLOUR)
        apart = name.endswith("-parts")
        looks[name] = {
            "facecolor": "white" if apart else colour,
            "edgecolor": colour,
            "hatch": "////" if apart else None,
            "lw": 0.6,
        }
    return looks


def _draw_panel(axis, cases: list[dict], looks: dict[str, dict], factor: float) -> None:
    width = 0.84 / max(len(looks), 1)
    for position, case in enumerate(cases):
        for row in timed(case):
            slot = list(looks).index(row["name"])
            left = position - 0.42 + slot * width
            height = factor * row["tflops"]
            axis.bar(left, height, width, align="edge", **looks[row["name"]])
            if row is our_row(case):
                axis.annotate(
                    f"{height:.3g}",
                    (left + width / 2, height),
                    ha="center",
                    va="bottom",
                    fontsize=7,
                    fontweight="bold",
                )
    axis.set_xticks(range(len(cases)))
    axis.set_xticklabels([_wrapped(case) for case in cases], fontsize=8)
    axis.set_xlim(-0.5, max(len(cases) - 0.5, 0.5))
    axis.margins(y=0.12)
    axis.grid(visible=False, axis="x")


def _wrapped(case: dict) -> str:
    title = case["title"]
    for long, short in (
        ("packed: ", "packed\n"),
        (" isolated (", " isolated\n("),
        (", then ", "\nthen "),
    ):
        title = title.replace(long, short)
    return f"{case['shape']}\n{title}"

"""Pictures of a record: useful TFLOP/s by shape and implementation, and the same under the roofline;
the time of a load against its bytes."""

from __future__ import annotations

from pathlib import Path

from bench.harness import records

OUR_COLOURS = ("#c0392b", "#e08e79", "#f0c4b8")
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


def plot_attention(record: dict, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG: a panel for each direction and heads, a group of bars a shape.

    Ours are red. Kernels-alone rivals are hatched; a grey bar is not this mask. A bar that is
    missing was not measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(record)
    if not panels:
        raise ValueError("expected a record with cases to plot, got none")
    looks = _looks(record)
    on_gpu = record["environment"]["device"]["type"] == "cuda"
    unit, factor = ("TFLOP/s", 1.0) if on_gpu else ("GFLOP/s", 1e3)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(12, 0.6 + 3.1 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        cases = _cases_of(record, panel)
        _draw_panel(axis, cases, looks, factor)
        axis.set_title(f"{panel[0]}, heads {panel[1]}/{panel[2]}", loc="left", fontsize=10)
        axis.set_ylabel(f"useful {unit}")
    names = list(looks)
    handles = [pyplot.Rectangle((0, 0), 1, 1, **looks[name]) for name in names]
    floor = "sdpa-causal"
    labels = [f"{name} (not this mask)" if name == floor else name for name in names]
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        title="implementation",
    )
    figure.suptitle(_title(record), fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)


ROOFLINE_LOOKS = {
    "ours": {"color": OUR_COLOURS[0], "marker": "o", "s": 46, "zorder": 4},
    "drop-in": {"color": "#117a65", "marker": "_", "s": 110, "lw": 2.2, "zorder": 3},
    "kernels alone": {
        "facecolors": "white",
        "edgecolors": "#1f4e79",
        "marker": "D",
        "s": 22,
        "zorder": 3,
    },
}


def plot_roofline(record: dict, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG: for each direction and heads, every shape at its intensity, under what the copy
    and the matrix product of the same run allow; above it, the share of that which ours reaches.

    Raises:
        ValueError: the record has no cases, or no ceilings.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not record["cases"] or not record["ceilings"]:
        raise ValueError("expected a record with cases and ceilings to plot, got none")
    panels = _panels(record)
    rows = len({panel[0] for panel in panels})
    columns = -(-len(panels) // rows)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(12, 1 + 4.4 * rows),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_roofline(axis, record, _cases_of(record, panel))
        axis.set_title(f"{panel[0]}, heads {panel[1]}/{panel[2]}", loc="left", fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("useful TFLOP/s")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(_title(record), fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)


def _draw_roofline(axis, record: dict, cases: list[dict]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    ceilings = record["ceilings"]
    peak, bandwidth = ceilings["matmul_tflops"], ceilings["copy_tb_per_s"]
    ridge = peak / bandwidth
    intensities = [records.intensity(case) for case in cases]
    low, high = min(*intensities, ridge) / 1.3, max(*intensities, ridge) * 1.3
    axis.loglog(
        [low, ridge, high],
        [low * bandwidth, peak, peak],
        color="black",
        lw=1.4,
        label=f"measured in the same run: copy {bandwidth:.2f} TB/s, matrix product {peak:.0f} TFLOP/s",
    )
    names = dict.fromkeys(row["name"] for case in cases if (row := records.our_row(case)))
    labels = {
        "ours": ", ".join(names),
        "drop-in": "fastest causal pieces, drop-in",
        "kernels alone": "fastest causal pieces, kernels alone",
    }
    for kind, label in labels.items():
        axis.scatter([], [], label=label, **ROOFLINE_LOOKS[kind])
    for case, x in zip(cases, intensities, strict=True):
        found = {
            "ours": records.our_row(case),
            "drop-in": records.best_pieces(case, drop_in=True),
            "kernels alone": records.best_pieces(case, drop_in=False),
        }
        roof = records.roof(record, case)
        for kind, row in found.items():
            if row is not None:
                axis.scatter(x, row["tflops"], **ROOFLINE_LOOKS[kind])
        own = found["ours"]
        share = "not measured" if own is None else f"{100 * own['tflops'] / roof:.0f}%"
        axis.annotate(
            f"{case['shape']}  {share}",
            (x, roof),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=90,
            fontsize=9,
            color=OUR_COLOURS[0],
        )
        if own is not None:
            axis.plot([x, x], [own["tflops"], roof], color="#b2babb", lw=0.8, zorder=1)
    axis.set_xlim(low, high)
    axis.set_ylim(top=1.5 * peak)
    for sides, ticks in (
        (axis.xaxis, (50, 100, 200, 500, 1000, 2000)),
        (axis.yaxis, (50, 100, 200, 400, 800)),
    ):
        sides.set_major_locator(FixedLocator(ticks))
        sides.set_major_formatter("{x:.0f}")
        sides.set_minor_locator(NullLocator())
    gradients = "" if cases[0]["direction"] == records.DIRECTIONS[0] else " and their gradients"
    axis.set_xlabel(f"useful FLOPs a byte: q, k, v, out{gradients}, moved once each", fontsize=9)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _panels(record: dict) -> list[tuple[str, int, int]]:
    """Direction, heads and key/value heads of each panel, in their order."""
    return sorted(
        {(case["direction"], case["num_heads"], case["num_kv_heads"]) for case in record["cases"]},
        key=lambda panel: (records.DIRECTIONS.index(panel[0]), panel[1], -panel[2]),
    )


def _cases_of(record: dict, panel: tuple[str, int, int]) -> list[dict]:
    return [
        case
        for case in record["cases"]
        if (case["direction"], case["num_heads"], case["num_kv_heads"]) == panel
    ]


def _looks(record: dict) -> dict[str, dict]:
    """Colour and hatch by name, in the order of the rows, for every name that was ever timed."""
    ours, rivals = [], []
    for case in record["cases"]:
        for row in records.timed(case):
            names = ours if row["ours"] else rivals
            if row["name"] not in names:
                names.append(row["name"])
    order = [row["name"] for case in record["cases"] for row in case["rows"]]
    rivals.sort(key=order.index)
    looks = {
        name: {"facecolor": OUR_COLOURS[index % len(OUR_COLOURS)], "edgecolor": "black", "lw": 0.6}
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
        for row in records.timed(case):
            slot = list(looks).index(row["name"])
            left = position - 0.42 + slot * width
            height = factor * row["tflops"]
            axis.bar(left, height, width, align="edge", **looks[row["name"]])
            if row is records.our_row(case):
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
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _wrapped(case: dict) -> str:
    title = case["title"]
    for long, short in (
        ("packed: ", "packed\n"),
        (" isolated (", " isolated\n("),
        (", then ", "\nthen "),
    ):
        title = title.replace(long, short)
    return f"{case['shape']}\n{title}"


def _title(record: dict) -> str:
    environment, settings = record["environment"], record["settings"]
    versions = environment["versions"]
    return (
        f"{environment['device']['name']}, {settings['dtype']}, {settings['size']} shapes "
        f"(vision, VoCo, text x batch), medians; torch {versions['torch']}, "
        f"{environment['commit'][:12]}, {environment['date'][:10]}"
    )


KV_LOOKS = {
    "load_into": {"color": OUR_COLOURS[0], "marker": "o"},
    "launch": {"color": OUR_COLOURS[1], "marker": "o"},
    "KVStore.load_into": {"color": OUR_COLOURS[0], "marker": "o"},
    "KVStore.get + load_into": {"color": OUR_COLOURS[1], "marker": "o"},
    "RedisStore.load_into": {"color": OUR_COLOURS[0], "marker": "o"},
    "slices": {"color": "#1f4e79", "marker": "s"},
    "safetensors": {"color": "#a9cce3", "marker": "^"},
    "safetensors + slices": {"color": "#2e86c1", "marker": "^"},
    "torch.load": {"color": "#d2b4de", "marker": "v"},
    "torch.load + slices": {"color": "#8e44ad", "marker": "v"},
}
"""What is drawn, of all that is timed, beside the floors."""

KV_FLOORS = {
    "memcpy": "-",
    "pinned copy": "-",
    "device copy": "-",
    "memcpy + xxh3-128": "--",
    "read": "-.",
    "GET": "-.",
}
"""Black, in these styles."""


def plot_kv(record: dict, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG: a panel for each place to load from, time against bytes, the floors in black.

    Ours are red. On CUDA solid lines are from the call until the device is done, dotted ones the
    device's alone.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sources = list(dict.fromkeys(case["source"] for case in record["cases"]))
    if not sources:
        raise ValueError("expected a record with cases to plot, got none")
    columns = min(len(sources), 2)
    rows = -(-len(sources) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(12, 1 + 4.2 * rows),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, source in zip(axes.flat, sources, strict=False):
        _draw_kv(axis, [case for case in record["cases"] if case["source"] == source])
        axis.set_title(f"from {source}", loc="left", fontsize=10)
    for axis in axes.flat[len(sources) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms, median on cold caches; band: p20 to p80")
    handles = {}
    for axis in axes.flat[: len(sources)]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles,
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        title="load",
    )
    environment, settings = record["environment"], record["settings"]
    figure.suptitle(
        f"{environment['device']['name']}, an entry of {settings['num_layers']} layers, "
        f"{settings['num_kv_heads']} heads of {settings['head_dim']}, {settings['dtype']}, into a "
        f"StaticCache; torch {environment['versions']['torch']}, {environment['commit'][:12]}, "
        f"{environment['date'][:10]}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)


def _draw_kv(axis, cases: list[dict]) -> None:
    cases = sorted(cases, key=lambda case: case["bytes"])
    names = dict.fromkeys(row["name"] for case in cases for row in records.timed(case))
    for name in names:
        if name in KV_FLOORS:
            look = {"color": "black", "lw": 1.4, "ls": KV_FLOORS[name]}
        elif name in KV_LOOKS:
            look = {**KV_LOOKS[name], "ms": 5}
        else:
            continue
        points = [(case["bytes"], row) for case in cases if (row := records.named(case, name))]
        sizes = [size for size, _ in points]
        wall = [[row["wall"][at] for _, row in points] for at in ("p20", "p50", "p80")]
        label = f"floor: {name}" if name in KV_FLOORS else name
        axis.plot(sizes, wall[1], label=label, zorder=3, **look)
        axis.fill_between(sizes, wall[0], wall[2], color=look["color"], alpha=0.12, lw=0)
        on_device = [(size, row["device"]["p50"]) for size, row in points if "device" in row]
        if on_device:
            axis.plot(*zip(*on_device, strict=True), **{**look, "ls": ":"})
    axis.set_xscale("log")
    axis.set_yscale("log")
    sizes = [case["bytes"] for case in cases]
    axis.set_xticks(sizes, [_kv_label(case) for case in cases], fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _kv_label(case: dict) -> str:
    return f"{case['bytes'] / 1e6:.3g} MB\n{case['tokens']} tok."

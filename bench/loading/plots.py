"""The plot of bench/kv.py: the time of a load against its bytes."""

from __future__ import annotations

from pathlib import Path

from bench.harness import figure
from bench.harness.figure import OURS
from bench.harness.records import named, timed

LOOKS = {
    "load_into": {"color": OURS[0], "marker": "o"},
    "launch": {"color": OURS[1], "marker": "o"},
    "KVStore.load_into": {"color": OURS[0], "marker": "o"},
    "KVStore.get + load_into": {"color": OURS[1], "marker": "o"},
    "RedisStore.load_into": {"color": OURS[0], "marker": "o"},
    "slices": {"color": "#1f4e79", "marker": "s"},
    "safetensors": {"color": "#a9cce3", "marker": "^"},
    "safetensors + slices": {"color": "#2e86c1", "marker": "^"},
    "torch.load": {"color": "#d2b4de", "marker": "v"},
    "torch.load + slices": {"color": "#8e44ad", "marker": "v"},
}
"""What is drawn of all that is timed, besides the floors."""

FLOORS = {
    "memcpy": "-",
    "pinned copy": "-",
    "device copy": "-",
    "memcpy + xxh3-128": "--",
    "read": "-.",
    "GET": "-.",
}
"""Floors are drawn in black, in these styles."""


def plot_loads(record: dict, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG: a panel for each place to load from, time against bytes, the floors in black.

    Ours are red. On CUDA solid lines are from the call until the device is done, dotted ones the
    device's alone.

    Raises:
        ValueError: the record has no cases.
    """
    sources = list(dict.fromkeys(case["source"] for case in record["cases"]))
    if not sources:
        raise ValueError("expected a record with cases to plot, got none")
    columns = min(len(sources), 2)
    drawn, axes = figure.panels(len(sources), columns=columns, height=4.2, sharey=True)
    for axis, source in zip(axes, sources, strict=True):
        _draw_panel(axis, [case for case in record["cases"] if case["source"] == source])
        axis.set_title(f"from {source}", loc="left", fontsize=10)
    for axis in axes[::columns]:
        axis.set_ylabel("ms, median on cold caches; band: p20 to p80")
    handles = figure.labelled(axes)
    figure.legend(drawn, handles.values(), handles, title="load")
    settings = record["settings"]
    what = (
        f"an entry of {settings['num_layers']} layers, {settings['num_kv_heads']} heads of "
        f"{settings['head_dim']}, {settings['dtype']}, into a StaticCache"
    )
    figure.save(drawn, record, what, path, metadata)


def _draw_panel(axis, cases: list[dict]) -> None:
    cases = sorted(cases, key=lambda case: case["bytes"])
    names = dict.fromkeys(row["name"] for case in cases for row in timed(case))
    for name in names:
        if name in FLOORS:
            look = {"color": "black", "lw": 1.4, "ls": FLOORS[name]}
        elif name in LOOKS:
            look = {**LOOKS[name], "ms": 5}
        else:
            continue
        points = [(case["bytes"], row) for case in cases if (row := named(case, name))]
        sizes = [size for size, _ in points]
        wall = [[row["wall"][at] for _, row in points] for at in ("p20", "p50", "p80")]
        label = f"floor: {name}" if name in FLOORS else name
        axis.plot(sizes, wall[1], label=label, zorder=3, **look)
        axis.fill_between(sizes, wall[0], wall[2], color=look["color"], alpha=0.12, lw=0)
        on_device = [(size, row["device"]["p50"]) for size, row in points if "device" in row]
        if on_device:
            axis.plot(*zip(*on_device, strict=True), **{**look, "ls": ":"})
    axis.set_xscale("log")
    axis.set_yscale("log")
    sizes = [case["bytes"] for case in cases]
    axis.set_xticks(sizes, [_label(case) for case in cases], fontsize=8)
    axis.minorticks_off()


def _label(case: dict) -> str:
    return f"{case['bytes'] / 1e6:.3g} MB\n{case['tokens']} tok."

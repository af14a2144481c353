"""Pictures of a record of bench/two_pass.py: where the time until the first token goes, mode by mode;
answers per second by the share of images seen before."""

from __future__ import annotations

from pathlib import Path

from bench.answering.questions import (
    MODES,
    STAGES,
    answer_row,
    first_voco,
    stream_row,
    weights_ms,
)
from bench.harness import figure
from bench.harness.text import duration

COLOURS = {
    "vision": "#1f4e79",
    "prefix": "#5dade2",
    "extract": "#a9cce3",
    "load": "#d4ac0d",
    "prefill": "#c0392b",
}
LABELS = {
    "vision": "image encoding",
    "prefix": "pass 1, prefix",
    "extract": "pass 1, entry taken out",
    "load": "cache load",
    "prefill": "transformer forward",
}
BARS = {"uncached": "nothing\ncached", "full cache": "all tokens\ncached"}
LINES = {
    "voco": {"color": "#c0392b", "marker": "o", "label": "engine, VoCo cached"},
    "full cache": {"color": "#d4ac0d", "marker": "s", "label": "engine, all tokens cached"},
    "uncached": {"color": "#1f4e79", "marker": "^", "label": "engine, nothing cached"},
    "stock generate": {"color": "#566573", "ls": "--", "label": "stock generate"},
}


def plot_stages(record: dict, path: Path, metadata: dict[str, str] | None = None) -> None:
    """A panel for each model and batch: a stacked bar for each mode, by stage; dotted lines are the time
    to read the weights once."""
    panels = _stage_panels(record)
    if not panels:
        raise ValueError("expected a record with timed answers to plot, got none")
    drawn, axes = _figure(panels)
    for axis, (case, batch, bars) in zip(axes, panels, strict=True):
        for position, (_, row) in enumerate(bars):
            bottom = 0.0
            for stage in STAGES:
                if stage in row["stages"]:
                    height = row["stages"][stage]["p50"]
                    axis.bar(position, height, 0.62, bottom=bottom, color=COLOURS[stage])
                    bottom += height
            low, high = row["device"]["p20"], row["device"]["p80"]
            axis.vlines(position, low, high, color="black", lw=1)
            axis.annotate(
                duration(row["device"]["p50"]),
                (position, max(bottom, high)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        floor = weights_ms(record, case)
        axis.axhline(floor, color="black", ls=":", lw=1)
        axis.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
        axis.set_title(f"{case['title']}, batch {batch}", loc="left", fontsize=10)
        axis.set_ylabel("ms to the first token")
        axis.margins(y=0.12)
    used = [
        stage
        for stage in STAGES
        if any(stage in r["stages"] for *_, bars in panels for _, r in bars)
    ]
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[stage]) for stage in used]
    handles.append(Line2D([], [], color="black", ls=":", lw=1))
    labels = [*(LABELS[stage] for stage in used), "time to read the weights"]
    figure.legend(drawn, handles, labels)
    figure.save(drawn, record, _subject(record), path, metadata)


def plot_streams(record: dict, path: Path, metadata: dict[str, str] | None = None) -> None:
    """A panel for each model: answers per second over r."""
    panels = _stream_panels(record)
    if not panels:
        raise ValueError("expected a record with timed streams to plot, got none")
    drawn, axes = _figure(panels)
    for axis, (case, lines) in zip(axes, panels, strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), **LINES[name])
        axis.set_title(case["title"], loc="left", fontsize=10)
        axis.set_ylabel("answers/s")
        axis.set_xlabel("r, the share of images seen before")
        axis.set_ylim(bottom=0)
    seen = {name for _, lines in panels for name in lines}
    handles = figure.labelled(axes)
    labels = [LINES[name]["label"] for name in LINES if name in seen]
    figure.legend(drawn, [handles[label] for label in labels], labels)
    figure.save(drawn, record, _subject(record), path, metadata)


def has_stages(record: dict) -> bool:
    return bool(_stage_panels(record))


def has_streams(record: dict) -> bool:
    return bool(_stream_panels(record))


def _figure(panels: list):
    drawn, axes = figure.panels(len(panels), columns=min(len(panels), 2), height=3.6)
    for axis in axes:
        axis.grid(visible=False, axis="x")
    return drawn, axes


def _subject(record: dict) -> str:
    settings = record["settings"]
    return f"{settings['dtype']}, random weights, {settings['text_tokens']} text tokens, medians"


def _stage_panels(record: dict) -> list[tuple[dict, int, list[tuple[str, dict]]]]:
    """Case, batch, and the labelled rows of each panel."""
    first = first_voco(record)
    panels = []
    for case in record["cases"]:
        for batch in record["settings"]["batches"]:
            bars = []
            wanted = [(name, images) for name, images in MODES.items()] + [("voco", "new")]
            for name, images in wanted:
                count = first if name == "voco" else 0
                row = answer_row(case, name, batch, count, images=images)
                if row is not None:
                    voco = f"{first} VoCo,\n{'cached' if images == 'stored' else 'new image'}"
                    label = BARS.get(name, voco)
                    bars.append((label, row))
            if bars:
                panels.append((case, batch, bars))
    return panels


def _stream_panels(record: dict) -> list[tuple[dict, dict[str, list[tuple[float, float]]]]]:
    """Case, and the points of each line."""
    panels = []
    shares = record["settings"]["shares"]
    for case in record["cases"]:
        lines = {}
        for name in LINES:
            rows = [(share, stream_row(case, name, share)) for share in shares]
            points = [(share, row["answers_per_s"]) for share, row in rows if row]
            if points:
                lines[name] = points
        if lines:
            panels.append((case, lines))
    return panels

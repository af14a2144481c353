"""Pictures of a record of bench/two_pass.py: where the time until the first token goes, mode by mode;
answers a second over the share of images that come back."""

from __future__ import annotations

from pathlib import Path

from bench.answering import report as two_pass_report
from bench.answering.report import MODES, STAGES

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
LINES = {
    "voco": {"color": "#c0392b", "marker": "o", "label": "engine, VoCo cached"},
    "full cache": {"color": "#d4ac0d", "marker": "s", "label": "engine, all tokens cached"},
    "uncached": {"color": "#1f4e79", "marker": "^", "label": "engine, nothing cached"},
    "stock generate": {"color": "#566573", "ls": "--", "label": "stock generate"},
}


def paths(record_path: Path) -> dict[str, Path]:
    """Where the pictures of a record lie, by what they show."""
    return {
        "stages": record_path.with_suffix(".png"),
        "streams": record_path.with_name(f"{record_path.stem}-streams.png"),
    }


def draw(record: dict, record_path: Path, *, metadata: dict[str, str] | None = None) -> list[Path]:
    """Write the PNGs that the record has figures for."""
    drawn = []
    for what, path in paths(record_path).items():
        if has(record, what):
            (plot_stages if what == "stages" else plot_streams)(record, path, metadata=metadata)
            drawn.append(path)
    return drawn


def has(record: dict, what: str) -> bool:
    """Whether there is anything to draw."""
    return bool(_stage_panels(record) if what == "stages" else _stream_panels(record))


def plot_stages(record: dict, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """A panel for each model and batch: a bar a mode, its stages upon each other; black lines are the
    floors of bars that only read the weights."""
    panels = _stage_panels(record)
    if not panels:
        raise ValueError("expected a record with timed answers to plot, got none")
    figure, axes, pyplot = _figure(panels, height=3.6)
    for axis, (case, batch, bars) in zip(axes, panels, strict=False):
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
                two_pass_report.duration(row["device"]["p50"]),
                (position, max(bottom, high)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        floor = two_pass_report.weights_ms(record, case)
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
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[stage]) for stage in used]
    handles.append(pyplot.Line2D([], [], color="black", ls=":", lw=1))
    labels = [*(LABELS[stage] for stage in used), "time to read the weights"]
    _finish(figure, pyplot, record, path, handles, labels, metadata)


def plot_streams(record: dict, path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """A panel a model: answers a second over r."""
    panels = _stream_panels(record)
    if not panels:
        raise ValueError("expected a record with timed streams to plot, got none")
    figure, axes, pyplot = _figure(panels, height=3.6)
    for axis, (case, lines) in zip(axes, panels, strict=False):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), **LINES[name])
        axis.set_title(case["title"], loc="left", fontsize=10)
        axis.set_ylabel("answers/s")
        axis.set_xlabel("r, the share of images that came before")
        axis.set_ylim(bottom=0)
    seen = {name for _, lines in panels for name in lines}
    handles = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    labels = [LINES[name]["label"] for name in LINES if name in seen]
    _finish(figure, pyplot, record, path, [handles[label] for label in labels], labels, metadata)


def _stage_panels(record: dict) -> list[tuple[dict, int, list[tuple[str, dict]]]]:
    """Case, batch, and the labelled rows of each panel."""
    first = record["settings"]["num_voco"][0]
    panels = []
    for case in record["cases"]:
        for batch in record["settings"]["batches"]:
            bars = []
            wanted = [(name, images) for name, images in MODES.items()] + [("voco", "new")]
            for name, images in wanted:
                count = first if name == "voco" else 0
                row = two_pass_report.answer_row(case, name, batch, count, images=images)
                if row is not None:
                    label = {"uncached": "nothing\ncached", "full cache": "all tokens\ncached"}.get(
                        name
                    )
                    label = (
                        label or f"{first} VoCo,\n{'cached' if images == 'stored' else 'new image'}"
                    )
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
            rows = [(share, two_pass_report.stream_row(case, name, share)) for share in shares]
            points = [(share, row["answers_per_s"]) for share, row in rows if row]
            if points:
                lines[name] = points
        if lines:
            panels.append((case, lines))
    return panels


def _figure(panels: list, *, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(12, 1 + height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    return figure, axes.flat[: len(panels)], pyplot


def _finish(figure, pyplot, record, path, handles, labels, metadata) -> None:
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    environment, settings = record["environment"], record["settings"]
    figure.suptitle(
        f"{environment['device']['name']}, {settings['dtype']}, random weights, "
        f"{settings['text_tokens']} text tokens, medians; torch {environment['versions']['torch']}, "
        f"{environment['commit'][:12]}, {environment['date'][:10]}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)

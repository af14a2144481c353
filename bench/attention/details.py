"""Every row of a record of bench/attn.py, as tables."""

from __future__ import annotations

from bench.attention.questions import cases_of, our_row, panels_of, times_faster
from bench.harness.records import is_on_gpu
from bench.harness.text import table


def tables(record: dict) -> list[str]:
    """A table of all implementations for each direction and heads, and one of the layouts."""
    blocks = []
    unit, factor = ("TFLOP/s", 1.0) if is_on_gpu(record) else ("GFLOP/s", 1e3)
    header = ["shape", "implementation", "p20", "p50", "p80", unit, "×", "error (limit)", "note"]
    for panel in panels_of(record):
        cases = cases_of(record, panel)
        rows = [
            [f"{case['shape']} {case['title']}", *_cells(case, row, factor)]
            for case in cases
            for row in case["rows"]
        ]
        blocks += [
            f"**{panel[0]}, heads {panel[1]}/{panel[2]}**, head_dim {cases[0]['head_dim']}, "
            f"{cases[0]['dtype']}. Times in ms; rates count useful work only; ×: how many times faster "
            "our default backend is; error: of the worst tensor, against float64.",
            table(header, rows, left=2),
        ]
    if record["layouts"]:
        header = ["shape", "from_input_ids", "host", "block mask", "compiled", "×", "note"]
        blocks += [
            "**Making the layout from token ids**, against FlexAttention's create_block_mask. Medians "
            "in ms, on CUDA of the device; ×: against the faster of the two.",
            table(header, [_layout_cells(entry) for entry in record["layouts"]]),
        ]
    return blocks


def _cells(case: dict, row: dict, factor: float) -> list[str]:
    if row["status"] != "ok":
        status = row["status"].upper() if row["status"] == "red" else row["status"]
        note = f"{status}: {row['reason']}"
        return [row["name"], *["-"] * 5, _worst_error(row), note]
    timing = row["timing"]
    ratio = None if row is our_row(case) else times_faster(case, row)
    return [
        row["name"],
        *(f"{timing[quantile]:.4g}" for quantile in ("p20", "p50", "p80")),
        f"{factor * row['tflops']:.4g}",
        "" if ratio is None else f"{ratio:.2f}",
        _worst_error(row),
        _note(row),
    ]


def _worst_error(row: dict) -> str:
    errors = row.get("errors")
    if not row["masked"]:
        return "not compared"
    if not errors:
        return "-"
    # The first NaN is the worst there is.
    name = max(errors, key=lambda n: _badness(errors[n]))
    return f"{name} {float(errors[name]['error']):.1e} ({float(errors[name]['limit']):.1e})"


def _badness(entry: dict) -> float:
    share = float(entry["error"]) / float(entry["limit"])
    return float("inf") if share != share else share


def _note(row: dict) -> str:
    notes = []
    timing = row["timing"]
    if not row["masked"]:
        notes.append("unmasked: another function")
    if not row["drop_in"]:
        notes.append("kernels alone")
    if timing["host_ms"] is not None and timing["host_ms"] > timing["p50"]:
        notes.append(f"eager calls are host-bound ({timing['host_ms']:.3g} ms)")
    if timing["graph_p50"] is not None:
        notes.append(f"graph {timing['graph_p50']:.4g} ms")
    if timing["graph_reason"] is not None:
        notes.append(f"no graph: {timing['graph_reason']}")
    if row.get("extra_bytes"):
        notes.append(f"{row['extra_bytes'] / 1e6:.0f} MB extra")
    notes += [f"{name} {value:.3g} ms" for name, value in row.get("setup_ms", {}).items()]
    return "; ".join(notes)


def _layout_cells(entry: dict) -> list[str]:
    if entry["status"] != "ok":
        return [entry["shape"], *["-"] * 5, f"{entry['status']}: {entry['reason']}"]
    layout = entry["layout"]
    return [
        entry["shape"],
        f"{layout['p50']:.4g}",
        "" if layout["host_ms"] is None else f"{layout['host_ms']:.3g}",
        *(
            f"{entry[key]['p50']:.4g}" if entry[key] else "-"
            for key in ("block_mask", "block_mask_compiled")
        ),
        "-" if entry["ratio"] is None else f"{entry['ratio']:.1f}",
        "; ".join(entry["notes"]),
    ]

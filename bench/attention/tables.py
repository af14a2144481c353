"""The tables that ``bench/attn.py`` and ``bench/kv.py`` print."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.harness import records


def print_attention(record: dict, console: Console) -> None:
    """One table for each direction and heads, then the layouts, the legend and what is missing."""
    on_gpu = record["environment"]["device"]["type"] == "cuda"
    panels = list(
        dict.fromkeys(
            (case["direction"], case["num_heads"], case["num_kv_heads"]) for case in record["cases"]
        )
    )
    for panel in panels:
        cases = [
            case
            for case in record["cases"]
            if (case["direction"], case["num_heads"], case["num_kv_heads"]) == panel
        ]
        console.print(_attention_table(cases, on_gpu))
    if record["layouts"]:
        console.print(_layout_table(record["layouts"]))
    if record["ceilings"]:
        console.print(
            "ceilings measured here: matmul {matmul_tflops:.4g} TFLOP/s, copy {copy_tb_per_s:.3g} "
            "TB/s (read + written)".format(**record["ceilings"])
        )
    for name, reason in record["unavailable"].items():
        console.print(f"not on this machine: {escape(name)}: {escape(reason)}")


def _attention_table(cases: list[dict], on_gpu: bool) -> Table:
    first = cases[0]
    unit, factor = ("TFLOP/s", 1.0) if on_gpu else ("GFLOP/s", 1e3)
    table = Table(
        title=f"{first['direction']}, heads {first['num_heads']}/{first['num_kv_heads']}, "
        f"head_dim {first['head_dim']}, {first['dtype']}",
        title_justify="left",
        caption="times in ms; rates of useful work only; x: how many times faster our default "
        "backend is; error: the worst tensor, max|result - fp64|, and its limit",
        caption_justify="left",
    )
    table.add_column("shape")
    table.add_column("implementation", no_wrap=True)
    for name in ("p20", "p50", "p80", unit, "x"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("error (limit)", no_wrap=True)
    table.add_column("note", overflow="fold")
    for case in cases:
        label = f"[bold]{case['shape']}[/bold] {escape(case['title'])}"
        for index, row in enumerate(case["rows"]):
            last = index == len(case["rows"]) - 1
            table.add_row(label if index == 0 else "", *_cells(case, row, factor), end_section=last)
    return table


def _cells(case: dict, row: dict, factor: float) -> list[str]:
    name = escape(row["name"])
    name = f"[bold red]{name}[/bold red]" if row["ours"] else name
    error = _worst_error(row)
    if row["status"] != "ok":
        status = "[bold red]RED[/bold red]" if row["status"] == "red" else row["status"]
        return [name, "-", "-", "-", "-", "-", error, f"{status}: {escape(row['reason'])}"]
    timing = row["timing"]
    ratio = None if row is records.our_row(case) else records.times_faster(case, row)
    return [
        name,
        *(f"{timing[quantile]:.4g}" for quantile in ("p20", "p50", "p80")),
        f"{factor * row['tflops']:.4g}",
        "" if ratio is None else f"{ratio:.2f}",
        error,
        escape(_note(row)),
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


def _layout_table(layouts: list[dict]) -> Table:
    table = Table(
        title="making the layout from token ids, against FlexAttention's create_block_mask",
        title_justify="left",
        caption="p50 in ms; on CUDA device time; x: against the faster of the two",
        caption_justify="left",
    )
    for name in ("shape", "from_input_ids", "host", "block mask", "compiled", "x", "note"):
        table.add_column(name, justify="left" if name in ("shape", "note") else "right")
    for entry in layouts:
        if entry["status"] != "ok":
            reason = f"{entry['status']}: {entry['reason']}"
            table.add_row(entry["shape"], "-", "-", "-", "-", "-", escape(reason))
            continue
        layout = entry["layout"]
        table.add_row(
            entry["shape"],
            f"{layout['p50']:.4g}",
            "" if layout["host_ms"] is None else f"{layout['host_ms']:.3g}",
            *(_p50(entry[key]) for key in ("block_mask", "block_mask_compiled")),
            "-" if entry["ratio"] is None else f"{entry['ratio']:.1f}",
            escape("; ".join(entry["notes"])),
        )
    return table


def _p50(timing: dict | None) -> str:
    return "-" if timing is None else f"{timing['p50']:.4g}"


def print_kv(record: dict, console: Console) -> None:
    """One table for each place to load from and size, then what they mean."""
    on_gpu = record["environment"]["device"]["type"] == "cuda"
    for case in record["cases"]:
        console.print(_kv_table(case, on_gpu))
    console.print(
        "ms on cold caches, from the call until the device is done; warm: call upon call; device: "
        "on the GPU alone; x: times the floor, the one with a checksum where the load has one"
    )


def _kv_table(case: dict, on_gpu: bool) -> Table:
    tokens = f"{case['tokens']} token{'s' if case['tokens'] > 1 else ''}"
    table = Table(
        title=f"from {case['source']}: {tokens}, {case['bytes'] / 1e6:.3g} MB",
        title_justify="left",
    )
    table.add_column("load", no_wrap=True)
    columns = ["p20", "p50", "p80", "x", "warm", "x warm"]
    columns += ["device", "x device"] if on_gpu else []
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for index, row in enumerate(case["rows"]):
        name = f"[bold red]{row['name']}[/bold red]" if row["kind"] == "ours" else row["name"]
        following = case["rows"][index + 1 : index + 2]
        last = not following or following[0]["kind"] != row["kind"]
        table.add_row(name, *_kv_cells(case, row, on_gpu), end_section=last)
    return table


def _kv_cells(case: dict, row: dict, on_gpu: bool) -> list[str]:
    if row["status"] != "ok":
        status = "[bold red]RED[/bold red]" if row["status"] == "red" else row["status"]
        return ["-"] * (8 if on_gpu else 6) + [f"{status}: {escape(row['reason'])}"]
    cells = [f"{row['wall'][quantile]:.4g}" for quantile in ("p20", "p50", "p80")]
    cells.append(_times_floor(case, row, "wall"))
    for what in ("warm", "device") if on_gpu else ("warm",):
        cells += [_p50(row.get(what)), _times_floor(case, row, what)]
    return [*cells, "checksum" if row["checksum"] else ""]


def _times_floor(case: dict, row: dict, what: str) -> str:
    ratio = records.kv_times_floor(case, row, what)
    return "-" if ratio is None else f"{ratio:.2f}"

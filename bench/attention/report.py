"""The tables of bench/attn.py, for README, docs and terminal, and its family of records."""

from __future__ import annotations

from pathlib import Path

from bench.attention import details, plots, summary, tiles
from bench.attention.questions import (
    DIRECTIONS,
    best_pieces,
    our_next,
    our_row,
    times_faster,
)
from bench.attention.shapes import SIZES
from bench.harness import records, text
from bench.harness.family import Family, Link, Picture, picture_links
from bench.harness.records import Records, device_of, is_on_gpu
from bench.harness.text import NOT_MEASURED, table


def attention_tables(results: Records, size: str) -> str:
    """A table for each device and direction; without records, the same tables of "not measured"."""
    usable = {n: r for n, r in results.items() if r["settings"]["size"] == size}
    devices = dict.fromkeys(device_of(record) for record in usable.values())
    blocks = []
    for device in devices or [None]:
        own = {n: r for n, r in usable.items() if device_of(r) == device}
        for direction in DIRECTIONS:
            blocks.append(_attention_table(own, size, direction))
    return "\n\n".join(blocks)


def _attention_table(
    results: Records, size: str, direction: str, *, all_shapes: bool = True
) -> str:
    newest: dict[tuple, tuple[str, dict]] = {}
    for name, record in results.items():
        for case in record["cases"]:
            if case["direction"] == direction:
                key = (case["shape"], case["num_heads"], case["num_kv_heads"])
                newest[key] = (name, case)
    expected = [(shape, *heads) for heads in SIZES[size].heads for shape in SIZES[size].shapes]
    keys = [key for key in expected if all_shapes or key in newest]
    keys += [key for key in newest if key not in keys]
    unit, factor = ("TFLOP/s", 1.0) if size == "full" else ("GFLOP/s", 1e3)
    header = [
        "shape",
        "heads",
        "ms",
        f"useful {unit}",
        "× two-call, drop-in",
        "× two-call, kernels alone",
        "× FlexAttention",
        "× dense-mask SDPA",
        "error / limit",
    ]
    cases = [newest.get(key, (None, None))[1] for key in keys]
    served = [case and our_row(case) for case in cases]
    mixed = len({own["name"] for own in served if own}) > 1
    several = any(case and our_next(case) for case in cases)
    if several:
        header.insert(4, "× our next backend")
    if mixed:
        header.insert(2, "backend")
    rows = []
    for key, case, own in zip(keys, cases, served, strict=True):
        figures = _figures(case, factor)
        if several:
            next_ratio = case and _ratio(case, our_next(case), named=True)
            figures.insert(2, next_ratio or NOT_MEASURED)
        if mixed:
            figures.insert(0, own["name"].removeprefix("voco ") if own else NOT_MEASURED)
        rows.append([f"**{key[0]}**", f"{key[1]}/{key[2]}", *figures])
    used = list(dict.fromkeys(name for name, _ in newest.values()))
    return f"**{direction}**. {_origin(results, used)}\n\n{table(header, rows)}"


def _figures(case: dict | None, factor: float) -> list[str]:
    own = our_row(case) if case else None
    if own is None:
        return [NOT_MEASURED] * 7
    ratios = [
        _ratio(case, best_pieces(case, drop_in=True), named=True),
        _ratio(case, best_pieces(case, drop_in=False), named=True),
        _ratio(case, records.named(case, "flex")),
        _ratio(case, records.named(case, "sdpa-dense")),
    ]
    share = max(entry["error"] / entry["limit"] for entry in own["errors"].values())
    rate = own["tflops"] * factor
    return [f"{own['timing']['p50']:.3g}", f"{rate:.3g}", *ratios, f"{share:.2f}"]


def _ratio(case: dict, rival: dict | None, named: bool = False) -> str:
    ratio = times_faster(case, rival)
    if ratio is None:
        return NOT_MEASURED
    name = rival["name"].removesuffix("-parts").removeprefix("voco ")
    return f"{ratio:.2f} ({name})" if named else f"{ratio:.2f}"


def _origin(results: Records, used: list[str]) -> str:
    """Where figures come from, in one sentence."""
    if not used:
        return f"{NOT_MEASURED.capitalize()} yet."
    newest = results[used[-1]]
    settings = newest["settings"]
    own = [our_row(case) or _first_of_ours(case) for case in newest["cases"]]
    backends = dict.fromkeys(row["name"].removeprefix("voco ") for row in own)
    packages = ("torch", "triton") if is_on_gpu(newest) else ("torch",)
    return (
        f"{device_of(newest)}, {settings['dtype']}, head_dim {settings['head_dim']}, backend "
        f"{', '.join(f'`{name}`' for name in backends)}; "
        f"{text.provenance({name: results[name] for name in used}, packages)}."
    )


def _first_of_ours(case: dict) -> dict:
    return next(row for row in case["rows"] if row["ours"])


def layout_table(results: Records, size: str, *, all_shapes: bool = True) -> str:
    """The time to build a layout from token ids against the time to build the BlockMask."""
    newest: dict[str, tuple[str, dict]] = {}
    for name, record in results.items():
        if record["settings"]["size"] == size:
            for entry in record["layouts"]:
                if entry["status"] == "ok":
                    newest[entry["shape"]] = (name, entry)
    rows = []
    for shape in SIZES[size].shapes:
        if shape not in newest and not all_shapes:
            continue
        if shape not in newest:
            rows.append([f"**{shape}**", *[NOT_MEASURED] * 3])
            continue
        _, entry = newest[shape]
        masks = [entry[key] for key in ("block_mask", "block_mask_compiled") if entry.get(key)]
        fastest = min((mask["p50"] for mask in masks), default=None)
        rows.append(
            [
                f"**{shape}**",
                f"{1e3 * entry['layout']['p50']:.3g}",
                NOT_MEASURED if fastest is None else f"{1e3 * fastest:.3g}",
                NOT_MEASURED if entry["ratio"] is None else f"{entry['ratio']:.1f}",
            ]
        )
    used = list(dict.fromkeys(name for name, _ in newest.values()))
    header = ["shape", "`from_input_ids`, µs", "`create_block_mask`, µs", "×"]
    return f"{_origin(results, used)}\n\n{table(header, rows)}"


def tiles_table() -> str:
    """Visible pairs as a share of executed ones."""
    rows = []
    for name, shape in SIZES["full"].shapes.items():
        layout = shape.layout("cpu")
        executed = [
            tiles.pairs_of_two_calls(layout),
            tiles.pairs_of_cuda_sm90(layout),
            tiles.pairs_of_cuda_sm90(layout, packed_heads=4),
        ]
        rows.append(
            [f"**{name}**", *(f"{100 * layout.pairs() / pairs:.0f}%" for pairs in executed)]
        )
    header = [
        "shape",
        "two calls, 128 x 128",
        "`cuda_sm90`, 32/32 heads",
        "`cuda_sm90`, 32/8 heads",
    ]
    return table(header, rows)


def shapes_table() -> str:
    """What A to G are, in the two sizes that are measured."""
    rows = [
        [f"**{name}**", SIZES["full"].shapes[name].title, SIZES["small"].shapes[name].title]
        for name in SIZES["full"].shapes
    ]
    return table(["shape", "on a GPU (vision, VoCo, text x batch)", "on a CPU"], rows)


def show(record: dict) -> str:
    """The tables of one record as in README and docs, then every row of it."""
    size, results = record["settings"]["size"], {"": record}
    blocks = [
        _attention_table(results, size, direction, all_shapes=False)
        for direction in record["settings"]["directions"]
    ]
    if record["layouts"]:
        blocks.append("**layout from token ids**. " + layout_table(results, size, all_shapes=False))
    blocks += details.tables(record)
    if record["ceilings"]:
        rate = text.rate(record["ceilings"]["matmul_tflops"], "FLOP/s")
        copy = text.rate(record["ceilings"]["copy_tb_per_s"], "B/s")
        blocks.append(f"ceilings measured here: matmul {rate}, copy {copy} (read and written)")
    blocks += [
        f"not on this machine: {name}: {reason}" for name, reason in record["unavailable"].items()
    ]
    return "\n\n".join(blocks)


def roofline_links(results: Records, link: Link) -> str:
    """The roofline plots of all records with ceilings; of the others, what they lack."""
    blocks = []
    for name, record in results.items():
        directions = " and ".join(record["settings"]["directions"])
        title = f"{ROOFLINE.title}, {directions}, {device_of(record)}"
        if record["ceilings"]:
            blocks.append(f"![{title}]({link(ROOFLINE.path(Path(name)).name)})")
        else:
            blocks.append(f"{title} (`bench/results/{name}`): ceilings {NOT_MEASURED}.")
    return "\n\n".join(blocks) or f"{ROOFLINE.title}: {NOT_MEASURED}."


def _of(results: Records, *, gpu: bool) -> Records:
    return {name: record for name, record in results.items() if is_on_gpu(record) == gpu}


def _layouts(results: Records, link: Link) -> str:
    on_gpu = _of(results, gpu=True)
    return layout_table(on_gpu or results, "full" if on_gpu else "small")


def _label(case: dict, row: dict | None) -> str:
    label = f"{case['direction']} {case['shape']} {case['num_heads']}/{case['num_kv_heads']}"
    return f"{label} {row['name']}" if row else label


BARS = Picture(
    "Useful TFLOP/s by shape and implementation",
    plots.plot_attention,
    has=lambda record: bool(record["cases"]),
)
ROOFLINE = Picture(
    "Roofline",
    plots.plot_roofline,
    has=lambda record: bool(is_on_gpu(record) and record["cases"] and record["ceilings"]),
    suffix="-roofline",
)
FAMILY = Family(
    name="attn",
    show=show,
    record_keys={"cases": list, "ceilings": dict, "unavailable": dict, "layouts": list},
    case_keys={
        "shape": str,
        "title": str,
        "direction": str,
        "num_heads": int,
        "num_kv_heads": int,
        "head_dim": int,
        "dtype": str,
        "batch": int,
        "length": int,
        "pairs": int,
        "flops": int,
        "rows": list,
    },
    row_keys={"name": str, "ours": bool, "masked": bool, "drop_in": bool, "status": str},
    times=("timing", "tflops"),
    choices={"direction": DIRECTIONS},
    label=_label,
    counts=lambda row: row.get("ours", True),  # a layout is always ours
    entries={"layouts": {"shape": str, "status": str}},
    tables={
        "attn": lambda results, link: attention_tables(_of(results, gpu=True), "full"),
        "attn-cpu": lambda results, link: attention_tables(_of(results, gpu=False), "small"),
        "attn-plot": lambda results, link: picture_links([BARS], results, link),
        "roofline": lambda results, link: roofline_links(_of(results, gpu=True), link),
        "headline": lambda results, link: summary.headline(results),
        "summary": lambda results, link: summary.summary(results),
        "layout": _layouts,
        "shapes": lambda results, link: shapes_table(),
        "tiles": lambda results, link: tiles_table(),
    },
    pictures=(BARS, ROOFLINE),
)

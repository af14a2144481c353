"""The tables of bench/kv.py in README and docs: goals and what is reached, and every load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.harness import text
from bench.harness.family import Family, Picture, picture_links
from bench.harness.records import Records, is_on_gpu, named, newest_by_device
from bench.harness.text import NOT_MEASURED, duration, table
from bench.loading import plots
from bench.loading.loads import loads_from
from bench.loading.questions import case_of, floor_of, times_floor
from bench.loading.scene import SIZES

TOKENS = (1, 8, 64, 576)


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Attributes:
        what: what is measured, in words.
        goal: in words.
        figure: from a record and a kind of time (a column of the table); None if it wasn't measured.
        times: the kinds of time that the goal is about; other columns stay empty.
        unit: follows the figure.
    """

    what: str
    goal: str
    figure: Callable[[dict, str], float | None]
    times: tuple[str, ...]
    unit: str = ""


def _against_floor(source: str, tokens: int, name: str) -> Callable[[dict, str], float | None]:
    def figure(record: dict, what: str) -> float | None:
        case = case_of(record, source, tokens)
        row = named(case, name)
        return row and times_floor(case, row, what)

    return figure


def _microseconds(source: str, tokens: int, name: str) -> Callable[[dict, str], float | None]:
    def figure(record: dict, what: str) -> float | None:
        row = named(case_of(record, source, tokens), name)
        return 1e3 * row[what]["p50"] if row and row.get(what) else None

    return figure


def _times_faster(record: dict, what: str) -> float | None:
    own = named(case_of(record, "pinned memory", 1), "replace + launch")
    rival = named(case_of(record, "page cache", 1), "safetensors")
    if not own or not rival or not own.get(what) or not rival.get(what):
        return None
    return rival[what]["p50"] / own[what]["p50"]


def _size(tokens: int) -> str:
    """``"64 tokens, 33.6 MB"``"""
    return f"{text.plural(tokens, 'token')}, {text.digits(SIZES['full'].nbytes(tokens) / 1e6)} MB"


_PINNED = "pinned memory to StaticCache, `launch`"
GOALS = {
    "cpu": [
        Goal(
            f"page cache to StaticCache, `KVStore.load_into`, {_size(tokens)}: × memcpy + xxh3-128",
            goal,
            _against_floor("page cache", tokens, "KVStore.load_into"),
            # No cache holds the large ones: nothing is timed warm.
            ("wall", "warm") if tokens == 1 else ("wall",),
        )
        for tokens, goal in ((1, "≤ 2"), (64, "≤ 1.3"), (576, "≤ 1.3"))
    ],
    "cuda": [
        Goal(
            f"{_PINNED}, {_size(1)}",
            "≤ 35 µs",
            _microseconds("pinned memory", 1, "launch"),
            ("device", "wall"),
            " µs",
        ),
        *(
            Goal(
                f"{_PINNED}, {_size(tokens)}: × one pinned copy",
                goal,
                _against_floor("pinned memory", tokens, "launch"),
                ("device", "wall"),
            )
            for tokens, goal in ((1, "≤ 2"), (64, "≤ 1.1"), (576, "≤ 1.1"))
        ),
        Goal(
            f"{_size(1)}: how many times faster `replace` + `launch` is than safetensors' "
            '`load_file(device="cuda")` from the page cache',
            "≥ 20",
            _times_faster,
            ("wall",),
        ),
    ],
}
COLUMNS = {
    "cpu": {"wall": "reached, cold caches", "warm": "reached, warm"},
    "cuda": {"device": "reached, on the device", "wall": "reached, host and device"},
}


def tables(results: Records, device_type: str) -> str:
    """Goals and loads for each device of a type; without records the goals, "not measured".

    Args:
        results: kv records by file name, oldest first.
        device_type: "cpu" or "cuda".
    """
    full = {n: record for n, record in results.items() if record["settings"]["size"] == "full"}
    newest = newest_by_device(full, device_type)
    if not newest:
        return f"{NOT_MEASURED.capitalize()} yet.\n\n{goals_table(None, device_type)}"
    return "\n\n".join(_blocks(name, record, device_type) for name, record in newest)


def _blocks(name: str, record: dict, device_type: str) -> str:
    blocks = [_origin(name, record)]
    if record["settings"]["size"] == "full":  # what the goals are about
        blocks.append(goals_table(record, device_type))
    blocks += [_legend(record, device_type), loads_table(record, device_type, "wall")]
    if device_type == "cuda":
        blocks += [
            "Device time alone, on a cold L2, for the loads that only enqueue work:",
            loads_table(record, device_type, "device"),
        ]
        sweep = crossover_table(record)
        if sweep:
            blocks += [
                "Device time, reading pinned memory directly or copying it to the device first:",
                sweep,
            ]
    return "\n\n".join(blocks)


def show(record: dict) -> str:
    """The tables of one record, whatever its size and device, and then every row of it."""
    blocks = [_blocks("", record, record["environment"]["device"]["type"])]
    for case in record["cases"]:
        title = f"**from {case['source']}: {text.plural(case['tokens'], 'token')}"
        blocks += [f"{title}, {case['bytes'] / 1e6:.3g} MB**", details_table(record, case)]
    blocks.append(
        "ms on cold caches, from the call until the device is done; warm: the same, call after call; "
        "device: the GPU's time alone; ×: a multiple of the floor, with a checksum if the load has one"
    )
    return "\n\n".join(blocks)


def details_table(record: dict, case: dict) -> str:
    """Every load of a case, or why it has no time."""
    kinds = ["warm", "device"] if is_on_gpu(record) else ["warm"]
    columns = ["p20", "p50", "p80", "×"] + [name for kind in kinds for name in (kind, f"× {kind}")]
    rows = []
    for row in case["rows"]:
        if row["status"] != "ok":
            status = row["status"].upper() if row["status"] == "red" else row["status"]
            note = f"{status}: {row['reason']}"
            rows.append([row["name"], *["-"] * len(columns), note])
            continue
        cells = [f"{row['wall'][quantile]:.4g}" for quantile in ("p20", "p50", "p80")]
        for kind in ("wall", *kinds):
            ratio = times_floor(case, row, kind)
            if kind != "wall":
                cells.append(f"{row[kind]['p50']:.4g}" if row.get(kind) else "-")
            cells.append("-" if ratio is None else f"{ratio:.2f}")
        rows.append([row["name"], *cells, "checksum" if row["checksum"] else ""])
    return table(["load", *columns, "note"], rows)


def _origin(name: str, record: dict) -> str:
    settings = record["settings"]
    return (
        f"{text.device(record)}; entries of {settings['num_layers']} layers, "
        f"{settings['num_kv_heads']} heads of {settings['head_dim']}, {settings['dtype']}, into a "
        f"StaticCache of one row; {text.provenance({name: record}, ['torch'])}."
    )


def _legend(record: dict, device_type: str) -> str:
    evicted = record["settings"]["evicted_bytes"]["cpu"] / 2**20
    floor = "one pinned copy of the same bytes"
    if device_type == "cpu":
        floor = (
            "the plain copy, or for loads with a checksum (✓) copy and checksum one after the other"
        )
    return (
        f"Medians, from the call until the entry is in the cache; {evicted:.0f} MiB of other data are "
        f"read before each call. In parentheses: the multiple of the floor, {floor}. Quantized "
        "entries count with the size that they are loaded as. Rivals verify nothing."
    )


def goals_table(record: dict | None, device_type: str) -> str:
    """The goals, and what is reached."""
    columns = COLUMNS[device_type]
    rows = []
    for goal in GOALS[device_type]:
        figures = []
        for what in columns:
            value = goal.figure(record, what) if record else None
            figure = NOT_MEASURED if value is None else f"{text.digits(value)}{goal.unit}"
            figures.append(figure if what in goal.times else "")
        rows.append([goal.what, goal.goal, *figures])
    return table(["what", "goal", *columns.values()], rows)


def loads_table(record: dict, device_type: str, what: str) -> str:
    """Every load of a record by size: its median, and that as a multiple of the floor."""
    sizes = [tokens for tokens in TOKENS if tokens in record["settings"]["tokens"]]
    sizes += [tokens for tokens in record["settings"]["tokens"] if tokens not in sizes]
    rows = []
    for source in record["settings"]["sources"]:
        for load in loads_from(source, device_type):
            cells = [_cell(record, source, tokens, load.name, what) for tokens in sizes]
            if what == "device" and set(cells) == {NOT_MEASURED}:
                continue
            check = " ✓" if load.checksum else ""
            name = f"**{load.name}**" if load.kind == "ours" else load.name
            rows.append([source, f"{name}{check}", load.legend, *cells])
    model = record["settings"]
    each = 4 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"]
    header = [f"{text.plural(n, 'token')}, {text.digits(each * n / 1e6)} MB" for n in sizes]
    return table(["from", "load", "its time includes", *header], rows, left=3)


def _cell(record: dict, source: str, tokens: int, name: str, what: str) -> str:
    case = case_of(record, source, tokens)
    row = named(case, name)
    if row is None or not row.get(what):
        return NOT_MEASURED
    ratio = times_floor(case, row, what)
    factor = "" if ratio is None else f" ({text.digits(ratio)})"
    return f"{duration(row[what]['p50'])}{factor}"


def crossover_table(record: dict) -> str:
    """Direct reads against staging by size; "" if neither was timed."""
    rows = []
    for case in record["cases"]:
        ways = [named(case, f"launch, {way}") for way in ("direct", "staged")]
        if case["source"] != "pinned memory" or not any(ways):
            continue
        floor = floor_of(case, checksum=False)
        figures = [row and row.get("device") for row in (*ways, floor)]
        cells = [duration(f["p50"]) if f else NOT_MEASURED for f in figures]
        rows.append([f"{case['tokens']}", f"{case['bytes'] / 1e6:.3g} MB", *cells])
    header = ["tokens", "bytes", "direct", "staged", "one pinned copy"]
    return table(header, rows, left=0) if rows else ""


def _label(case: dict, row: dict | None) -> str:
    if row is None:
        return f"{case['source']}, {text.plural(case['tokens'], 'token')}"
    return f"{case['source']} {case['tokens']} {row['name']}"


LINES = Picture(
    "Time of a load against its bytes",
    plots.plot_loads,
    has=lambda record: bool(record["cases"]),
)
FAMILY = Family(
    name="kv",
    show=show,
    record_keys={"cases": list},
    case_keys={"source": str, "tokens": int, "bytes": int, "rows": list},
    row_keys={"name": str, "kind": str, "checksum": bool, "status": str},
    times=("wall",),
    choices={"kind": ("floor", "ours", "rival")},
    label=_label,
    counts=lambda row: row["kind"] != "rival",
    tables={
        "kv": lambda results, link: tables(results, "cuda"),
        "kv-cpu": lambda results, link: tables(results, "cpu"),
        "kv-plot": lambda results, link: picture_links([LINES], results, link),
    },
    pictures=(LINES,),
)

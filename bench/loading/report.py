"""The tables of bench/kv.py in README and docs: what was aimed at and reached, and every load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.harness import records
from bench.harness.text import NOT_MEASURED, short, table
from bench.loading import loads as kv_loads
from bench.loading.scene import SIZES

TOKENS = (1, 8, 64, 576)


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Attributes:
        what: is measured, in words.
        goal: in words.
        figure: of a record, by kind of time (a column of the table); None if it wasn't measured.
        times: the kinds of time that it is about; other columns stay empty.
        unit: behind the figure.
    """

    what: str
    goal: str
    figure: Callable[[dict, str], float | None]
    times: tuple[str, ...]
    unit: str = ""


def _against_floor(source: str, tokens: int, name: str) -> Callable[[dict, str], float | None]:
    def figure(record: dict, what: str) -> float | None:
        case = records.kv_case(record, source, tokens)
        row = records.kv_row(case, name)
        return row and records.kv_times_floor(case, row, what)

    return figure


def _microseconds(source: str, tokens: int, name: str) -> Callable[[dict, str], float | None]:
    def figure(record: dict, what: str) -> float | None:
        row = records.kv_row(records.kv_case(record, source, tokens), name)
        return 1e3 * row[what]["p50"] if row and row.get(what) else None

    return figure


def _times_faster(record: dict, what: str) -> float | None:
    own = records.kv_row(records.kv_case(record, "pinned memory", 1), "replace + launch")
    rival = records.kv_row(records.kv_case(record, "page cache", 1), "safetensors")
    if not own or not rival or not own.get(what) or not rival.get(what):
        return None
    return rival[what]["p50"] / own[what]["p50"]


def _three(value: float) -> str:
    """Three digits, as many as a median of a noisy machine has at best, without an exponent."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _size(tokens: int) -> str:
    """``"64 tokens, 33.6 MB"``"""
    return f"{tokens} token{'s' if tokens > 1 else ''}, {_three(SIZES['full'].nbytes(tokens) / 1e6)} MB"


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


def tables(results: dict[str, dict], device_type: str) -> str:
    """Goals and loads for each device of a type; without records the goals, "not measured".

    Args:
        results: kv records by file name, oldest first.
        device_type: "cpu" or "cuda".
    """
    newest = {}
    for name, record in results.items():
        device = record["environment"]["device"]
        if device["type"] == device_type and record["settings"]["size"] == "full":
            newest[device["name"]] = (name, record)
    if not newest:
        return f"{NOT_MEASURED.capitalize()} yet.\n\n{goals_table(None, device_type)}"
    return "\n\n".join(_blocks(name, record, device_type) for name, record in newest.values())


def _blocks(name: str, record: dict, device_type: str) -> str:
    blocks = [_origin(name, record)]
    if record["settings"]["size"] == "full":  # what the goals are about
        blocks.append(goals_table(record, device_type))
    blocks += [_legend(record, device_type), loads_table(record, device_type, "wall")]
    if device_type == "cuda":
        blocks += [
            "The device alone, on a cold L2, of the loads that only enqueue work:",
            loads_table(record, device_type, "device"),
        ]
        sweep = crossover_table(record)
        if sweep:
            blocks += [
                "Whether the kernel reads pinned memory itself or a copy comes first, on the device:",
                sweep,
            ]
    return "\n\n".join(blocks)


def show(record: dict) -> str:
    """All tables of one record, whatever its size and device."""
    return _blocks("this record", record, record["environment"]["device"]["type"])


def _origin(name: str, record: dict) -> str:
    environment, settings = record["environment"], record["settings"]
    device, versions = environment["device"], environment["versions"]
    threads = f" ({device['threads']} thread)" if device.get("threads") == 1 else ""
    return (
        f"{device['name']}{threads}; entries of {settings['num_layers']} layers, "
        f"{settings['num_kv_heads']} heads of {settings['head_dim']}, {settings['dtype']}, into a "
        f"StaticCache of one row; torch {versions['torch']}, commit {short(environment['commit'])}, "
        f"{environment['date'][:10]} (`bench/results/{name}`)."
    )


def _legend(record: dict, device_type: str) -> str:
    evicted = record["settings"]["evicted_bytes"]["cpu"] / 2**20
    floor = "one pinned copy of the same bytes"
    if device_type == "cpu":
        floor = (
            "the plain copy, and of loads with a checksum (✓) a multiple of copy and checksum "
            "one after the other"
        )
    return (
        f"Medians, from the call until the entry is in the cache; {evicted:.0f} MiB of other data are "
        f"read before each call. In brackets: a multiple of the floor, {floor}. Quantized entries "
        "count as what they become. Rivals check nothing."
    )


def goals_table(record: dict | None, device_type: str) -> str:
    """What was aimed at, and what is reached."""
    columns = COLUMNS[device_type]
    rows = []
    for goal in GOALS[device_type]:
        figures = []
        for what in columns:
            value = goal.figure(record, what) if record else None
            text = NOT_MEASURED if value is None else f"{_three(value)}{goal.unit}"
            figures.append(text if what in goal.times else "")
        rows.append([goal.what, goal.goal, *figures])
    return table(["what", "goal", *columns.values()], rows)


def loads_table(record: dict, device_type: str, what: str) -> str:
    """Every load of a record by size: its median and how many times the floor that is."""
    sizes = [tokens for tokens in TOKENS if tokens in record["settings"]["tokens"]]
    sizes += [tokens for tokens in record["settings"]["tokens"] if tokens not in sizes]
    rows = []
    for source in record["settings"]["sources"]:
        for load in kv_loads.loads_from(source, device_type):
            cells = [_cell(record, source, tokens, load.name, what) for tokens in sizes]
            if what == "device" and set(cells) == {NOT_MEASURED}:
                continue
            check = " ✓" if load.checksum else ""
            name = f"**{load.name}**" if load.kind == "ours" else load.name
            rows.append([source, f"{name}{check}", load.legend, *cells])
    model = record["settings"]
    each = 4 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"]
    header = [f"{n} token{'s' if n > 1 else ''}, {_three(each * n / 1e6)} MB" for n in sizes]
    return table(["from", "load", "its time includes", *header], rows, left=3)


def _cell(record: dict, source: str, tokens: int, name: str, what: str) -> str:
    case = records.kv_case(record, source, tokens)
    row = records.kv_row(case, name)
    if row is None or not row.get(what):
        return NOT_MEASURED
    ratio = records.kv_times_floor(case, row, what)
    factor = "" if ratio is None else f" ({_three(ratio)})"
    return f"{duration(row[what]['p50'])}{factor}"


def crossover_table(record: dict) -> str:
    """Direct reads against staging by size; "" if neither was timed."""
    rows = []
    for case in record["cases"]:
        ways = [records.kv_row(case, f"launch, {way}") for way in ("direct", "staged")]
        if case["source"] != "pinned memory" or not any(ways):
            continue
        floor = records.kv_floor(case, checksum=False)
        figures = [row and row.get("device") for row in (*ways, floor)]
        cells = [duration(f["p50"]) if f else NOT_MEASURED for f in figures]
        rows.append([f"{case['tokens']}", f"{case['bytes'] / 1e6:.3g} MB", *cells])
    header = ["tokens", "bytes", "direct", "staged", "one pinned copy"]
    return table(header, rows, left=0) if rows else ""


def duration(milliseconds: float) -> str:
    """``"93.1 µs"``, ``"4.57 ms"``, ``"1.2 s"``: three digits."""
    for unit, factor in (("µs", 1e3), ("ms", 1.0)):
        if milliseconds * factor < 999.5:
            return f"{_three(milliseconds * factor)} {unit}"
    return f"{_three(1e-3 * milliseconds)} s"

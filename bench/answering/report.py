"""The tables of bench/two_pass.py: goals, floors, the paper's Tables 2 and 7, tokens/s, streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.answering import plots
from bench.answering.questions import (
    FIRST_FORWARD,
    MODES,
    SECOND_FORWARD,
    answer_row,
    first_voco,
    gemm_ms,
    saved,
    stage_ms,
    stream_row,
    was_planned,
    weights_ms,
)
from bench.harness import text
from bench.harness.family import Family, Picture, picture_links
from bench.harness.records import Records, is_on_gpu, newest_by_device
from bench.harness.text import NOT_MEASURED, duration, table

PAPER_TABLE_2 = [
    "the paper, LLaVA-1.5-7B, A100",
    "576",
    "1",
    "473 ms",
    "",
    "366 ms",
    "356 ms",
    "10.4 ms",
]
"""Supplement, Table 2; its wall time includes everything that their test reads and writes."""

PAPER_TABLE_7 = {
    "uncached": ["", "", "", "440 ms", "", "", "9.6 TFLOP"],
    "full cache": ["", "", "", "155 ms", "65%", "302 MB", "1.2 TFLOP"],
    "voco": ["", "", "", "134 ms", "70%", "0.525 MB", "0.5 TFLOP"],
}
"""Table 7, batch 1: CUDA time, cache, FLOPs."""

EXPECTED = {
    "cuda": ("LLaVA-1.5-7B", "LLaVA-1.6-Mistral-7B", "LLaVA-1.5-13B", "LLaVA-1.6-34B"),
    "cpu": ("the demo's small LLaVA", "a small LLaVA-NeXT"),
}
"""The models of a complete record."""

TITLES = {
    "uncached": "nothing cached",
    "full cache": "all tokens cached",
    "voco": "VoCo cached",
    "stock generate": "stock `generate`",
    "voco generate": "`voco_model.generate`",
}


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Attributes:
        what, goal: in words; the goal is for LLaVA-1.5-7B on an H200.
        figure: of a record and one of its cases, in words; None if it wasn't measured.
    """

    what: str
    goal: str
    figure: Callable[[dict, dict], str | None]


def _second_pass(record: dict, case: dict) -> str | None:
    row = answer_row(case, "voco", 1, first_voco(record), images="stored")
    if row is None:
        return None
    return f"{stage_ms(row, SECOND_FORWARD) / weights_ms(record, case):.2f}"


def _first_pass(record: dict, case: dict) -> str | None:
    row = answer_row(case, "voco", 1, first_voco(record), images="new")
    if row is None:
        return None
    floor = gemm_ms(record, row["flops"]["prefix"]["useful"])
    return f"{stage_ms(row, ('prefix', 'extract')) / floor:.2f}"


def _decode_step(record: dict, case: dict) -> str | None:
    row = answer_row(case, "voco", 1, first_voco(record), images="stored")
    if row is None or "decode" not in row:
        return None
    return f"{row['decode']['p50'] / weights_ms(record, case):.2f}"


def _saved(batch: int) -> Callable[[dict, dict], str | None]:
    def figure(record: dict, case: dict) -> str | None:
        share = saved(case, batch, first_voco(record))
        return None if share is None else f"{100 * share:.1f}%"

    return figure


def _smaller(record: dict, case: dict) -> str | None:
    full = answer_row(case, "full cache", 1, 0)
    own = answer_row(case, "voco", 1, first_voco(record), images="stored")
    if not full or not own:
        return None
    return f"{full['cache_bytes'] / own['cache_bytes']:.0f}"


_WEIGHTS = "× the time to read the weights"
GOALS = [
    Goal(f"second pass (load and prefill), batch 1: {_WEIGHTS}", "≤ 1.25", _second_pass),
    Goal("pass 1 without its vision tower, batch 1: × its GEMM floor", "≤ 1.3", _first_pass),
    Goal("VoCo cached against nothing cached, batch 1: time lower by", "≥ 75%", _saved(1)),
    Goal("the same, batch 8", "≥ 83%", _saved(8)),
    Goal("cache of all tokens: × that of the VoCo tokens", "576", _smaller),
    Goal(f"a decoding step, batch 1: {_WEIGHTS}", "", _decode_step),
]


def tables(results: Records, device_type: str) -> str:
    """The newest record of each device of a type; without any the goals, "not measured".

    Args:
        results: two_pass records by file name, oldest first.
        device_type: "cpu" or "cuda".
    """
    newest = newest_by_device(results, device_type)
    return "\n\n".join(_blocks(name, record) for name, record in newest) or _nothing(device_type)


def show(record: dict) -> str:
    """All tables of one record."""
    return _blocks("", record)


def _nothing(device_type: str) -> str:
    titles = EXPECTED[device_type]
    goals = [[goal.what, goal.goal, *[NOT_MEASURED] * len(titles)] for goal in GOALS]
    rows = []
    for title in titles:
        for name in MODES:
            rows.append([title, "1", TITLES[name], *[NOT_MEASURED] * 7])
    return "\n\n".join(
        [
            f"{NOT_MEASURED.capitalize()} yet.",
            table(["what", "goal", *titles], goals),
            table(_TABLE_7, [*rows, *_paper_table_7()], left=3),
        ]
    )


def _blocks(name: str, record: dict) -> str:
    blocks = [_origin(name, record), goals_table(record)]
    absent = [
        f"{case['title']}: {case['rows'][0]['reason']}."
        for case in record["cases"]
        if case["rows"] and not any(row["status"] == "ok" for row in case["rows"])
    ]
    blocks += absent
    for title, made in (
        ("**Floors**, in the same run", floors_table(record)),
        (
            "**Table 2 of the paper's supplement**: one question about a new image",
            table_2(record),
        ),
        (
            "**Table 7 of the paper**: time to the first token, by stage; images seen before",
            table_7(record),
        ),
        (
            "**Decoding**, and the time from the request to the first token on the host's clock",
            decode_table(record),
        ),
        ("**Streams**: answers per second", stream_table(record)),
        ("**Checks** before timing", agreement_table(record)),
    ):
        if made:
            blocks += [f"{title}:", made]
    return "\n\n".join(blocks)


def _origin(name: str, record: dict) -> str:
    settings, ceilings = record["settings"], record["ceilings"]
    product = text.rate(ceilings["matmul_tflops"], "FLOP/s")
    copy = text.rate(ceilings["copy_tb_per_s"], "B/s")
    return (
        f"{text.device(record)}, {settings['dtype']}, random weights; {settings['text_tokens']} text "
        f"tokens, answers of {settings['new_tokens']}; measured in the same run: product {product}, "
        f"copy {copy}; {text.provenance({name: record}, ['torch', 'transformers'])}."
    )


def _measured(record: dict) -> list[dict]:
    return [case for case in record["cases"] if "language_bytes" in case]


def goals_table(record: dict) -> str:
    """The goals, and what is reached."""
    rows = []
    for goal in GOALS:
        figures = [
            (goal.figure(record, case) if "language_bytes" in case else None) or NOT_MEASURED
            for case in record["cases"]
        ]
        rows.append([goal.what, goal.goal, *figures])
    titles = [case["title"] for case in record["cases"]]
    return table(["what", "goal (7B, H200)", *titles], rows)


def floors_table(record: dict) -> str:
    """What no implementation can beat at the rates of this run, beside what was measured."""
    rows = []
    first = first_voco(record)
    for case in _measured(record):
        new = answer_row(case, "voco", 1, first, images="new")
        stored = answer_row(case, "voco", 1, first, images="stored")
        plain = answer_row(case, "uncached", 1, 0)
        for what, row, stages, flops in (
            ("vision tower", new, ("vision",), "vision"),
            ("pass 1, prefix", new, ("prefix", "extract"), "prefix"),
            ("pass 2, load and prefill", stored, SECOND_FORWARD, "prefill"),
            ("nothing cached, prefill", plain, ("prefill",), "prefill"),
        ):
            if row is None:
                rows.append([case["title"], what, *[NOT_MEASURED] * 4])
                continue
            useful = gemm_ms(record, row["flops"][flops]["useful"])
            weights = None if what == "vision tower" else weights_ms(record, case)
            floor = max(useful, weights or 0.0)
            took = stage_ms(row, stages)
            rows.append(
                [
                    case["title"],
                    what,
                    duration(useful),
                    "" if weights is None else duration(weights),
                    duration(took),
                    f"{took / floor:.2f}",
                ]
            )
    header = ["model", "what", "its FLOPs", "its weights, read", "measured", "× the larger floor"]
    return table(header, rows, left=2) if rows else ""


def table_2(record: dict) -> str:
    """Totals of one answer's first token, and the two passes."""
    rows = []
    for case in _measured(record):
        stock = answer_row(case, "stock generate", 1, 0)
        plain = answer_row(case, "uncached", 1, 0)
        for count in record["settings"]["num_voco"]:
            new = answer_row(case, "voco", 1, count, images="new")
            forwards = [
                duration(stage_ms(new, stages)) if new else NOT_MEASURED
                for stages in (FIRST_FORWARD, SECOND_FORWARD)
            ]
            walls = [
                duration(row["wall"]["p50"]) if row else NOT_MEASURED for row in (stock, plain, new)
            ]
            rows.append([case["title"], str(case["vision_tokens"]), str(count), *walls, *forwards])
    header = [
        "model",
        "vision tokens",
        "VoCo tokens",
        "plain, stock `generate`",
        "plain, engine",
        "VoCo, engine",
        "first forward",
        "second forward",
    ]
    return table(header, [*rows, PAPER_TABLE_2]) if rows else ""


_TABLE_7 = [
    "model",
    "batch",
    "cached",
    "image encoding",
    "cache load",
    "transformer forward",
    "in all (p20 to p80)",
    "lower by",
    "cache an image",
    "FLOPs a request: all (useful)",
]


def _paper_table_7() -> list[list[str]]:
    return [["the paper, A100", "1", TITLES[name], *PAPER_TABLE_7[name]] for name in MODES]


def table_7(record: dict) -> str:
    """Times, bytes and FLOPs by mode, batch and number of VoCo tokens."""
    rows = []
    for case in _measured(record):
        for batch in record["settings"]["batches"]:
            for name, images in MODES.items():
                for count in record["settings"]["num_voco"] if name == "voco" else [0]:
                    which = dict(name=name, batch=batch, num_voco=count, images=images)
                    if not was_planned(case, kind="answer", **which):
                        continue
                    row = answer_row(case, **which)
                    title = f"{count} {TITLES[name]}" if count else TITLES[name]
                    cells = _table_7_cells(case, row, batch, count)
                    rows.append([case["title"], str(batch), title, *cells])
    return table(_TABLE_7, [*rows, *_paper_table_7()], left=3) if rows else ""


def _table_7_cells(case: dict, row: dict | None, batch: int, num_voco: int) -> list[str]:
    if row is None:
        return [NOT_MEASURED] * 7
    stages = [
        duration(row["stages"][stage]["p50"]) if stage in row["stages"] else ""
        for stage in ("vision", "load", "prefill")
    ]
    low, high = (duration(row["device"][at]) for at in ("p20", "p80"))
    share = None
    if row["name"] != "uncached":
        share = saved(case, batch, num_voco, row["name"])
    counts = [sum(part[kind] for part in row["flops"].values()) for kind in ("full", "useful")]
    compiled = ", compiled" if row["compiled"] else ""
    return [
        *stages,
        f"{duration(row['device']['p50'])} ({low} to {high}{compiled})",
        "" if share is None else f"{100 * share:.1f}%",
        text.nbytes(row["cache_bytes"]) if row["cache_bytes"] else "",
        f"{text.flops(counts[0])} ({text.flops(counts[1])})",
    ]


def decode_table(record: dict) -> str:
    """Time to the first token on the host's clock, tokens per second after it, and memory."""
    rows = []
    on_gpu = is_on_gpu(record)
    first = first_voco(record)
    names = [("stock generate", "read", 0), ("voco generate", "stored", first)]
    names += [(name, images, first if name == "voco" else 0) for name, images in MODES.items()]
    for case in _measured(record):
        for batch in record["settings"]["batches"]:
            for name, images, count in names:
                which = dict(name=name, batch=batch, num_voco=count, images=images)
                if not was_planned(case, kind="answer", **which):
                    continue
                row = answer_row(case, **which)
                title = f"engine, {TITLES[name]}" if name in MODES else TITLES[name]
                rows.append([case["title"], str(batch), title, *_decode_cells(record, case, row)])
                if not on_gpu:
                    rows[-1].pop()
    header = [
        "model",
        "batch",
        "what",
        "first token",
        "each further step",
        "× reading the weights",
        "tokens/s",
        "cache of the engine",
        "peak memory",
    ]
    return table(header if on_gpu else header[:-1], rows, left=3) if rows else ""


def _decode_cells(record: dict, case: dict, row: dict | None) -> list[str]:
    if row is None:
        return [NOT_MEASURED] * 6
    step = row.get("decode")
    return [
        duration(row["wall"]["p50"]),
        duration(step["p50"]) if step else "",
        f"{step['p50'] / weights_ms(record, case):.2f}" if step else "",
        text.three(row["tokens_per_s"]) if "tokens_per_s" in row else NOT_MEASURED,
        text.nbytes(row["kv_bytes"]) if "kv_bytes" in row else "",
        text.nbytes(row["peak_bytes"]) if row["peak_bytes"] else "",
    ]


def stream_table(record: dict) -> str:
    """Answers per second by the share of images that came before."""
    shares = record["settings"]["shares"]
    rows = []
    for case in _measured(record) if shares else []:
        for name in ("stock generate", *MODES):
            if not was_planned(case, kind="stream", name=name):
                continue
            cells = []
            for share in shares:
                row = stream_row(case, name, share)
                cells.append(text.three(row["answers_per_s"]) if row else NOT_MEASURED)
            title = f"engine, {TITLES[name]}" if name in MODES else TITLES[name]
            rows.append([case["title"], title, *cells])
    header = ["model", "what", *(f"r = {share:g}" for share in shares)]
    return table(header, rows, left=2) if rows else ""


def agreement_table(record: dict) -> str:
    """How far the answers of each timed engine agree with those of ``generate``."""
    rows = []
    for case in _measured(record):
        seen = set()
        for row in case["rows"]:
            which = (row["name"], row["num_voco"], row["compiled"])
            found = row.get("agreement")
            if not found or row["name"] not in MODES or which in seen:
                continue
            seen.add(which)
            title = (
                f"{row['num_voco']} {TITLES[row['name']]}"
                if row["num_voco"]
                else TITLES[row["name"]]
            )
            noise = found["noise"]
            rows.append(
                [
                    case["title"],
                    f"{title}, compiled" if row["compiled"] else title,
                    f"{found['first_identical']} of {found['answers']}",
                    f"{found['identical']} of {found['tokens']}",
                    f"{found['gap']:.2g}",
                    f"{noise:.2g}"
                    if noise is not None
                    else f"{NOT_MEASURED}: {found['noise_reason']}",
                ]
            )
    header = [
        "model",
        "engine",
        "first tokens equal to `generate`'s",
        "all tokens",
        "logit gap to the largest",
        "noise of the logits",
    ]
    return table(header, rows, left=2) if rows else ""


def _label(case: dict, row: dict | None) -> str:
    if row is None:
        return case["model"]
    return (
        f"{case['model']} {row['name']} {row['kind']} batch {row['batch']} VoCo {row['num_voco']}"
    )


PICTURES = (
    Picture("Time to the first token by stage", plots.plot_stages, has=plots.has_stages),
    Picture(
        "Answers per second by the share of images seen before",
        plots.plot_streams,
        has=plots.has_streams,
        suffix="-streams",
    ),
)
FAMILY = Family(
    name="two_pass",
    show=show,
    record_keys={"cases": list, "ceilings": dict},
    case_keys={"model": str, "title": str, "fits": bool, "rows": list},
    row_keys={
        "name": str,
        "kind": str,
        "images": str,
        "num_voco": int,
        "batch": int,
        "compiled": bool,
        "status": str,
    },
    times=("wall",),
    choices={"kind": ("answer", "stream")},
    label=_label,
    tables={
        "two-pass": lambda results, link: tables(results, "cuda"),
        "two-pass-cpu": lambda results, link: tables(results, "cpu"),
        "two-pass-plot": lambda results, link: picture_links(PICTURES, results, link),
    },
    pictures=PICTURES,
)

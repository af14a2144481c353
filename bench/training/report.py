"""The tables of bench/train.py: a step by method, the paper's Table 5, the checks before the clock."""

from __future__ import annotations

from bench.harness import text
from bench.harness.family import Family
from bench.harness.records import Records, named, newest_by_device, timed
from bench.harness.text import NOT_MEASURED, duration, table

METHODS = {
    "dense": "dense mask, SDPA, padded",
    "flex": "FlexAttention, padded",
    "padded": "`masked_attention`, padded",
    "packed": "`masked_attention`, packed",
    "q-former": "Q-Former, padded",
}
"""Titles by name, in the order of the tables."""

OVERALL_BATCH = 128
"""Samples of a step on all of the paper's eight GPUs (supplement, Table 1)."""

PAPER_TABLE_5 = [
    ["the paper: VoCo-LLaMA, 7B", "", "", "18,672 s", "19.34 GB"],
    ["the paper: Q-Former", "", "", "14,479 s", "17.82 GB"],
]
"""Supplement, Table 5: the whole training, and the memory of each of eight A100."""


def tables(results: Records, device_type: str) -> str:
    """The newest record of each device of a type; without any "not measured".

    Args:
        results: train records by file name, oldest first.
        device_type: "cpu" or "cuda".
    """
    newest = newest_by_device(results, device_type)
    if not newest:
        empty = {"rows": [], "samples": 0, "padding": 0.0}
        blocks = [f"{NOT_MEASURED.capitalize()} yet.", steps_table(empty, list(METHODS))]
        return "\n\n".join([*blocks, table_5(empty, list(METHODS))])
    return "\n\n".join(_blocks(name, record) for name, record in newest)


def show(record: dict) -> str:
    """All tables of one record."""
    return _blocks("", record)


def _blocks(name: str, record: dict) -> str:
    blocks = [_origin(name, record)]
    methods = record["settings"]["methods"]
    for case in record["cases"]:
        blocks += [_batch(record, case), steps_table(case, methods)]
        blocks += [
            f"{row['title']}: {row['status']}, {row['reason']}."
            for row in case["rows"]
            if row["status"] != "ok"
        ]
        blocks += ["**Table 5 of the paper's supplement**:", table_5(case, methods)]
        checks = checks_table(case)
        blocks += ["**Checks** before timing:", checks] if checks else []
    return "\n\n".join(blocks)


def _origin(name: str, record: dict) -> str:
    settings = record["settings"]
    product = text.rate(record["ceilings"]["matmul_tflops"], "FLOP/s")
    checkpointing = "with" if settings["checkpointing"] else "without"
    return (
        f"{text.device(record)}, {settings['dtype']}, random weights, {settings['optimizer']}, "
        f"{checkpointing} gradient checkpointing; a large product in the same run {product}; "
        f"{text.provenance({name: record}, ['torch', 'transformers'])}."
    )


def _batch(record: dict, case: dict) -> str:
    texts = case["texts"]
    steps = max((row["timing"]["repeats"] for row in timed(case)), default=0)
    voco = record["settings"]["num_voco"]
    return (
        f"**{case['title']}**: a step of {case['samples']} samples, {case['images']} of them with an "
        f"image of {case['vision_tokens']} tokens and {text.plural(voco, 'VoCo token')}; texts of "
        f"{min(texts)} to {max(texts)} tokens, {sum(texts) / len(texts):.0f} on average. Medians of "
        f"{steps} steps."
    )


def steps_table(case: dict, methods: list[str]) -> str:
    """A step by method. What was wrong or not run has no figure, and nothing is compared with it."""
    rows = []
    dense = named(case, "dense")
    for name in methods:
        row = named(case, name)
        if row is None:
            rows.append([METHODS[name], *[NOT_MEASURED] * 6])
            continue
        timing = row["timing"]
        ratio = NOT_MEASURED
        if name == "q-former":
            ratio = ""  # another method: it has other tokens
        elif dense is not None:
            ratio = f"{dense['timing']['p50'] / timing['p50']:.2f}"
        low, middle, high = (duration(timing[at]) for at in ("p20", "p50", "p80"))
        rows.append(
            [
                row["title"],
                f"{middle} ({low} to {high})",
                ratio,
                text.three(row["tokens_per_s"]),
                f"{100 * row['padding']:.0f}%",
                text.rate(row["tflops"], ""),
                _memory(row),
            ]
        )
    header = [
        "method",
        "a step (p20 to p80)",
        "× dense mask",
        "useful tokens/s",
        "padding",
        "useful FLOP/s",
        "peak memory",
    ]
    return table(header, rows)


def table_5(case: dict, methods: list[str]) -> str:
    """Time and memory beside the paper's, whose time is that of a whole training."""
    rows = []
    for name in methods:
        row = named(case, name)
        if row is None:
            rows.append([METHODS[name], NOT_MEASURED, NOT_MEASURED, "", ""])
            continue
        time = row["timing"]["p50"] * OVERALL_BATCH / case["samples"]
        rows.append([row["title"], duration(time), _memory(row), "", ""])
    header = [
        "method",
        f"{OVERALL_BATCH} samples, one device",
        "peak memory",
        "the whole training, 8 A100",
        "memory of each",
    ]
    return table(header, [*rows, *PAPER_TABLE_5])


def checks_table(case: dict) -> str:
    """How far losses and gradients are from the dense mask's, and how far they may be."""
    rows = []
    for row in case["rows"]:
        small, large = row.get("check_small"), row.get("check")
        if not small or "loss_error" not in small or not large or "loss_limit" not in large:
            continue
        rows.append(
            [
                row["title"],
                f"{small['loss_error']:.1e} ({small['loss_limit']:.1e})",
                f"{small['gradient_error']:.1e} ({small['gradient_limit']:.1e})",
                f"{large['loss']:.6f}",
                f"{large['loss_difference']:.1e} ({large['loss_limit']:.1e})",
                f"{large['gradient_norm_ratio']:.6f}",
            ]
        )
    header = [
        "method",
        "small model, fp32: loss's error (limit)",
        "gradients' error (limit)",
        "loss of this model",
        "difference to the first (limit)",
        "gradient norm / the first's",
    ]
    return table(header, rows) if rows else ""


def _memory(row: dict) -> str:
    return f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else NOT_MEASURED


FAMILY = Family(
    name="train",
    show=show,
    record_keys={"cases": list, "ceilings": dict},
    case_keys={
        "model": str,
        "title": str,
        "layers": int,
        "samples": int,
        "texts": list,
        "rows": list,
    },
    row_keys={"name": str, "title": str, "packed": bool, "status": str},
    times=("timing", "tflops"),
    label=lambda case, row: f"{case['title']} {row['name']}" if row else case["title"],
    tables={
        "train": lambda results, link: tables(results, "cuda"),
        "train-cpu": lambda results, link: tables(results, "cpu"),
    },
)

"""The README's one figure and its table of four rows, from all records of bench/attn.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bench.attention.questions import best_pieces, our_row, times_faster
from bench.harness.records import Records, device_of, is_on_gpu, named
from bench.harness.text import NOT_MEASURED, table

Rival = Callable[[dict], dict | None]


def _two_calls(case: dict) -> dict | None:
    return best_pieces(case, drop_in=True)


def _flex(case: dict) -> dict | None:
    return named(case, "flex")


def _dense(case: dict) -> dict | None:
    return named(case, "sdpa-dense")


RIVALS: dict[str, Rival] = {
    "× two fused calls": _two_calls,
    "× FlexAttention": _flex,
    "× SDPA with the dense mask": _dense,
}


def headline(results: Records) -> str:
    """One sentence: the forward pass on a GPU against its rivals."""
    cases, device = _cases(results, "forward", gpu=True)
    if not cases:
        return f"Attention on a GPU: {NOT_MEASURED}."
    two_calls, flex = (_range(_ratios(cases, rival)) for rival in (_two_calls, _flex))
    return (
        f"On an {device}, one call is {two_calls} times as fast as the best two calls of cuDNN or "
        f"FlashAttention-2, and {flex} times as fast as FlexAttention (bf16, forward, "
        f"{len(cases)} shapes)."
    )


def summary(results: Records) -> str:
    """Four rows: forward, and forward with backward, on a GPU and on a CPU; the least and most of all
    shapes."""
    rows = []
    for gpu in (True, False):
        for direction in ("forward", "forward+backward"):
            cases, device = _cases(results, direction, gpu=gpu)
            place = device or ("a GPU" if gpu else "a CPU")
            ranges = [_range(_ratios(cases, rival)) for rival in RIVALS.values()]
            rows.append([f"{place}, {direction}", *ranges])
    return table(["`masked_attention` on", *RIVALS], rows)


def _cases(results: Records, direction: str, *, gpu: bool) -> tuple[list[dict], str]:
    """The newest case of each shape and ratio of heads on one kind of device, and the device."""
    newest: dict[tuple, dict] = {}
    device = ""
    for record in results.values():
        if is_on_gpu(record) != gpu:
            continue
        for case in record["cases"]:
            if case["direction"] == direction and our_row(case) is not None:
                newest[case["shape"], case["num_heads"], case["num_kv_heads"]] = case
                device = device_of(record)
    return list(newest.values()), device


def _ratios(cases: Iterable[dict], rival: Rival) -> list[float]:
    found = [times_faster(case, rival(case)) for case in cases]
    return [ratio for ratio in found if ratio is not None]


def _range(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else NOT_MEASURED

"""Small records and cases that several test files use."""

from __future__ import annotations

import pytest
import torch

from bench.attention.measure import make_case
from bench.attention.shapes import SIZES


@pytest.fixture
def tiny_case():
    """``tiny_case("A", backward=True)``: a tiny shape's case on the CPU, float32, grouped heads."""

    def make(name: str, backward: bool, heads: tuple[int, int] = (4, 2)):
        direction = "forward+backward" if backward else "forward"
        shape, device = SIZES["tiny"].shapes[name], torch.device("cpu")
        return make_case(shape, heads, 16, torch.float32, device, direction=direction)

    return make


def timed_row(name: str, p50: float, **changes) -> dict:
    """A row as ``bench/attn.py`` writes it."""
    row = {
        "name": name,
        "ours": name.startswith("voco "),
        "masked": name != "sdpa-causal",
        "drop_in": not name.endswith("-parts"),
        "status": "ok",
        "errors": {"out": {"error": 1e-3, "limit": 4e-3}},
        "timing": {
            "p20": 0.9 * p50,
            "p50": p50,
            "p80": 1.1 * p50,
            "repeats": 10,
            "host_ms": 0.01,
            "graph_p50": None,
            "graph_reason": None,
        },
        "tflops": 100.0 / p50,
        "extra_bytes": 1_000_000,
        "setup_ms": {},
    }
    return {**row, **changes}


@pytest.fixture
def record():
    """A record of one GPU with two cases: figures made up, for tests of tables alone."""
    rows = [
        timed_row("voco triton", 1.0),
        timed_row("fa2-two-call", 1.5),
        timed_row("fa2-varlen", 1.25),
        timed_row("cudnn-two-call-parts", 1.1),
        timed_row("flex", 2.0),
        timed_row("sdpa-causal", 1.7),
        {**timed_row("sdpa-dense", 8.0), "status": "failed", "reason": "out of memory"},
    ]
    for key in ("timing", "tflops"):
        del rows[-1][key]

    def case(direction: str) -> dict:
        return {
            "shape": "A",
            "title": SIZES["full"].shapes["A"].title,
            "direction": direction,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "dtype": "bfloat16",
            "batch": 16,
            "length": 691,
            "pairs": 1,
            "flops": 100,
            "rows": rows,
        }

    timing = timed_row("", 0.02)["timing"]
    return {
        "schema": 1,
        "bench": "attn",
        "finished": True,
        "environment": {
            "date": "2030-01-02 03:04 UTC",
            "commit": "0123456789abcdef",
            "sources_sha256": "f" * 64,
            "device": {"type": "cuda", "name": "NVIDIA Test"},
            "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        },
        "settings": {
            "size": "full",
            "dtype": "bf16",
            "head_dim": 128,
            "quick": False,
            "directions": ["forward", "forward+backward"],
        },
        "ceilings": {"matmul_tflops": 700.0, "copy_tb_per_s": 3.0},
        "unavailable": {"flash-attn2-varlen": "flash_attn is not installed"},
        "cases": [case("forward"), case("forward+backward")],
        "layouts": [
            {
                "shape": "A",
                "status": "ok",
                "notes": [],
                "layout": timing,
                "block_mask": {**timing, "p50": 2.0},
                "block_mask_compiled": {**timing, "p50": 1.0},
                "ratio": 50.0,
            }
        ],
    }

"""The two averages, the paper's rows, and the table of both."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig

from voco_model.evaluate.paper import COLUMNS, REPORTED, model_of, reported
from voco_model.evaluate.tables import Row, retention, share, table

SEVEN = COLUMNS["LLaVA-1.5-7B"]


def row_of(model: str, method: str, tokens: int | None = None):
    found = reported(model, method, tokens)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "method, printed",
    [("full", 100.0), ("voco", 83.7), ("pooling", 64.1), ("qformer", 57.2), ("untrained", 0.0)],
)
def test_retention_gives_the_averages_that_the_paper_prints(method, printed):
    upper, lower = (row_of("LLaVA-1.5-7B", name).scores for name in ("full", "untrained"))
    row = row_of("LLaVA-1.5-7B", method, 1)
    assert row.retention == printed
    assert round(retention(row.scores, upper, lower, SEVEN), 1) == printed


@pytest.mark.parametrize(
    "model, tokens, printed, recomputed",
    [
        # From the scores as printed two of the three come out higher than the average that stands there.
        ("LLaVA-1.5-13B", 1, 93.5, 93.6),
        ("LLaVA-1.6-7B", 5, 92.7, 92.9),
        ("LLaVA-1.6-34B", 5, 94.5, 94.5),
    ],
)
def test_share_is_the_average_of_the_supplement(model, tokens, printed, recomputed):
    upper, row = row_of(model, "full"), row_of(model, "voco", tokens)
    assert row.share == printed
    assert round(share(row.scores, upper.scores, COLUMNS[model]), 1) == recomputed


def test_one_benchmark_by_hand():
    assert retention({"GQA": 50.0}, {"GQA": 60.0}, {"GQA": 40.0}, ["GQA"]) == 50.0
    assert share({"GQA": 45.0}, {"GQA": 60.0}, ["GQA"]) == 75.0


def test_no_average_where_a_score_is_missing_or_a_bound_is_no_bound():
    some, all_of = {"GQA": 50.0}, {"GQA": 50.0, "MME": 900.0}
    low = {"GQA": 40.0, "MME": 600.0}
    assert retention(some, all_of, low, ["GQA", "MME"]) is None
    assert retention(all_of, some, low, ["GQA", "MME"]) is None
    assert retention(all_of, all_of, {}, ["GQA"]) is None
    assert retention(some, some, some, ["GQA"]) is None  # equal bounds
    assert share(some, all_of, ["GQA", "MME"]) is None
    assert share(some, {"GQA": 0.0}, ["GQA"]) is None
    assert retention(some, some, low, []) is None and share(some, some, []) is None


def test_rows_of_the_paper_have_its_columns():
    for row in REPORTED:
        assert set(row.scores) <= set(COLUMNS[row.model])
        assert row.scores or row.retention
    keys = [(row.model, row.method, row.tokens) for row in REPORTED]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "config, name",
    [
        (LlavaConfig(text_config=LlamaConfig()), "LLaVA-1.5-7B"),
        (
            LlavaConfig(
                text_config=LlamaConfig(
                    hidden_size=5120, num_hidden_layers=40, num_attention_heads=40
                )
            ),
            "LLaVA-1.5-13B",
        ),
        (LlavaNextConfig(text_config=MistralConfig()), "LLaVA-1.6-7B"),
        (
            LlavaNextConfig(
                text_config=LlamaConfig(
                    hidden_size=7168, num_hidden_layers=60, num_attention_heads=56
                )
            ),
            "LLaVA-1.6-34B",
        ),
        (LlavaNextConfig(text_config=LlamaConfig()), None),  # with Vicuna-7B
        (LlavaConfig(text_config=LlamaConfig(num_hidden_layers=2)), None),
    ],
)
def test_the_papers_name_of_a_model(config, name):
    assert model_of(config) == name


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def ours() -> list[Row]:
    return [
        Row("voco", "VoCo-LLaMA", 1, {"GQA": 55.0, "MME": 1200.0}),
        Row("untrained", "VoCo mask, untrained", 1, {"GQA": 40.0, "MME": 600.0}),
        Row("full", "All tokens", 576, {"GQA": 60.0, "MME": 1500.0}),
        Row("voco", "VoCo-LLaMA", 8, {"GQA": 58.0}),
    ]


def test_table_has_ours_and_beside_it_the_papers_own():
    head, _, *lines = cells(table(ours(), "LLaVA-1.5-7B"))
    assert head == ["method", "tokens", "GQA", "MME", "retention %", "share of upper %"]
    assert lines == [
        ["All tokens", "576", "60.0", "1500.0", "100.0", "100.0"],
        ["paper's (Table 1)", "576", "61.1", "1487.2", "100.0", "100.0"],
        ["VoCo-LLaMA", "8", "58.0", "-", "-", "-"],
        # Its 91.3 is an average of seven benchmarks, not of these two.
        ["paper's (Table 2)", "8", "-", "-", "-", "-"],
        # (15/20 + 600/900) / 2 and (55/60 + 1200/1500) / 2
        ["VoCo-LLaMA", "1", "55.0", "1200.0", "70.8", "85.8"],
        # (19.3/23.4 + 706/869.9) / 2 and (57.0/61.1 + 1323.3/1487.2) / 2
        ["paper's (Table 1)", "1", "57.0", "1323.3", "81.8", "91.1"],
        ["VoCo mask, untrained", "1", "40.0", "600.0", "0.0", "53.3"],
        ["paper's (Table 1)", "1", "37.7", "617.3", "0.0", "51.6"],
    ]


def test_table_shows_a_printed_average_where_it_covers_what_is_shown():
    scores = dict.fromkeys(SEVEN, 50.0)
    lines = cells(table([Row("voco", "VoCo-LLaMA", 8, scores)], "LLaVA-1.5-7B"))
    assert lines[0][2:-2] == list(SEVEN)
    assert lines[3] == ["paper's (Table 2)", "8", *["-"] * 7, "91.3", "-"]
    assert lines[2][-2:] == ["-", "-"]  # no bounds were measured


def test_table_of_a_model_that_the_paper_does_not_have():
    lines = cells(table([Row("full", "All tokens", None, {"GQA": 60.0, "mine score": 0.12345})]))
    assert lines[0] == ["method", "tokens", "GQA", "mine score", "retention %", "share of upper %"]
    assert lines[2:] == [["All tokens", "by image", "60.0", "0.1235", "-", "100.0"]]


def test_seed_is_reported_by_the_model():
    scores = {"SEED": 58.0, "SEED-I": 66.0}
    small = cells(table([Row("full", "All tokens", 576, scores)], "LLaVA-1.5-7B"))
    large = cells(table([Row("full", "All tokens", 576, scores)], "LLaVA-1.5-13B"))
    assert small[0][2:-2] == ["SEED"] and small[2][2] == "58.0" and small[3][2] == "57.9"
    assert large[0][2:-2] == ["SEED-I"] and large[2][2] == "66.0" and large[3][2] == "68.2"

import re

import pytest

from voco_model.miniature import report
from voco_model.miniature.results import Rows


def row(name, tokens, seed, one, other):
    return {
        "row": name,
        "tokens": tokens,
        "seed": seed,
        "accuracy": {"digit": one, "colour": other},
        "cache_bytes": 4096 * tokens,
        "flops_first": 2_000_000,
        "flops_again": 1_000_000,
    }


@pytest.fixture
def results():
    rows = []
    for seed in (0, 1):
        rows += [
            row("full", 144, seed, 1.0, 0.8),
            row("untrained", 1, seed, 0.2, 0.2),
            row("untrained", 2, seed, 0.3, 0.3),
            row("voco", 1, seed, 0.8 - 0.2 * seed, 0.8),
            row("voco", 2, seed, 0.9, 0.8),
            row("qformer", 1, seed, 0.4, 0.2),
        ]
    return {
        "recipe": {
            "seeds": 2,
            "pictures": 10,
            "tune_steps": 5,
            "batch": 4,
            "shape": {"layers": 3, "hidden": 8},
        },
        "date": "2026-01-01",
        "machine": {"device": "a CPU", "torch": "2.13", "transformers": "5.17"},
        "seconds": 120,
        "rows": rows,
        "without places": {"digit": 0.25, "colour": 0.5},
    }


def test_retention_is_counted_between_each_seeds_bounds(results):
    rows = Rows(results)
    # Bounds 0.9 and 0.2 of the mean over kinds; VoCo has 0.8, then 0.7.
    assert rows.accuracy("voco", 1) == pytest.approx([0.8, 0.7])
    assert rows.retention("voco", 1) == pytest.approx([0.6 / 0.7, 0.5 / 0.7])
    assert rows.retention("voco", 1, "digit") == pytest.approx([0.6 / 0.8, 0.4 / 0.8])
    assert rows.share("voco", 1) == pytest.approx([0.8 / 0.9, 0.7 / 0.9])
    assert rows.retention("untrained", 1) == [0, 0]
    # Every count is measured from the lower bound of the fewest tokens.
    assert rows.retention("untrained", 2) == pytest.approx([0.1 / 0.7] * 2)


def test_a_seed_is_not_measured_by_the_bounds_of_another(results):
    for each in results["rows"]:
        if each["seed"] == 1 and each["row"] in ("full", "untrained"):
            each["accuracy"] = dict.fromkeys(
                each["accuracy"], 1.0 if each["row"] == "full" else 0.0
            )
    rows = Rows(results)
    assert rows.retention("voco", 1) == pytest.approx([0.6 / 0.7, 0.7])
    assert rows.share("voco", 1) == pytest.approx([0.8 / 0.9, 0.7])


def cells(table, label):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {label}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_show_mean_and_deviation_and_leave_out_what_was_not_done(results):
    made = report.tables(results)
    assert cells(made["main"], "VoCo |")[1:] == ["75.0 ± 7.1", "85.0 ± 0.0"]
    assert cells(made["main"], "All tokens")[1:] == ["90.0 ± 0.0", ""]
    assert cells(made["retention"], "VoCo |")[1:] == ["78.6 ± 10.1", "92.9 ± 0.0"]
    assert cells(made["retention"], "Q-Former")[1:] == ["14.3 ± 0.0", ""]
    assert cells(made["cost"], "VoCo | 2")[1:] == ["2", "8.2", "2.0", "1.0"]
    assert cells(made["kinds"], "*Who knows what")[1:] == ["", "25.0", "50.0"]
    assert "Made on a CPU, 2 minutes of one process in all;" in made["made"]
    assert set(made) == set(report.TABLES)
    for table in made.values():  # every line has as many cells as its head
        widths = {line.count("|") for line in re.findall(r"^\|.*$", table, re.M)}
        assert len(widths) <= 1


def test_one_seed_has_no_deviation(results):
    results["rows"] = [row for row in results["rows"] if row["seed"] == 0]
    assert cells(report.tables(results)["retention"], "VoCo |")[1:] == ["85.7", "92.9"]


def test_bounds_that_are_the_same_have_no_retention(results):
    for row in results["rows"]:
        row["accuracy"] = {"digit": 0.5, "colour": 0.5}
    assert cells(report.tables(results)["retention"], "VoCo |")[1:] == ["-", "-"]


def test_the_plot_is_written(results, tmp_path):
    path = tmp_path / "retention.png"
    report.plot(results, path)
    assert path.read_bytes().startswith(b"\x89PNG")

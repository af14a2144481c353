"""The committed checkpoints: what the demo shows is what the tables say."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from voco_model.miniature import show
from voco_model.miniature.exam import make_exam, score

RESULTS = Path(__file__).parents[3] / "bench/results/miniature/results.json"


@pytest.fixture(scope="module")
def pair():
    return show.load_pair()


def test_the_checkpoints_are_those_of_the_tables(pair):
    results = json.loads(RESULTS.read_text())
    rows = {(row["row"], row["tokens"]): row for row in results["rows"] if row["seed"] == 0}
    exam = make_exam(results["recipe"]["pictures"], results["recipe"]["exam_seed"])
    for method, row in zip(pair, ("full", "voco distinct"), strict=True):
        expected = rows[row, method.num_tokens]["accuracy"]
        found = score(method, exam)
        for kind, share in expected.items():
            # Another CPU may round a tie the other way: one answer of each kind at most.
            assert found[kind] == pytest.approx(share, abs=1.01 / len(exam.pictures)), kind


def test_the_checkpoints_are_small():
    size = sum(path.stat().st_size for path in show.CHECKPOINTS.rglob("*") if path.is_file())
    assert size < 15e6


def test_pictures_and_both_answers_are_shown(tmp_path):
    printed = StringIO()
    console = Console(file=printed, width=120)  # no terminal: without the pictures in colour
    show.show(console, tmp_path, pictures=1, asked=["Which digit is in the northwest?"])
    text = printed.getvalue()
    assert "▀" not in text
    exam = make_exam(1, seed=7)
    for question in exam.questions[0]:
        assert question.text in text
    assert "144 tokens" in text and "4 VoCo tokens" in text
    assert "Which digit is in the northwest?" in text
    with Image.open(tmp_path / "digits-1.png") as drawing:
        assert drawing.size == (384, 384)
        small = drawing.resize((48, 48), Image.NEAREST)
        assert small.tobytes() == exam.pictures[0].tobytes()


def test_a_picture_is_drawn_two_pixels_a_character():
    picture = make_exam(1, seed=0).pictures[0]
    drawn = show.as_text(picture)
    assert drawn.plain.count("▀") == 48 * 24
    styles = [span.style for span in drawn.spans]
    upper, lower = picture.getpixel((5, 6)), picture.getpixel((5, 7))
    colours = [f"rgb({r},{g},{b})" for r, g, b in (upper, lower)]
    assert str(styles[3 * 48 + 5]) == " on ".join(colours)


def test_who_asks_no_more_goes_on(pair, monkeypatch):
    printed = StringIO()
    console = Console(file=printed, width=120)
    said = ["How many digits?", "What is in <image>?"]

    def typed(prompt):
        if not said:
            raise EOFError  # Ctrl-D
        return said.pop(0)

    monkeypatch.setattr(console, "input", typed)
    show._converse(console, *pair, make_exam(1, seed=0).pictures[0])
    assert "How many digits?" in printed.getvalue() and "<image>" in printed.getvalue()


def test_wrong_answers_are_marked():
    class Says:
        def __init__(self, num_tokens, answers):
            self.num_tokens, self.answers = num_tokens, answers

        def answer(self, pictures, texts, **options):
            return self.answers

    questions = [
        show.Question("count", "How many digits?", "3"),
        show.Question("yours", "Why?", ""),
    ]
    table = show.answers(Says(144, ["3", "a"]), Says(1, ["4", "b"]), None, questions)
    first, second = (list(table.columns[n].cells) for n in (2, 3))
    assert [(cell.plain, cell.style) for cell in first] == [("3", "green"), ("a", "")]
    assert [(cell.plain, cell.style) for cell in second] == [("4", "red"), ("b", "")]
    assert list(table.columns[1].cells) == ["3", "?"]

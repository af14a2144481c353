"""``make demo`` on its real path, but for fewer tokens; and the arithmetic that it prints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="the demo needs the extra 'miniature'")
pytest.importorskip("sklearn", reason="the demo needs the extra 'miniature'")

from PIL import Image  # noqa: E402

from voco_model import demo  # noqa: E402
from voco_model.cli import app  # noqa: E402


def test_cache_sizes_of_llava_7b_are_those_of_the_paper():
    """The paper's Table 7 says 302.4 MB against 0.525 MB; its formula gives these."""
    assert demo.cache_bytes(32, 32, 128, 576, torch.bfloat16) == 301_989_888
    assert demo.cache_bytes(32, 32, 128, 1, torch.bfloat16) == 524_288
    sizes = [12_288, 524_288, 7_077_888, 301_989_888]
    assert [demo.readable(size) for size in sizes] == ["12.3 kB", "0.52 MB", "7 MB", "302 MB"]


def row_of(printed: str, name: str) -> list[str]:
    """The cells behind a row's name in a printed table."""
    (line,) = (line for line in printed.splitlines() if name in line)
    return [cell.strip() for cell in line.split("\u2502")[2:-1]]


def test_the_second_question_is_answered_from_the_store_as_in_one_pass(tmp_path):
    questions = ["--question", "Who [/b]?", "--question", "Where?"]  # no markup for the console
    options = ["--new-tokens", "3", "--pictures", "1", "--ask", "How many digits?"]
    found = CliRunner().invoke(app, ["demo", *options, *questions, "--out", str(tmp_path)])
    printed = found.stdout
    assert found.exit_code == 0, found.output
    assert "identical, token by token: yes (2 x 3 tokens)" in printed
    assert "the picture does come through" in printed
    assert row_of(printed, "photograph from the store") == ["no", "yes"]
    for stage in ("vision tower", "prefix", "entry taken out"):
        first, second = row_of(printed, f"pass 1: {stage}")
        assert float(first) > 0 and second == "-"
    for name in ("entry loaded", "prefill", "decode", "engine, in all", "plain LLaVA"):
        assert all(float(cell) > 0 for cell in row_of(printed, name))
    assert "How many digits?" in printed and (tmp_path / "digits-1.png").exists()
    assert "Who [/b]?" in printed and "302 MB" in printed and "0.52 MB" in printed
    with Image.open(tmp_path / "mask.png") as drawing:
        assert drawing.format == "PNG" and min(drawing.size) > 200


def test_an_answer_that_differs_is_shown_and_fails(tmp_path, monkeypatch):
    def another(*arguments):
        one = answer_in_one_pass(*arguments)
        return replace(one, tokens=(*one.tokens[:-1], one.tokens[-1] + 1))

    answer_in_one_pass = demo.answer_in_one_pass
    monkeypatch.setattr(demo, "answer_in_one_pass", another)
    options = ["--new-tokens", "2", "--question", "Who?", "--pictures", "0"]
    found = CliRunner().invoke(app, ["demo", *options, "--out", str(tmp_path)])
    assert found.exit_code == 1
    assert "token by token: NO (1 x 2 tokens)" in found.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", "no-such-file.jpg"], "no-such-file.jpg"),
        (["--num-voco", "0"], "'--num-voco'"),
        (["--pictures", "-1"], "'--pictures'"),
        (["--new-tokens", "0"], "'--new-tokens'"),
        (["--out", __file__], __file__),
        (["--image", __file__], "in no format that Pillow can read"),
        (["--ask", "What is <image>?"], "expected text without <image>"),
        (["--question", "What is <image>?"], "expected text without <image>"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    found = CliRunner().invoke(app, ["demo", *arguments])
    assert found.exit_code == 2 and message in found.stderr


def test_the_function_checks_its_arguments():
    with pytest.raises(ValueError, match="got 0, 16 and 2"):
        demo.demo(num_voco=0)
    with pytest.raises(ValueError, match="got 1, 16 and -1"):
        demo.demo(pictures=-1)

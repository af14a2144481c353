"""``python -m voco_model explain``, on a tiny checkpoint."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

import voco_model
from tests.voco_model import tiny
from voco_model import baselines
from voco_model.explain.cli import explain

pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra bench has it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``plain``, ``full`` and ``voco``, three checkpoints, and ``photo.jpg``."""
    folder = tmp_path_factory.mktemp("explain")
    model, processor = tiny.tiny_llava("llava"), tiny.tiny_processor("llava")
    for name in ("plain", "full", "voco"):
        if name == "full":
            upper = baselines.apply("full", model, processor, num_voco=2)
        if name == "voco":
            upper.undo()
            voco_model.enable(model, processor, num_voco=2)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    tiny.picture(0).save(folder / "photo.jpg")
    return folder


def run(*arguments) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(explain)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def test_a_picture_is_written(folder, tmp_path):
    output = tmp_path / "out.png"
    options = ("--model", folder / "voco", "--question", "what?", "--new-tokens", 3)
    code, text = run(folder / "photo.jpg", *options, "--output", output)
    assert code == 0, text
    assert "answer: " in text and f"written: {output}" in text
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "image, model, output, message",
    [
        ("missing.jpg", "voco", "out.png", "missing.jpg"),
        ("voco/config.json", "voco", "out.png", "expected an image, got"),
        ("photo.jpg", "plain", "out.png", "expected a model that was trained with VoCo tokens"),
        ("photo.jpg", "full", "out.png", "trained with VoCo's mask"),
        ("photo.jpg", "missing", "out.png", "missing"),
        ("photo.jpg", "voco", "out.gif", "expected a file ending in .png or .html"),
        ("photo.jpg", "missing", "folder/out.png", "expected a file in an existing folder"),
    ],
)
def test_errors(folder, tmp_path, image, model, output, message):
    code, text = run(folder / image, "--model", folder / model, "--output", tmp_path / output)
    assert code == 2 and message in text
    assert not list(tmp_path.iterdir())


def test_a_wrong_device_is_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(voco_model, "load", None)
    options = ("--model", folder / "voco", "--output", tmp_path / "out.png")
    code, text = run(folder / "photo.jpg", *options, "--device", "gpu")
    assert code == 2 and "expected cpu, cuda or cuda:N, got 'gpu'" in text

"""Checkpoints with files that are missing, cut off or pointers: told with the file's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import voco_model
from tests.voco_model import instruction
from voco_model import baselines
from voco_model.checkpoint_files import check_files, weight_files
from voco_model.cli import app
from voco_model.convert.from_authors import _vision_config

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064}\nsize 13\n"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return instruction.write_checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def shards(copy) -> Path:
    save_torch_state_dict(load_file(copy / WEIGHTS), copy, max_shard_size=100_000)
    (copy / WEIGHTS).unlink(missing_ok=True)
    assert len(weight_files(copy)) > 2
    return copy


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(ValueError) as caught:
        voco_model.load(folder)
    assert all(part in str(caught.value) for part in said), caught.value


def test_whole_checkpoints_are_let_through(copy, shards):
    check_files(copy)
    voco_model.load(copy)
    check_files("llava-hf/llava-1.5-7b-hf")  # no folder: the hub's business


@pytest.mark.parametrize(
    "name", [WEIGHTS, "tokenizer.json", "config.json", "processor_config.json"]
)
def test_a_pointer_of_git_lfs(copy, name):
    (copy / name).write_text(POINTER)
    refused(copy, f"a Git LFS pointer in {copy / name}", f"git -C {copy} lfs pull")


def test_a_pointer_that_nobody_reads_is_no_fault(copy):
    """``git lfs pull --include '*.safetensors'`` leaves the other weights as they are."""
    (copy / "pytorch_model.bin").write_text(POINTER)
    (copy / "training_args.bin").write_text(POINTER)
    voco_model.load(copy)
    (copy / WEIGHTS).unlink()
    refused(copy, f"a Git LFS pointer in {copy / 'pytorch_model.bin'}")


def test_every_way_in_says_so(copy, tmp_path):
    (copy / WEIGHTS).write_text(POINTER)
    picture = tmp_path / "0.png"
    data = instruction.write_data(tmp_path / "data")
    picture.write_bytes((data.parent / "0.png").read_bytes())
    (tmp_path / "run.yaml").write_text(json.dumps(instruction.config(copy, data, tmp_path / "run")))
    for arguments in (
        ["train", tmp_path / "run.yaml", "--dry-run"],
        ["train", tmp_path / "run.yaml"],
        ["explain", picture, "--model", copy],
        ["eval", "--model", copy, "--tasks", "gqa", "--output", tmp_path / "out"],
        ["convert", "from-authors", copy, tmp_path / "to"],
        ["convert", "to-authors", copy, tmp_path / "to"],
    ):
        found = CliRunner().invoke(app, list(map(str, arguments)))
        assert (found.exit_code, "lfs pull" in found.output) == (2, True), (arguments, found.output)
    with pytest.raises(ValueError, match="lfs pull"):
        baselines.load(copy, "full")
    with pytest.raises(ValueError, match="lfs pull"):
        _vision_config(copy)


def test_a_shard_that_is_missing(shards):
    first = weight_files(shards)[0]
    first.unlink()
    refused(shards, f"expected all files of the index in {shards}, got none named {first.name}")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none(shards, text):
    (shards / INDEX).write_text(text)
    refused(shards, f"expected an index with a weight_map, got {shards / INDEX}")


def test_an_index_that_is_a_pointer(shards):
    (shards / INDEX).write_text(POINTER)
    refused(shards, f"a Git LFS pointer in {shards / INDEX}")


@pytest.mark.parametrize("kept", [0, 7, 8, 200, -1])
def test_safetensors_that_break_off(copy, kept):
    written = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(written[:kept])
    said = {0: "an empty", -1: f"of {len(written)} bytes, got {len(written) - 1} in"}
    refused(copy, said.get(kept, "whose header is unreadable"), str(copy / WEIGHTS), "download")


def test_a_config_that_breaks_off(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text[: len(text) // 2])
    refused(copy, f"expected JSON in {copy / 'config.json'}")


def test_weights_that_no_file_has_are_not_drawn_at_random(copy):
    tensors = load_file(copy / WEIGHTS)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    del tensors[name]
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    refused(copy, f"expected all weights of a LlavaForConditionalGeneration in {copy}", "q_proj")
    with pytest.raises(ValueError, match="expected all weights"):
        baselines.load(copy, "full")

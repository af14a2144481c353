"""``python -m voco_model``."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tests.voco_kernels.kv.test_entry import make_entry
from voco_model.cli import app
from voco_model.kv_store import KVStore


def key(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def store(tmp_path):
    with KVStore(tmp_path / "store", max_bytes=1 << 24, fsync=False) as store:
        for number in range(3):
            store.put(make_entry(number + 1), key(number))
        store.put(make_entry(1).quantize(), key(3))
        store.get(key(0))
        yield store


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["store", *map(str, arguments)])
    return result.exit_code, result.output


def spoil(store: KVStore, number: int) -> None:
    path = store.path / "v1" / key(number)[:2] / f"{key(number)}.safetensors"
    data = bytearray(path.read_bytes())
    data[4096 + 5] ^= 1
    path.write_bytes(data)


def test_ls_shows_what_was_used_last_first(store):
    code, text = run("ls", store.path)
    lines = text.splitlines()
    assert code == 0 and lines[0].split()[:4] == ["key", "bytes", "tokens", "dtype"]
    cells = [line.split() for line in lines[1:]]
    assert [row[0] for row in cells] == [key(0), key(3), key(2), key(1)]
    assert [row[2:4] for row in cells] == [
        ["1", "float32"],
        ["1", "int8"],
        ["3", "float32"],
        ["2", "float32"],
    ]
    assert sum(int(row[1]) for row in cells) == store.stats().bytes


def test_stats(store):
    code, text = run("stats", store.path)
    assert code == 0
    assert text.split() == f"entries 4 bytes {store.stats().bytes} set aside 0".split()


def test_verify_sets_aside_what_is_bad_and_says_so(store):
    assert run("verify", store.path) == (
        0,
        f"4 entries of {store.stats().bytes} bytes are intact\n",
    )
    spoil(store, 1)
    code, text = run("verify", store.path)
    assert code == 1
    assert text.startswith("3 entries of ") and f"set aside, corrupt: {key(1)}" in text
    assert run("verify", store.path)[0] == 0
    assert "set aside    1" in run("stats", store.path)[1]


def test_rm(store):
    assert run("rm", store.path, key(0), key(9)) == (
        1,
        f"removed: {key(0)}\nnot there: {key(9)}\n",
    )
    code, text = run("rm", store.path, "../x")
    assert code == 2 and "expected a key of 64 lower-case hex digits, got '../x'" in text
    for arguments in ((), (key(1), "--all")):
        code, text = run("rm", store.path, *arguments)
        assert code == 2 and "expected keys, or --all" in text
    assert run("rm", store.path, "--all") == (0, "removed 3 entries\n")
    assert run("stats", store.path)[1].split()[:2] == ["entries", "0"]


def test_rm_of_a_bad_key_removes_nothing(store):
    code, text = run("rm", store.path, key(0), "zz")
    assert code == 2 and "got 'zz'" in text
    assert key(0) in store
    assert run("rm", store.path, key(0), key(0)) == (0, f"removed: {key(0)}\n")


def test_ls_prints_any_fingerprint(tmp_path):
    with KVStore(tmp_path, max_bytes=1 << 20, fsync=False) as store:
        store.put(replace(make_entry(1), fingerprint="[/bold]x"), key(0))
        code, text = run("ls", store.path)
    assert code == 0 and "[/bold]x" in text


def test_a_folder_that_is_no_store_is_left_alone(tmp_path):
    code, text = run("ls", tmp_path)
    assert code == 2 and "expected the folder of a store, with v1 in it, got" in text
    assert not list(tmp_path.iterdir())


def test_from_a_shell(store):
    command = [sys.executable, "-m", "voco_model", "store", "ls", store.path]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert key(2) in listed


def test_training_and_conversion_say_what_is_wrong(tmp_path):
    nowhere = str(tmp_path / "run.yaml")
    found = CliRunner().invoke(app, ["train", nowhere])
    assert found.exit_code == 2 and f"expected a YAML file, got {nowhere}" in found.output
    found = CliRunner().invoke(
        app, ["convert", "from-authors", str(tmp_path), str(tmp_path / "to"), "--num-voco", "2"]
    )
    assert found.exit_code == 2 and "without config.json" in found.output

"""Files of records in other encodings, packed or misnamed: read, or refused with advice that works."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from voco_model.data.faults import DataError
from voco_model.data.records import load_dataset_of, open_records

RECORDS = [
    {"id": "0", "conversations": [{"from": "human", "value": "Où est la tasse ?"}]},
    {"id": "1", "conversations": [{"from": "gpt", "value": "À côté."}]},
]
ARRAY = json.dumps(RECORDS, ensure_ascii=False, indent=1)
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def read(path: Path) -> list[dict]:
    records = open_records(str(path))
    return [records[i] for i in range(len(records))]


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read(path)
    return str(caught.value)


def follow(message: str, program: str) -> None:
    """Run the command at the end of a message, from its program's name on."""
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    command = program + message.rpartition(f" {program}")[2]
    subprocess.run(command, shell=True, check=True)


@pytest.mark.parametrize("name, text", [("a.json", ARRAY), ("a.jsonl", LINES)])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert read(path) == RECORDS
    expected = [2, 11] if name == "a.json" else [1, 2]
    records = open_records(str(path))
    assert [records.where(i) for i in (0, 1)] == [f"{path}:{line}" for line in expected]
    path.write_bytes(codecs.BOM_UTF8)
    if name == "a.json":
        assert "an empty file" in refusal(path)
    else:
        assert read(path) == []


@pytest.mark.parametrize("name", ["a.ndjson", "a.JSONL", "A.Json"])
def test_other_names_of_the_same_layouts(tmp_path, name):
    path = tmp_path / name
    path.write_text(ARRAY if name == "A.Json" else LINES, encoding="utf-8")
    assert read(path) == RECORDS


@pytest.mark.parametrize("mark", [True, False], ids=["mark", "no mark"])
@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("bits", [16, 32])
def test_utf_16_is_refused_with_what_converts_it(tmp_path, bits, order, mark):
    path = tmp_path / "from windows.json"
    start = getattr(codecs, f"BOM_UTF{bits}_{order.upper()}") if mark else b""
    path.write_bytes(start + ARRAY.encode(f"utf-{bits}-{order}"))
    said = refusal(path)
    name = f"UTF-{bits}" + ("" if mark else order.upper())
    assert f"expected the encoding UTF-8, got {name} in {path}" in said
    follow(said, "iconv")
    assert read(tmp_path / "from windows.utf-8.json") == RECORDS


@pytest.mark.parametrize("name, text", [("a.json", ARRAY), ("a.jsonl", LINES)])
def test_latin_1_is_a_fault_with_its_place(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    records = open_records(str(path))
    for number, letter in ((0, "ù"), (1, "À")):
        with pytest.raises(DataError, match="expected the encoding UTF-8") as caught:
            records[number]
        assert caught.value.fault.kind == "bad_record"
        offset = text.index(letter)
        line = text.count("\n", 0, offset) + 1
        code = ord(letter)
        assert f"got byte 0x{code:02x} at offset {offset}, line {line};" in str(caught.value)
    follow(str(caught.value), "iconv")
    assert read(tmp_path / f"a.utf-8{path.suffix}") == RECORDS


PACKERS = {
    "gzip": (".gz", gzip.compress),
    "bzip2": (".bz2", bz2.compress),
    "xz": (".xz", lzma.compress),
}


@pytest.mark.parametrize("misnamed", [False, True])
@pytest.mark.parametrize("program", PACKERS)
def test_compressed_records_are_refused_with_what_unpacks_them(tmp_path, program, misnamed):
    suffix, compress = PACKERS[program]
    path = tmp_path / ("my data.jsonl" if misnamed else f"my data.jsonl{suffix}")
    path.write_bytes(compress(LINES.encode()))
    said = refusal(path)
    assert f"got {program} in {path}" in said
    follow(said, program)
    assert read(tmp_path / ("my data.unpacked.jsonl" if misnamed else "my data.jsonl")) == RECORDS


def test_a_zip_is_refused_with_what_unpacks_it(tmp_path):
    path = tmp_path / "a.json.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.json", ARRAY)
    said = refusal(path)
    assert f"got zip in {path}" in said
    follow(said, "unzip")
    assert read(tmp_path / "a.json") == RECORDS


@pytest.mark.parametrize("text", [LINES, LINES.splitlines()[0]], ids=["two", "one"])
def test_json_lines_named_json(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert "one object per line at line 1" in refusal(path)
    assert refusal(path).endswith("name the file .jsonl")
    path = path.rename(path.with_suffix(".jsonl"))
    assert read(path) == [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_named_jsonl(tmp_path, indent):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(RECORDS, indent=indent), encoding="utf-8")
    assert "expected one object per line, got an array at line 2" in refusal(path)
    assert refusal(path).endswith("name the file .json")
    assert read(path.rename(path.with_suffix(".json"))) == RECORDS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_objects_over_several_lines(tmp_path, name):
    texts = [json.dumps(record, indent=1) for record in RECORDS]
    path = tmp_path / name
    path.write_text("\n".join(texts))
    said = refusal(path)
    assert "brackets around them and commas between" in said
    (tmp_path / "b.json").write_text("[" + ",".join(texts) + "]")
    assert read(tmp_path / "b.json") == RECORDS


@pytest.mark.parametrize("indent", [None, 2])
def test_records_under_a_key(tmp_path, indent):
    path = tmp_path / "my data.json"
    whole = {"version": [1, {"a": [2]}], "n": 2, "data": RECORDS}
    for given, key in ((whole, "version"), ({"data": RECORDS, "n": [3]}, "data")):
        path.write_text(json.dumps(given, indent=indent))
        said = refusal(path)
        names = ", ".join(name for name, value in given.items() if isinstance(value, list))
        assert f"got an object with lists under {names} at line 1" in said
        follow(said, "python")
        assert json.loads((tmp_path / f"my data.{key}.json").read_text()) == given[key]
    assert read(tmp_path / "my data.data.json") == RECORDS


def test_other_files_are_named_for_what_they_are(tmp_path, cache):
    from datasets import Dataset

    for name in ("a.json", "a.jsonl", "a.parquet"):
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
        (tmp_path / name).write_text(pointer)
        said = refusal(tmp_path / name)
        assert f"a Git LFS pointer in {tmp_path / name}" in said and "lfs pull" in said
    (tmp_path / "a.json").write_bytes(bytes(512))
    assert "got only zero bytes" in refusal(tmp_path / "a.json")
    Dataset.from_list(RECORDS).to_parquet(tmp_path / "b.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.json").write_bytes(whole)
    assert refusal(tmp_path / "b.json").endswith("name the file .parquet")
    assert read((tmp_path / "b.json").rename(tmp_path / "c.parquet"))[0]["id"] == "0"
    (tmp_path / "b.parquet").write_bytes(whole[:-9])
    assert "truncated" in refusal(tmp_path / "b.parquet")
    (tmp_path / "b.parquet").touch()
    (tmp_path / "empty.parquet").touch()
    assert "expected Parquet" in refusal(tmp_path / "empty.parquet")
    (tmp_path / "a.csv").write_text("id,image\n")
    assert ".json, .jsonl, .ndjson or .parquet, got" in refusal(tmp_path / "a.csv")


def test_a_stream_of_a_json_file_says_how_it_is_read(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "a.jsonl"
    path.write_text(LINES, encoding="utf-8")
    with pytest.raises(ValueError, match="data.streaming: false"):
        load_dataset_of(str(path), "train", streaming=True)
    assert read(path) == RECORDS


def test_brackets_without_end_are_a_fault(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match="not JSON"):
        read(path)

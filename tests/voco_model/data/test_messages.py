"""Conversations in the layouts of the hub: content parts, merged columns, images in either."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.voco_model import tiny
from voco_model.data.faults import DataError
from voco_model.data.records import open_records
from voco_model.data.samples import Sample, sample_of

PICTURES = [tiny.picture(number, (24, 32)) for number in range(3)]
IMAGE = {"type": "image"}


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{number}.png")
    return tmp_path


def png(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def text(written: str) -> dict:
    return {"type": "text", "text": written}


def asked(*parts, answer="A cup.") -> dict:
    return {
        "messages": [
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": [text(answer)]},
        ]
    }


def shown(sample: Sample) -> list[int]:
    """Which of the pictures a sample has."""
    pixels = [picture.tobytes() for picture in PICTURES]
    return [pixels.index(picture.open().tobytes()) for picture in sample.pictures]


def texts(sample: Sample) -> list[str]:
    return [message["content"] for message in sample.messages]


def fault(record: dict, folder: Path = Path(".")) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        sample_of(record, "here", folder)
    return caught.value.fault.kind, caught.value.fault.message


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize(
    "parts",
    [
        (IMAGE, text("What is it?")),
        (text("What is it?\n"), IMAGE),
        (text("What "), IMAGE, text("is it?")),
        (text("What is it?"),),  # parts without a place for the image
    ],
    ids=["before", "behind", "between", "nowhere"],
)
def test_content_parts_read_as_llavas_own_layout(folder, parts, column):
    sample = sample_of(asked(*parts) | {column: ["1.png"]}, "here", folder)
    llava = {
        "image": "1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cup."},
        ],
    }
    assert sample == sample_of(llava, "here", folder)
    assert sample.messages == [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A cup."},
    ]
    assert shown(sample) == [1]


@pytest.mark.parametrize(
    "roles",
    [("human", "gpt"), ("user", "assistant")],
)
@pytest.mark.parametrize("names", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("column", ["conversations", "messages"])
@pytest.mark.parametrize("as_json", [False, True])
def test_names_of_columns_and_roles_mix(roles, names, column, as_json):
    turns = [("system", "Be brief."), (roles[0], "Hi"), (roles[1], "Hello")]
    turns = [dict(zip(names, turn, strict=True)) for turn in turns]
    sample = sample_of({column: json.dumps(turns) if as_json else turns}, "here")
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]
    assert texts(sample) == ["Be brief.", "Hi", "Hello"]


def test_a_system_column_is_the_system_message():
    record = asked(text("Hi"), answer="Hello") | {"system": "Be brief."}
    assert texts(sample_of(record, "here")) == ["Be brief.", "Hi", "Hello"]
    record["messages"].insert(0, {"role": "system", "content": "Be kind."})
    assert texts(sample_of(record, "here")) == ["Be kind.", "Hi", "Hello"]


def test_images_come_in_the_order_of_their_places(folder):
    later = {
        "images": ["2.png", "0.png", "1.png"],
        "messages": [
            {"role": "user", "content": [IMAGE, text("What?"), IMAGE]},
            {"role": "assistant", "content": "Cups."},
            {"role": "user", "content": [text("And "), IMAGE, text("this?")]},
            {"role": "assistant", "content": "A pot."},
        ],
    }
    sample = sample_of(later, "here", folder)
    assert shown(sample) == [2, 0, 1]
    assert texts(sample) == ["What?", "Cups.", "And this?", "A pot."]
    # pandas makes floats of integers beside None
    numbered = [{"type": "image", "index": index, "text": None} for index in (1, 2, 0.0)]
    sample = sample_of(asked(*numbered, text("What?")) | {"images": later["images"]}, "", folder)
    assert shown(sample) == [0, 1, 2]


def test_images_of_turns_that_are_left_out_are_left_out(folder):
    record = {
        "images": ["0.png", "1.png", "2.png"],
        "conversations": [
            {"from": "gpt", "value": "<image> Look."},
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cup."},
            {"from": "human", "value": "<image>\nAnd this?"},
        ],
    }
    sample = sample_of(record, "here", folder)
    assert (shown(sample), sample.loose) == ([1], 2)
    for turn in record["conversations"]:
        turn["value"] = turn["value"].replace("<image>", "")
    sample = sample_of(record, "here", folder)  # no places: nobody knows whose they are
    assert (shown(sample), sample.loose) == ([0, 1, 2], 2)


def forms(folder: Path) -> dict[str, dict]:
    data = png(PICTURES[1])
    in_base64 = base64.b64encode(data).decode()
    address = f"data:image/png;base64,{in_base64}"
    return {
        "name": {"type": "image", "image": "1.png"},
        "picture": {"type": "image", "image": PICTURES[1]},
        "bytes": {"type": "image", "image": data},
        "struct": {"type": "image", "image": {"bytes": data, "path": None}},
        "struct of a path": {"type": "image", "image": {"bytes": None, "path": "1.png"}},
        "in the part": {"type": "image", "bytes": data, "path": "elsewhere.png"},
        "path": {"type": "image", "path": str(folder / "1.png")},
        "file url": {"type": "image", "url": (folder / "1.png").as_uri()},
        "base64": {"type": "image", "base64": in_base64},
        "base64 in lines": {"type": "image", "base64": base64.encodebytes(data).decode()},
        "data url": {"type": "image", "url": address},
        "openai": {"type": "image_url", "image_url": {"url": address, "detail": "low"}},
        "openai, plain": {"type": "image_url", "image_url": address, "text": None},
    }


@pytest.mark.parametrize("form", forms(Path("/")))
def test_an_image_in_its_part(tmp_path, form):
    tmp_path = tmp_path / "with blank"
    tmp_path.mkdir()
    PICTURES[1].save(tmp_path / "1.png")
    sample = sample_of(asked(forms(tmp_path)[form], text("What?")), "here", tmp_path)
    assert (shown(sample), texts(sample)) == ([1], ["What?", "A cup."])


def test_columns_hold_base64_too():
    noise = tiny.picture(5, (64, 64))
    in_base64 = base64.b64encode(png(noise)).decode()
    assert len(in_base64) > 4096  # shorter ones could be a file's name
    for value in (in_base64, f"data:image/png;base64,{in_base64}"):
        (picture,) = sample_of(asked(text("What?")) | {"image": value}, "here").pictures
        assert picture.open().tobytes() == noise.tobytes()


@pytest.mark.parametrize(
    "changes, kind, said",
    [
        (
            {"image": "https://example.org/a.png"},
            "missing_file",
            "doesn't download: save the image",
        ),
        ({"image": "data:image/svg+xml,<svg/>"}, "bad_record", "expected data:...;base64"),
        ({"image": "data:image/png;base64,!!"}, "broken_image", "expected base64"),
        ({"image": "nowhere.png"}, "missing_file", "nowhere.png"),
        ({"image": ["0.png", None]}, "bad_record", "expected the name of an image, got None"),
        ({"image": "0.png", "images": ["1.png"]}, "bad_record", "got image, images"),
        ({"image": "0.png", "video": "a.mp4"}, "bad_record", "got image, video"),
        ({"videos": ["a.mp4", "b.mp4"]}, "bad_record", "expected one video"),
        ({"audio": "a.wav"}, "bad_record", "expected images and text, got audio"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "bad_record", "got both"),
        ({"messages": None, "text": "Hi"}, "bad_record", "none among the columns text"),
        ({"messages": "Hi"}, "bad_record", "as a list, or as JSON, got Expecting value"),
        ({"messages": '{"role": "user"}'}, "bad_record", "expected messages as a list"),
        ({"messages": ["Hi", "Hello"]}, "bad_record", "expected turns as objects, got 'Hi'"),
    ],
)
def test_wrong_columns(folder, changes, kind, said):
    found = fault(asked(text("What?")) | changes, folder)
    assert found[0] == kind and said in found[1]


@pytest.mark.parametrize(
    "parts, images, kind, said",
    [
        ([IMAGE, IMAGE], ["0.png"], "misplaced_images", "each of 1 images, got 2"),
        ([IMAGE], [], "misplaced_images", "each of 0 images, got 1"),
        ([IMAGE], ["0.png", "1.png"], "misplaced_images", "each of 2 images, got 1"),
        ([IMAGE, text("<image>")], ["0.png"], "misplaced_images", "got both in one turn"),
        ([IMAGE | {"index": 1}], ["0.png"], "misplaced_images", "from 0 to 0 .* got \\[1\\]"),
        ([IMAGE | {"index": 0}] * 2, ["0.png", "1.png"], "misplaced_images", "got \\[0, 0\\]"),
        (
            [IMAGE | {"index": 0}, IMAGE],
            ["0.png", "1.png"],
            "misplaced_images",
            "got \\[0, None\\]",
        ),
        ([IMAGE | {"index": True}], ["0.png"], "misplaced_images", "got \\[True\\]"),
        ([IMAGE | {"index": "0"}], ["0.png"], "misplaced_images", "got \\['0'\\]"),
        ([IMAGE | {"path": "0.png"}], ["0.png"], "misplaced_images", "got some in each"),
        ([IMAGE | {"path": "0.png"}, IMAGE], [], "misplaced_images", "got some in each"),
        ([IMAGE | {"path": "0.png", "url": "1.png"}], [], "bad_record", "got url, path"),
        ([{"type": "video", "video": "a.mp4"}], [], "bad_record", "type text, image or image_url"),
        ([{"type": "text", "text": None}], [], "bad_record", "expected the text of a turn"),
        (["What?"], [], "bad_record", "expected parts of type text"),
        ([], [], "bad_record", "expected the text of a turn, got \\[\\]"),
    ],
)
def test_wrong_parts(folder, parts, images, kind, said):
    found = fault(asked(*parts) | {"images": images}, folder)
    assert found[0] == kind and re.search(said, found[1]), found


@pytest.mark.parametrize(
    "question",
    [
        "<ima<image>ge> What?",
        "<Vo<image>Co> What?",
        "<image>\nWhat is <ima\nge>?",
        "<image><Vo\nCo>",
    ],
)
def test_a_token_that_only_appears_in_the_end_is_a_fault(folder, question):
    """Where a placeholder goes, or where the style of the authors deletes newlines."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A cup."}]
    kind, said = fault({"image": "0.png", "conversations": turns}, folder)
    assert kind == "misplaced_images"
    assert ("<VoCo>" if "Co>" in question else "<image> as the place") in said


def test_a_fault_does_not_repeat_a_whole_value():
    for value in ({"image": b"0" * 10_000, "type": "film"}, {"type": "x" * 10_000}):
        assert len(fault(asked(value))[1]) < 300
    assert len(fault(asked(text("a")) | {"image": "http://" + "a" * 10_000})[1]) < 400


@pytest.mark.parametrize("empty", [None, [], "", math.nan, {"bytes": None, "path": None}], ids=repr)
def test_empty_columns_count_as_missing(folder, empty):
    filled = asked(IMAGE, text("What?")) | {"images": ["2.png"]}
    sample = sample_of(
        filled | {name: empty for name in ("conversations", "image", "video", "system")}, "", folder
    )
    assert (shown(sample), texts(sample)) == ([2], ["What?", "A cup."])
    without = {name: empty for name in ("messages", "images", "image", "video")}
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    sample = sample_of({"conversations": turns} | without, "here")
    assert (sample.pictures, texts(sample)) == ([], ["Hi", "Hello"])


def test_merged_parquet_reads_as_its_parts_did(folder, cache):
    """LLaVA's layout beside the hub's: where a column is of the other, Arrow has None in it."""
    from datasets import Dataset, Features, Image, Value
    from datasets.features import List

    pair = {"role": Value("string"), "content": [
        {"type": Value("string"), "text": Value("string"), "index": Value("int64"),
         "image": Image()}
    ]}  # fmt: skip
    features = Features(
        {
            "conversations": [{"from": Value("string"), "value": Value("string")}],
            "messages": [pair],
            "image": Image(),
            "images": List(Image()),
        }
    )
    turns = [{"from": "human", "value": "<image>\nOne?"}, {"from": "gpt", "value": "1"}]
    rows = [
        {"conversations": turns, "image": PICTURES[1]},
        asked({"type": "image", "index": 0}, text("Two?"), answer="2") | {"images": [PICTURES[2]]},
        asked(IMAGE | {"image": PICTURES[0]}, text("None?"), answer="0"),
        asked(text("Nothing?"), answer="-") | {"images": []},
    ]
    rows = [{name: row.get(name) for name in features} for row in rows]
    Dataset.from_list(rows, features=features).to_parquet(folder / "data.parquet")
    records = open_records(str(folder / "data.parquet"))
    samples = [sample_of(records[i], records.where(i), folder) for i in range(len(rows))]
    assert [shown(sample) for sample in samples] == [[1], [2], [0], []]
    assert [texts(sample) for sample in samples] == [
        ["One?", "1"], ["Two?", "2"], ["None?", "0"], ["Nothing?", "-"]
    ]  # fmt: skip
    inner = records[2]["messages"][0]["content"][0]["image"]
    assert isinstance(inner["bytes"], bytes)  # not decoded before it is wanted


def test_json_lines_that_pandas_has_written(folder):
    records = [
        {"image": "1.png", "messages": asked(IMAGE, text("What?"))["messages"]},
        {"image": math.nan, "messages": asked(text("Hi"))["messages"]},
    ]
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert "NaN" in path.read_text()
    read = open_records(str(path))
    assert [shown(sample_of(read[i], read.where(i), folder)) for i in (0, 1)] == [[1], []]


def test_a_column_that_holds_an_array_is_a_fault_of_its_record(tmp_path):
    record = {
        "image": np.zeros((5, 5, 3), np.uint8),
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "You."}],
    }
    with pytest.raises(DataError) as raised:
        sample_of(record, "data.json:4", tmp_path)
    assert raised.value.fault.kind == "bad_record"


def test_base64_in_a_column_is_read_whatever_its_length(tmp_path):
    made = io.BytesIO()
    tiny.picture(1, (2, 2)).save(made, "PNG")
    given = base64.b64encode(made.getvalue()).decode()
    assert len(given) < 4096
    turns = [{"from": "human", "value": "<image> Hi"}, {"from": "gpt", "value": "You."}]
    sample = sample_of({"image": given, "conversations": turns}, "data.json:4", tmp_path)
    assert sample.pictures[0].open().size == (2, 2)

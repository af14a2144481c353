"""Every fault from a real file: its kind, file and line, and what becomes of it."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.voco_model import tiny
from voco_model.data import index
from voco_model.data.encode import Encoded, Encoder
from voco_model.data.faults import KINDS, DataError, Fault, FaultLog, FaultPolicy, listed
from voco_model.data.index import Index, Samples, Source, kept_index, make_index
from voco_model.data.loader import Documents, Key
from voco_model.data.pictures import Picture
from voco_model.data.records import FileRecords

GOOD = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A man."}]
TEXT = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "You."}]
MAX_LENGTH = 300


def changed(turn: int, **changes) -> list[dict]:
    return [{**one, **changes} if i == turn else one for i, one in enumerate(GOOD)]


def with_image(turns: list, image="good.png") -> dict:
    return {"image": image, "conversations": turns}


# line of the file: what is wrong with it
BROKEN = [
    ("bad_record", "{oops}"),
    ("bad_record", {"image": "good.png"}),
    ("bad_record", {"conversations": []}),
    ("bad_record", {"conversations": ["Who?", "You."]}),
    ("bad_record", with_image(changed(1, value=None))),
    ("bad_record", with_image(GOOD, 7)),
    ("bad_record", {**with_image(GOOD), "images": ["good.png"]}),
    ("unknown_role", with_image(changed(0, **{"from": "narrator"}))),
    ("unknown_role", with_image(changed(0, **{"from": ["human"]}))),
    ("unknown_role", with_image([*GOOD, {"from": "gpt", "value": "Twice."}])),
    ("unknown_role", with_image([*GOOD, {"from": "system", "value": "Late."}, *TEXT])),
    ("empty_answer", with_image(changed(1, value=" \n"))),
    ("empty_answer", with_image(GOOD[:1])),
    ("empty_answer", with_image([{"from": "system", "value": "Be brief."}, GOOD[1]])),
    ("misplaced_images", with_image(changed(0, value="<image><image>Who?"))),
    ("misplaced_images", with_image(GOOD, ["good.png", "good.png"])),
    ("misplaced_images", {"conversations": GOOD}),
    ("misplaced_images", with_image(changed(1, value="<VoCo> is a token."))),
    ("missing_file", with_image(GOOD, "nowhere.png")),
    ("missing_file", {"video": "nowhere.mp4", "conversations": TEXT}),
    ("missing_file", {"video": "empty", "conversations": TEXT}),
    ("broken_image", with_image(GOOD, "garbage.png")),
    ("over_long", {"conversations": [TEXT[0], {"from": "gpt", "value": "On and on. " * 30}]}),
]
CUT_OFF = len(BROKEN) + 2  # the line of an image that is found broken only when it is decoded


@pytest.fixture
def path(tmp_path):
    """``data.jsonl``: a good record first, then one fault a line, then a good one of another kind."""
    tiny.picture(0).save(tmp_path / "good.png")
    (tmp_path / "garbage.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of the kind")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut_off.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    path = tmp_path / "data.jsonl"
    records = [with_image(GOOD), *(record for _, record in BROKEN), with_image(GOOD, "cut_off.png")]
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def samples(path):
    return Samples([Source(FileRecords(path), path.parent)])


@pytest.fixture
def encoder(llava):
    return Encoder(llava, "vicuna", MAX_LENGTH)


@pytest.mark.parametrize("truncate", [True, False])
def test_an_index_names_every_fault_with_its_file_and_line(samples, encoder, path, truncate):
    index = make_index(samples, encoder, 2, truncate=truncate)
    expected = [(kind, f"{path}:{line}") for line, (kind, _) in enumerate(BROKEN, 2)]
    assert [(fault.kind, fault.where) for fault in index.faults] == expected
    assert {fault.kind for fault in index.faults} == set(KINDS) - {"loose_turns"}
    used = {0, CUT_OFF - 1} | ({len(BROKEN)} if truncate else set())
    assert {i for i, length in enumerate(index.lengths) if length} == used
    assert index.lengths.max() <= MAX_LENGTH
    assert len(index.lengths) == len(samples) == len(BROKEN) + 2


def test_fatal_faults_are_told_all_at_once(samples, encoder, path):
    index = make_index(samples, encoder, 2, truncate=True)
    with pytest.raises(ValueError, match=f"got {len(BROKEN) - 1} that can't") as caught:
        FaultPolicy().check(index.faults)
    said = str(caught.value)
    for line, (kind, _) in enumerate(BROKEN, 2):
        if kind == "over_long":  # is cut, by default
            assert kind not in said
        else:
            count = sum(other == kind for other, _ in BROKEN)
            assert f"{kind}: {count}" in said
            assert f"{path}:{line}: " in said or count > 5
    assert "    and 2 more" in said  # 7 bad records, 5 shown
    assert "data.faults: {KIND: skip}" in said
    FaultPolicy("skip").check(index.faults)
    for kind in set(KINDS) - {"loose_turns"}:
        others = dict.fromkeys(KINDS, "skip") | {kind: "fatal"}
        with pytest.raises(ValueError, match=f"(?s)that can't:\n{kind}: "):
            FaultPolicy(others).check(index.faults)


def test_an_image_that_is_broken_behind_its_header(samples, encoder, path):
    key = Key(CUT_OFF - 1, 2)
    documents = Documents(samples, encoder)
    fault = documents[key]
    assert isinstance(fault, Fault)
    assert (fault.kind, fault.where) == ("broken_image", f"{path}:{CUT_OFF}")
    good, left_out = documents.__getitems__([Key(0, 2), key])
    assert isinstance(good, Encoded) and left_out == fault
    assert documents.__getitems__([]) == []


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_no_damage_to_an_image_escapes(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    tiny.picture(0, (40, 48)).save(path)
    whole = path.read_bytes()
    where = "data.json:3"
    for length in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        for source in (path, whole[:length]):
            picture = Picture(source, where)
            try:
                picture.size()
                picture.open()
            except DataError as error:
                assert (error.fault.kind, error.fault.where) == ("broken_image", where)
            else:  # some decoders make do with what there is
                assert length > len(whole) // 2 or suffix in ("jpg", "gif", "bmp", "webp")


def test_looking_at_an_image_leaves_it_open(tmp_path):
    tiny.picture(0, (40, 48)).save(tmp_path / "image.png")
    picture = Picture(Image.open(tmp_path / "image.png"), "data.json:1")
    assert picture.size() == (40, 48)
    assert picture.open().tobytes() == tiny.picture(0, (40, 48)).tobytes()


@pytest.mark.slow  # two fresh interpreters
def test_worker_processes_find_the_same(samples, encoder, path):
    many = path.parent / "many.jsonl"
    many.write_text(path.read_text() * 12)  # more than one process takes at a time
    samples = Samples(
        [Source(FileRecords(many), path.parent), Source(FileRecords(path), path.parent)]
    )
    told = []
    here = make_index(samples, encoder, 2, truncate=True)
    elsewhere = make_index(
        samples, encoder, 2, truncate=True, workers=2, progress=lambda *done: told.append(done)
    )
    assert len(samples) == 13 * (len(BROKEN) + 2) > 256
    assert here.lengths.tolist() == elsewhere.lengths.tolist()
    assert here.faults == elsewhere.faults
    assert told == [(256, len(samples)), (len(samples), len(samples))]


def test_an_index_is_kept_until_the_records_change(encoder, path, tmp_path):
    made = []

    def looked_through():
        samples = Samples([Source(FileRecords(path), path.parent)])

        def make():
            made.append(samples.state())
            return make_index(samples, encoder, 2, truncate=True)

        return kept_index(tmp_path / "kept" / "data", samples.state(), make)

    first, second = looked_through(), looked_through()
    assert len(made) == 1
    assert second.lengths.tolist() == first.lengths.tolist()
    assert second.lengths.dtype == first.lengths.dtype
    assert second.faults == first.faults
    with path.open("a") as file:
        file.write(json.dumps({"conversations": TEXT}) + "\n")
    assert len(looked_through().lengths) == len(first.lengths) + 1
    text = path.read_text()
    path.write_text(text.replace("A man.", "A boy."))  # as long as it was
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    looked_through()
    assert len(made) == len(set(made)) == 3
    looked_through()
    assert len(made) == 3
    assert not list((tmp_path / "kept").rglob("*.partial*"))


def test_a_kept_index_that_is_not_whole_is_made_again(tmp_path, caplog):
    made = []

    def make() -> Index:
        made.append(len(made))
        return Index(np.array([3, 0, 5], dtype=np.int32), [Fault("over_long", "a.json:1", "é")])

    expected = kept_index(tmp_path, "key", make)
    (path,) = tmp_path.glob("*.npz")
    written = path.read_bytes()
    for left in (b"", written[:40], written[: len(written) // 2], b"no zip at all"):
        path.write_bytes(left)
        found = kept_index(tmp_path, "key", make)
        assert found.lengths.tolist() == [3, 0, 5] and found.faults == expected.faults
        assert f"{path} failed, making it again" in caplog.messages[-1]
        assert path.read_bytes() == written
    kept_index(tmp_path, "key", make)
    assert made == [0, 1, 2, 3, 4]


def test_an_index_of_other_code_is_made_again(tmp_path, monkeypatch):
    """The key has no word of how samples are read, so their lengths might be of another reading."""

    def of(length: int) -> Index:
        return kept_index(tmp_path, "key", lambda: Index(np.array([length]), [])).lengths.tolist()

    assert (of(1), of(2)) == ([1], [1])
    monkeypatch.setattr(index, "_READING", index._READING + 1)
    assert of(3) == [3]


def test_who_waits_for_an_index_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(index, "_PATIENCE", 0.05)
    lock = FileLock(tmp_path / "index.lock")
    lock.acquire()

    class Freed(logging.Handler):
        def emit(self, record) -> None:
            said.append(record.getMessage())
            if len(said) == 2:
                lock.release()

    said, handler = [], Freed()
    index.logger.addHandler(handler)
    try:
        found = kept_index(tmp_path, "key", lambda: Index(np.array([1]), []))
    finally:
        index.logger.removeHandler(handler)
    assert found.lengths.tolist() == [1] and len(said) == 2
    assert f"waiting for another process that checks the data and holds {lock.lock_file}" in said[0]


def test_a_worker_that_was_killed_is_told_in_words(encoder, samples, monkeypatch):
    class Pool:
        def __init__(self, workers, context, initializer, initargs) -> None:
            initializer(*initargs)

        def __enter__(self):
            return self

        def __exit__(self, *exception) -> None:
            pass

        def map(self, function, starts):
            yield function(starts[0])
            raise BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(index, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(index, "_CHUNK", 4)
    said = (
        f"failed after sample 4 of {len(samples)}: a worker process was killed.*lower data.workers"
    )
    with pytest.raises(OSError, match=said):
        make_index(samples, encoder, 2, truncate=True, workers=2)


def test_a_log_counts_each_fault_once_and_writes_it_down(tmp_path):
    path = tmp_path / "run" / "faults.jsonl"
    log = FaultLog(path)
    one, other = Fault("broken_image", "a.json:1", "é"), Fault("over_long", "a.json:1", "long")
    assert log.add([]) == [] and not path.exists()
    assert log.add([one]) == [one]
    assert log.add([one, other]) == [other]
    assert log.add([one, other]) == []
    assert log.counts == {"broken_image": 1, "over_long": 1}
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [
        {"kind": "broken_image", "where": "a.json:1", "message": "é"},
        {"kind": "over_long", "where": "a.json:1", "message": "long"},
    ]
    assert FaultLog().add([one]) == [one]


def test_a_resumed_log_continues_its_file(tmp_path):
    path = tmp_path / "faults.jsonl"
    one, other = Fault("broken_image", "a.json:1", "é"), Fault("over_long", "a.json:2", "long")
    FaultLog(path).add([one])
    with path.open("a") as file:
        file.write('{"kind": "over_lo')  # killed while writing
    log = FaultLog(path, resume=True)
    assert log.counts == {"broken_image": 1}
    assert log.add([one, other]) == [other]
    assert [json.loads(line)["where"] for line in path.read_text().splitlines()] == [
        "a.json:1",
        "a.json:2",
    ]
    assert FaultLog(path).counts == {} and not path.exists()


def test_policies():
    default = FaultPolicy()
    assert {kind: default[kind] for kind in KINDS} == {
        **dict.fromkeys(KINDS, "fatal"),
        "loose_turns": "trim",
        "over_long": "truncate",
    }
    skip = FaultPolicy("skip")
    assert {skip[kind] for kind in KINDS if kind != "over_long"} == {"skip"}
    assert skip["over_long"] == "truncate"
    assert FaultPolicy({"over_long": "skip"})["over_long"] == "skip"
    for actions, said in (
        ({"broken": "skip"}, "expected kinds of fault among bad_record, .*, got 'broken'"),
        ({"bad_record": "truncate"}, "expected fatal or skip for bad_record, got 'truncate'"),
        ({"over_long": "cut"}, "expected truncate or skip or fatal for over_long, got 'cut'"),
        ("ignore", "expected fatal or skip for bad_record, got 'ignore'"),
    ):
        with pytest.raises(ValueError, match=said):
            FaultPolicy(actions)


def test_errors_cross_between_processes():
    error = DataError("broken_image", "a.json:1", "cut off")
    again = pickle.loads(pickle.dumps(error))
    assert again.fault == error.fault
    assert str(again) == "a.json:1: broken_image: cut off"
    assert re.fullmatch("broken_image: 1\n    a.json:1: cut off", listed([again.fault]))


def test_turns_that_dont_pair_are_left_out_and_told(encoder, tmp_path):
    pairs = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "She."}]
    path = tmp_path / "loose.json"
    loose = [pairs[1], *pairs, pairs[0]]
    path.write_text(json.dumps([{"conversations": pairs}, {"conversations": loose}]))
    samples = Samples([Source(FileRecords(path), tmp_path)])
    index = make_index(samples, encoder, 2, truncate=True)
    assert index.lengths[0] == index.lengths[1] > 0
    assert [fault.kind for fault in index.faults] == ["loose_turns"]
    assert "got 2 turns without a partner" in index.faults[0].message
    FaultPolicy().check(index.faults)
    with pytest.raises(ValueError, match="loose_turns: 1"):
        FaultPolicy({"loose_turns": "fatal"}).check(index.faults)
    assert make_index(samples, encoder, 2, truncate=True, trim=False).lengths.tolist()[1] == 0

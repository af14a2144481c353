"""Records as they were written: JSON in any layout, JSON Lines, parquet, streams."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.voco_model import tiny
from tests.voco_model.data.conversation import learnt_runs
from voco_model.data.collate import STATS, Collator
from voco_model.data.encode import Encoded, Encoder
from voco_model.data.faults import DataError, FaultPolicy
from voco_model.data.records import FileRecords, load_dataset_of, open_records
from voco_model.data.samples import sample_of
from voco_model.data.stream import StreamedBatches

RECORDS = [
    {"id": "0", "text": 'brackets ] } [ { and "quotes" \\" and a \\'},
    {
        "id": "1",
        "text": "two\nlines\r\n\ttab",
        "nested": [[{"a": []}], {}, [1, None, True, -2.5e3]],
    },
    {"id": "2", "text": "Señor Łukasz 🦜 \u2028 日本", "ü": "é"},
    {},
    {"id": "4", "text": "\\", "next": "]"},
]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_in_any_layout(tmp_path, indent, ascii_only):
    path = tmp_path / "data.json"
    text = json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text + "\n \n", encoding="utf-8")
    records = FileRecords(path)
    assert [records[i] for i in range(len(records))] == RECORDS
    # A record starts in the line in which the array of those before it would end.
    ends = [json.dumps(RECORDS[:n], indent=indent).count("\n") + 1 for n in range(len(RECORDS))]
    expected = ends if indent is None else [2, *ends[1:]]
    # In one line they are told apart by their numbers.
    where = [f"{path}:{n}" + f", record {i}" * (indent is None) for i, n in enumerate(expected)]
    assert [records.where(i) for i in range(len(records))] == where


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)
@given(
    st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4),
    st.sampled_from([None, 0, 1, "\t"]),
    st.booleans(),
)
def test_any_records_come_back(tmp_path, records, indent, ascii_only):
    path = tmp_path / "data.json"
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = FileRecords(path)
    assert [found[i] for i in range(len(found))] == records


def test_json_lines_with_empty_ones_between(tmp_path):
    path = tmp_path / "data.jsonl"
    written = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    path.write_bytes("\n".join(["", *written[:2], "  ", "", *written[2:]]).encode())
    records = FileRecords(path)
    assert [records[i] for i in range(len(records))] == RECORDS
    expected = [f"{path}:{line}" for line in (2, 3, 6, 7, 8)]
    assert [records.where(i) for i in range(len(records))] == expected
    path.write_bytes("\r\n".join(written).encode() + b"\r\n")
    records = FileRecords(path)
    assert [records[i] for i in range(len(records))] == RECORDS


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_no_records_at_all(tmp_path, name):
    path = tmp_path / name
    path.write_text("[]" if name == "data.json" else "\n")
    assert len(FileRecords(path)) == 0


@pytest.mark.parametrize(
    "text, line, said",
    [
        ('\n\n"text"', 3, "something else"),
        ("12", 1, "something else"),
        (" \n", 2, "nothing"),
        ('[{"id": 1},\n {"id": 2}', 2, "one that is cut off.*download or write it again"),
        ('{"id": [1,\n', 1, "an object that is cut off.*download or write it again"),
        ('[{"id": 1}]\n[{"id": 2}]', 2, "something after it.*into one array"),
    ],
)
def test_what_is_no_array_is_refused(tmp_path, text, line, said):
    path = tmp_path / "data.json"
    path.write_text(text)
    got, _, advice = said.partition(".*")
    expected = f"expected a JSON array of records, got {got} at line {line} of .*{advice}"
    with pytest.raises(ValueError, match=expected):
        FileRecords(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no such file: .*data.json"):
        FileRecords(tmp_path / "data.json")
    (tmp_path / "data.json").touch()
    with pytest.raises(ValueError, match="expected a JSON array.*an empty file"):
        FileRecords(tmp_path / "data.json")


@pytest.mark.parametrize(
    "name, text, lines",
    [
        ("data.jsonl", '{"id": 0}\n{"id": oops}\n{"id": 2}\n[3]\n"four"\n5\n{"id"\n', range(1, 8)),
        (
            "data.json",
            '[\n{"id": 0},\n{"id": oops},\n{"id": 2},\n[3],\n"four",\n5,\n{"id"}\n]',
            range(2, 9),
        ),
    ],
)
def test_a_broken_record_is_told_with_its_line(tmp_path, name, text, lines):
    path = tmp_path / name
    path.write_text(text)
    records = FileRecords(path)
    assert [records.where(i) for i in range(len(records))] == [f"{path}:{n}" for n in lines]
    assert (records[0], records[2]) == ({"id": 0}, {"id": 2})
    for broken, said in (
        (1, "not JSON"),
        (3, "got list"),
        (4, "got str"),
        (5, "got int"),
        (6, "not JSON"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            records[broken]
        assert caught.value.fault.kind == "bad_record"
        assert caught.value.fault.where == f"{path}:{lines[broken]}"


def conversations(count: int) -> list[dict]:
    """Each with its number as the answer; every third without an image."""
    return [
        {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": "Which?" + " And?" * (number % 7)},
                {"from": "gpt", "value": str(number)},
            ],
            "image": tiny.picture(number, (40, 48)) if number % 3 else None,
        }
        for number in range(count)
    ]


def write_parquet(path, count: int, **columns) -> str:
    from datasets import Dataset, Features, Image, Value

    turn = {"from": Value("string"), "value": Value("string")}
    features = {"id": Value("string"), "conversations": [turn], "image": Image(), **columns}
    rows = conversations(count)
    if "images" in columns:
        features.pop("image")
        for number, row in enumerate(rows):
            del row["image"]
            row["images"] = [tiny.picture(number), tiny.picture(number + 1)][: number % 3]
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)
    return str(path)


def test_parquet_with_images_inside(tmp_path, cache):
    path = write_parquet(tmp_path / "data.parquet", 4)
    records = open_records(path)
    assert len(records) == 4
    assert records.where(2) == f"{path}[2]"
    assert records.state() == open_records(path).state()
    assert isinstance(records[1]["image"]["bytes"], bytes)  # not decoded before it is wanted
    for number, expected in enumerate(conversations(4)):
        sample = sample_of(records[number], records.where(number))
        assert sample.messages[1] == {"role": "assistant", "content": str(number)}
        assert len(sample.pictures) == (number % 3 > 0)
        for picture in sample.pictures:
            assert picture.size() == (40, 48)
            assert picture.open().tobytes() == expected["image"].tobytes()


def test_parquet_with_lists_of_images(tmp_path, cache):
    from datasets import Image
    from datasets.features import List

    path = write_parquet(tmp_path / "data.parquet", 4, images=List(Image()))
    records = open_records(path)
    for number in range(4):
        sample = sample_of(records[number], records.where(number))
        shown = [tiny.picture(number), tiny.picture(number + 1)][: number % 3]
        assert [p.open().tobytes() for p in sample.pictures] == [s.tobytes() for s in shown]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk(tmp_path, cache, streaming):
    from datasets import DatasetDict

    whole = open_records(write_parquet(tmp_path / "data.parquet", 4))._dataset
    whole.save_to_disk(tmp_path / "one")
    DatasetDict(train=whole, test=whole.select([3])).save_to_disk(tmp_path / "several")
    for folder, split, numbers in (("one", "train", range(4)), ("several", "test", [3])):
        rows = load_dataset_of(str(tmp_path / folder), split, streaming=streaming)
        found = [sample_of(row, "here").messages[1]["content"] for row in rows]
        assert found == [str(number) for number in numbers]
    with pytest.raises(ValueError, match="expected split as one of train, test in .*got 'val'"):
        load_dataset_of(str(tmp_path / "several"), "val", streaming=streaming)


COUNT, GLOBAL_BATCH = 22, 8  # no whole number of steps


@pytest.fixture
def stream(tmp_path, cache):
    return load_dataset_of(write_parquet(tmp_path / "data.parquet", COUNT), "train", streaming=True)


@pytest.fixture
def shards(tmp_path, cache):
    """A stream of several files, which plain iteration would deal out to worker processes."""
    from datasets import load_dataset

    files = []
    for number in range(3):
        path = tmp_path / f"{number}.parquet"
        rows = write_parquet(tmp_path / "data.parquet", COUNT)
        whole = open_records(rows)._dataset
        whole.shard(3, number).to_parquet(path)
        files.append(str(path))
    return load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)


def batches_of(processor, stream, *, rank=0, world_size=1, accumulation=2, max_tokens=None, **more):
    encoder = Encoder(processor, "mistral", 100)
    collate = Collator(
        packed=max_tokens is not None,
        pad_token_id=tiny.PAD,
        filler=encoder.filler(2),
        always_image=True,
        voco_token_id=tiny.VOCO,
        image_token_id=tiny.IMAGE,
    )
    return StreamedBatches(
        stream,
        "data.parquet",
        Path("."),
        encoder,
        more.pop("policy", FaultPolicy()),
        collate,
        global_batch=GLOBAL_BATCH,
        world_size=world_size,
        rank=rank,
        accumulation=accumulation,
        max_tokens=max_tokens,
        seed=more.pop("seed", 0),
        num_voco=[1, 2],
        **more,
    )


def take(batches: StreamedBatches, count: int, workers: int = 0) -> list[dict]:
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    return list(itertools.islice(loader, count))


def answers(processor, batch: dict) -> list[int]:
    """The numbers of the samples in a batch, by what they teach."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        found += [processor.tokenizer.decode(run) for run in learnt_runs(Encoded(ids, labels))]
    return [int(text.removesuffix("</s>")) for text in found]


def same(one: dict, other: dict) -> bool:
    one, other = dict(one), dict(other)
    if one.keys() != other.keys() or one.pop(STATS) != other.pop(STATS):
        return False
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("max_tokens", [None, 150])
@pytest.mark.parametrize("name", ["stream", "shards"])
def test_a_stream_gives_each_sample_once_a_pass(request, llava, name, max_tokens):
    stream = request.getfixturevalue(name)
    steps = 9
    by_world = {}
    for world_size in (1, 2):
        accumulation = 4 // world_size
        ranks = [
            take(
                batches_of(
                    llava,
                    stream,
                    rank=rank,
                    world_size=world_size,
                    accumulation=accumulation,
                    max_tokens=max_tokens,
                ),
                steps * accumulation,
            )
            for rank in range(world_size)
        ]
        by_world[world_size] = [
            sorted(
                answer
                for batches in ranks
                for batch in batches[step * accumulation : (step + 1) * accumulation]
                for answer in answers(llava, batch)
            )
            for step in range(steps)
        ]
    assert by_world[1] == by_world[2]
    assert all(0 < len(step) <= GLOBAL_BATCH for step in by_world[1])
    counts = Counter()
    for step in by_world[1]:
        counts.update(step)
        passes = [counts[number] for number in range(COUNT)]
        assert max(passes) - min(passes) <= 1
    assert min(passes) >= 2


@pytest.mark.parametrize("max_tokens", [None, 150])
@pytest.mark.parametrize("name", ["stream", "shards"])
def test_worker_processes_do_not_change_a_stream(request, llava, name, max_tokens):
    batches = batches_of(llava, request.getfixturevalue(name), max_tokens=max_tokens)
    here, elsewhere = take(batches, 15), take(batches, 15, workers=2)
    assert all(same(one, other) for one, other in zip(here, elsewhere, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was(llava, stream, workers):
    whole = take(batches_of(llava, stream, max_tokens=150, accumulation=4), 20)
    batches = batches_of(llava, stream, max_tokens=150, accumulation=4)
    batches.skip = 11
    rest = take(batches, 9, workers)
    assert all(same(one, other) for one, other in zip(whole[11:], rest, strict=True))


def test_a_stream_is_shuffled_by_its_seed_and_anew_each_pass(llava, stream):
    def order(seed: int) -> list[int]:
        batches = take(batches_of(llava, stream, accumulation=1, seed=seed), 11)  # 4 passes
        return [answer for batch in batches for answer in sorted(answers(llava, batch))]

    assert order(0) == order(0) != order(1)
    by_pass = [order(0)[start : start + COUNT] for start in range(0, 2 * COUNT, COUNT)]
    assert by_pass[0] != by_pass[1]


def test_packed_steps_of_a_stream_hold_no_more_than_they_may(llava, stream):
    batches = take(batches_of(llava, stream, max_tokens=150, accumulation=2), 20)
    assert all(batch[STATS].tokens <= 150 for batch in batches)
    lengths = batches_of(llava, stream).lengths()
    assert max(itertools.islice(lengths, COUNT)) <= 100


def test_samples_of_a_stream_that_cannot_be_used(llava):
    from datasets import IterableDataset

    def give():
        for number in range(8):
            turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": f"{number}"}]
            yield {"id": str(number), "conversations": turns[: 2 - (number == 3)]}

    stream = IterableDataset.from_generator(give)
    with pytest.raises(DataError, match=r"data.parquet\[3\]: empty_answer"):
        take(batches_of(llava, stream), 2)
    batches = take(batches_of(llava, stream, policy=FaultPolicy("skip")), 6)
    found = [answer for batch in batches for answer in answers(llava, batch)]
    assert set(found) == set(range(8)) - {3}
    faults = [fault for batch in batches for fault in batch[STATS].faults]
    assert {(fault.kind, fault.where) for fault in faults} == {("empty_answer", "data.parquet[3]")}
    nothing = IterableDataset.from_generator(lambda: iter([{"id": "0"}]))
    with pytest.raises(ValueError, match="got none that can be used"):
        take(batches_of(llava, nothing, policy=FaultPolicy("skip")), 1)

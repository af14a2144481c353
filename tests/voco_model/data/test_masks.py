"""Batches of every kind of sample against a dense mask written down a second time."""

from __future__ import annotations

import pytest
import torch

from tests.voco_model import tiny
from tests.voco_model.data.conversation import learnt, sample
from voco_kernels import MaskLayout
from voco_model.data.collate import STATS, Collator
from voco_model.data.encode import IGNORE, Encoded, Encoder
from voco_model.data.faults import Fault

NUM_VOCO = 3
MAX_LENGTH = 330
SAMPLES = [
    sample("Who?", "A man.", sizes=[(64, 64)]),
    sample("Who are you?", "Nobody."),
    sample("Which is larger?", "The third.", sizes=[(32, 64), (64, 64), (50, 64)]),
    sample("Tell me more.", "On and on. " * 40, sizes=[(40, 40)]),
    sample("Tell me more.", "On and on. " * 40),
]


def encoded(processor) -> list[Encoded]:
    documents = [Encoder(processor, "vicuna", MAX_LENGTH + 200).encode(SAMPLES[2], NUM_VOCO)]
    encoder = Encoder(processor, "vicuna", MAX_LENGTH)
    others = [encoder.encode(SAMPLES[i], NUM_VOCO) for i in (0, 1, 3, 4)]
    assert [len(document.input_ids) for document in others[2:]] == [MAX_LENGTH] * 2  # cut
    return [others[0], others[1], *documents, *others[2:]]


def collator(processor, **changes) -> Collator:
    values = {
        "packed": True,
        "pad_token_id": tiny.PAD,
        "filler": Encoder(processor, "vicuna", MAX_LENGTH).filler(NUM_VOCO),
        "always_image": False,
        "voco_token_id": tiny.VOCO,
        "image_token_id": tiny.IMAGE,
    }
    return Collator(**{**values, **changes})


def dense(ids: list[int], isolated: bool) -> torch.Tensor:
    """bool ``[S, S]`` (query, key) of one document.

    Causal. What an image's VoCo tokens replace (for the first, all that stands before them; else from
    its first image token on) is seen by nothing behind them. Isolated, an image sees itself alone.
    """
    length = len(ids)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    end = 0
    while tiny.VOCO in ids[end:]:
        voco = ids.index(tiny.VOCO, end)
        start = ids.index(tiny.IMAGE, end) if end else 0
        end = voco + NUM_VOCO
        assert ids[voco:end] == [tiny.VOCO] * NUM_VOCO
        mask[end:, start:voco] = False
        if isolated:
            mask[start:end, :start] = False
    return mask


def layout_of(batch: dict, isolated: bool = False) -> torch.Tensor:
    return MaskLayout.from_input_ids(
        batch["input_ids"],
        voco_token_id=tiny.VOCO,
        image_token_id=tiny.IMAGE,
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        isolated=isolated,
    ).materialize()


@pytest.mark.parametrize("isolated", [False, True])
def test_padded_rows_see_what_the_definition_says(processor, isolated):
    documents = encoded(processor)
    batch = collator(processor, packed=False, isolated=isolated)(documents)
    longest = max(len(document.input_ids) for document in documents)
    expected = torch.zeros(len(documents), longest, longest, dtype=torch.bool)
    for row, document in enumerate(documents):
        length = len(document.input_ids)
        expected[row, :length, :length] = dense(document.input_ids.tolist(), isolated)
        assert batch["input_ids"][row, :length].equal(document.input_ids)
        assert (batch["input_ids"][row, length:] == tiny.PAD).all()
        assert batch["labels"][row, :length].equal(document.labels)
        assert (batch["labels"][row, length:] == IGNORE).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
    assert "position_ids" not in batch
    mask = layout_of(batch, isolated)
    for row in range(len(documents)):
        assert mask[row].equal(expected[row])
    text_only = len(documents[1].input_ids)
    assert mask[1, :text_only, :text_only].equal(torch.ones(text_only, text_only).tril().bool())
    assert not mask[1, text_only:].any() and not mask[1, :, text_only:].any()
    check_counts(batch[STATS], documents, expected, len(documents) * longest)


@pytest.mark.parametrize("isolated", [False, True])
def test_packed_documents_see_themselves_alone(processor, isolated):
    documents = encoded(processor)
    batch = collator(processor, isolated=isolated)(documents)
    blocks = [dense(document.input_ids.tolist(), isolated) for document in documents]
    expected = torch.block_diag(*blocks)[None].bool()
    assert layout_of(batch, isolated).equal(expected)
    lengths = [len(document.input_ids) for document in documents]
    assert batch["position_ids"].tolist() == [[i for n in lengths for i in range(n)]]
    assert "attention_mask" not in batch
    assert batch["input_ids"][0].equal(torch.cat([d.input_ids for d in documents]))
    assert batch["labels"][0].equal(torch.cat([d.labels for d in documents]))
    check_counts(batch[STATS], documents, expected, sum(lengths))


def check_counts(stats, documents, mask: torch.Tensor, computed: int) -> None:
    assert stats.samples == len(documents)
    assert stats.tokens == sum(len(document.input_ids) for document in documents)
    assert stats.computed == computed
    assert stats.pairs == int(mask.sum())
    assert stats.faults == []


def test_no_document_is_asked_to_predict_the_next_ones_start(llava):
    ids = torch.tensor([tiny.BOS, 40, 41])
    documents = [Encoded(ids, ids.clone()), Encoded(ids, ids.clone())]
    batch = collator(llava)(documents)
    assert batch["labels"].tolist() == [[IGNORE, 40, 41, IGNORE, 40, 41]]
    assert documents[0].labels.equal(ids)  # its own copy


@pytest.mark.parametrize("packed", [True, False])
def test_images_stand_in_the_order_of_their_documents(processor, packed):
    documents = encoded(processor)
    batch = collator(processor, packed=packed)(documents)
    images = iter(batch["pixel_values"])
    for document in documents:
        for image in [] if document.pixel_values is None else document.pixel_values:
            together = next(images)
            if image.dim() == 4:  # tiles, filled up with zeros
                assert not together[len(image) :].any()
                together = together[: len(image)]
            assert together.equal(image)
    assert next(images, None) is None
    with_image = [document for document in documents if document.pixel_values is not None]
    if documents[0].image_sizes is not None:
        sizes = torch.cat([document.image_sizes for document in with_image])
        assert batch["image_sizes"].equal(sizes)
    else:
        assert batch[STATS].tiles == len(batch["pixel_values"]) == 5


def test_tiles_are_counted_without_what_fills_them_up(processor, kind):
    documents = encoded(processor)
    one_each = [documents[0], documents[3]]  # 64 x 64, 40 x 40
    assert collator(processor)(one_each)[STATS].tiles == (2 if kind == "llava" else 10)
    small = Encoder(processor, "vicuna", 4096).encode(sample("?", "!", sizes=[(32, 64)]), NUM_VOCO)
    stats = collator(processor)([documents[0], small])[STATS]
    assert stats.tiles == (2 if kind == "llava" else 8)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("always_image", [True, False])
def test_an_empty_batch_is_a_filler(processor, packed, always_image):
    fault = Fault("broken_image", "data.json:7", "cut off")
    make = collator(processor, packed=packed, always_image=always_image)
    for documents in ([], [fault]):
        batch = make(documents)
        assert (batch["labels"] == IGNORE).all()
        assert batch["input_ids"].equal(make.filler.input_ids[None])
        assert batch["pixel_values"].equal(make.filler.pixel_values)
        stats = batch[STATS]
        assert (stats.samples, stats.tokens) == (0, 0)
        assert stats.computed == batch["input_ids"].numel()
        assert stats.pairs == int(layout_of(batch).sum())
        assert stats.faults == documents


@pytest.mark.parametrize("packed", [True, False])
def test_where_there_must_be_an_image_a_filler_has_it(processor, packed):
    text = [encoded(processor)[1]] * 2
    plain = collator(processor, packed=packed)(text)
    assert "pixel_values" not in plain and plain[STATS].tiles == 0
    make = collator(processor, packed=packed, always_image=True)
    batch = make(text)
    assert batch["pixel_values"].equal(make.filler.pixel_values)
    assert (batch["labels"] != IGNORE).sum() == (plain["labels"] != IGNORE).sum()
    filler = len(make.filler.input_ids)
    behind = batch["labels"][0, -filler:] if packed else batch["labels"][-1]
    assert (behind == IGNORE).all()
    assert (batch[STATS].samples, batch[STATS].tokens) == (2, plain[STATS].tokens)
    assert batch[STATS].computed == batch["input_ids"].numel() > plain[STATS].computed
    with_image = encoded(processor)[0]
    assert make([with_image])["input_ids"].equal(with_image.input_ids[None])  # none needed


def test_a_filler_is_an_image_part_with_nothing_to_learn(processor):
    filler = Encoder(processor, "vicuna", MAX_LENGTH).filler(NUM_VOCO)
    assert learnt(processor, filler) == []
    assert filler.labels.dtype == filler.input_ids.dtype == torch.int64
    ids = filler.input_ids.tolist()
    assert ids[0] == tiny.BOS and ids[-NUM_VOCO:] == [tiny.VOCO] * NUM_VOCO
    assert ids.count(tiny.VOCO) == NUM_VOCO
    assert filler.pixel_values is not None

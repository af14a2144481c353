"""Documents packed by the collators people use: each is answered as if it stood alone, or refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening

from tests.voco_model import tiny

# (VoCo tokens, text tokens) of three documents; the second has no image.
ROWS = [(2, 6), (0, 5), (2, 3)]


class Documents:
    """Some documents, and what an enabled model makes of each alone."""

    def __init__(self, model) -> None:
        padded, kinds = tiny.batch_of(model, ROWS, side="right")
        lengths = padded["attention_mask"].sum(1).tolist()
        self.ids = [row[:n] for row, n in zip(padded["input_ids"], lengths, strict=True)]
        self.lengths = lengths
        self.vision = {
            name: value
            for name, value in padded.items()
            if name not in ("input_ids", "attention_mask")
        }
        with torch.no_grad():
            self.logits = model(**padded, use_cache=False).logits[tiny.where(kinds, "vct")]

    def features(self) -> list[dict]:
        return [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in self.ids]

    def row(self, padding: int = 0) -> torch.Tensor:
        return torch.cat([*self.ids, torch.full((padding,), tiny.PAD)])[None]

    def positions(self, padding: int = 0) -> torch.Tensor:
        pieces = [torch.arange(n) for n in self.lengths]
        return torch.cat([*pieces, torch.zeros(padding, dtype=torch.long)])[None]

    def numbers(self, padding: int = 0) -> torch.Tensor:
        counts = [*self.lengths, padding]
        return torch.tensor([1, 2, 3, 0]).repeat_interleave(torch.tensor(counts))[None]

    def cumulative(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()


def collated(**options):
    return lambda documents: dict(DataCollatorWithFlattening(**options)(documents.features()))


LAYOUTS = {
    "DataCollatorWithFlattening": collated(),
    "... with lengths": collated(return_flash_attn_kwargs=True),
    "... with lengths only": collated(return_position_ids=False, return_flash_attn_kwargs=True),
    "... with numbers only": collated(return_position_ids=False, return_seq_idx=True),
    "... with all": collated(return_flash_attn_kwargs=True, return_seq_idx=True),
    "TRL, padding_free, to a multiple": lambda documents: {
        "input_ids": documents.row(5),
        "position_ids": documents.positions(5),
    },
    "LLaMA-Factory, neat_packing": lambda documents: {
        "input_ids": documents.row(5),
        "attention_mask": documents.numbers(5),
        "position_ids": documents.positions(5),
    },
    "numbers in the mask only": lambda documents: {
        "input_ids": documents.row(5),
        "attention_mask": documents.numbers(5),
    },
    "ms-swift, padding_free": lambda documents: {
        "input_ids": documents.row(),
        "position_ids": documents.positions(),
        "cu_seq_lens_q": documents.cumulative(),
        "cu_seq_lens_k": documents.cumulative(),
        "max_length_q": torch.tensor(max(documents.lengths)),
        "max_length_k": torch.tensor(max(documents.lengths)),
    },
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_each_document_is_as_it_is_alone(enabled, layout, train):
    documents = Documents(enabled)
    batch = layout(documents)
    batch.pop("labels", None)
    enabled.train(train)
    with torch.no_grad():
        together = enabled(**batch, **documents.vision).logits[0, : sum(documents.lengths)]
    torch.testing.assert_close(together, documents.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_gradient_crosses(enabled, layout):
    """From a document to the inputs of those before it, which a leak would reach."""
    documents = Documents(enabled)
    batch = layout(documents)
    batch.pop("labels", None)
    embedded = []
    keep = enabled.get_input_embeddings().register_forward_hook(
        lambda *call: embedded.append(call[2].requires_grad_().clone()) or embedded[-1]
    )
    enabled.train()
    try:
        logits = enabled(**batch, **documents.vision).logits
    finally:
        keep.remove()
    third, last = documents.cumulative()[2:].tolist()
    (gradient,) = torch.autograd.grad(logits[0, third:last].square().sum(), embedded)
    assert gradient[0, third:last].abs().max() > 0
    assert gradient[0, :third].abs().max() == 0


def test_trained_with_the_collator_as_with_padding(enabled):
    """Loss and gradients; the collator's labels leave out each document's first token."""
    documents = Documents(enabled)
    batch = collated(return_position_ids=False, return_flash_attn_kwargs=True)(documents)
    padded, _ = tiny.batch_of(enabled, ROWS, side="right")
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    found = []
    for inputs in ({**batch, **documents.vision}, {**padded, "labels": labels}):
        enabled.train()
        enabled.zero_grad()
        loss = enabled(**inputs).loss
        loss.backward()
        weight = enabled.model.language_model.layers[0].self_attn.k_proj.weight
        found.append((loss.detach(), weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_what_follows_a_packed_prompt_continues_its_last_document(enabled):
    documents = Documents(enabled)
    token = torch.tensor([[77]])
    packed = {"input_ids": documents.row(), "cu_seq_lens_q": documents.cumulative()}
    alone = {"input_ids": documents.ids[2][None]}
    vision = {name: value[1:] for name, value in documents.vision.items()}
    found = []
    for inputs, images in ((packed, documents.vision), (alone, vision)):
        with torch.no_grad():
            cache = enabled(**inputs, **images, use_cache=True).past_key_values
            position = torch.tensor([[documents.lengths[2]]])
            step = enabled(input_ids=token, past_key_values=cache, position_ids=position)
        found.append(step.logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def wrong(**change):
    return lambda documents: {
        "input_ids": documents.row(),
        "cu_seq_lens_q": documents.cumulative(),
        "cu_seq_lens_k": documents.cumulative(),
        "max_length_q": max(documents.lengths),
        **{name: make(documents) for name, make in change.items()},
    }


REFUSED = {
    "keys of other documents": (
        wrong(cu_seq_lens_k=lambda d: d.cumulative()[[0, 1, 3]]),
        "cu_seq_lens_q and cu_seq_lens_k to be equal",
    ),
    "a longest that isn't": (
        wrong(max_length_q=lambda d: 3),
        "max_length_q of at least .*, got 3",
    ),
    "a longest alone": (
        lambda d: {"input_ids": d.row(), "max_length_q": 30, "max_length_k": 30},
        "cu_seq_lens_q with max_length_q, max_length_k",
    ),
    "positions that go on": (
        wrong(position_ids=lambda d: torch.arange(sum(d.lengths))[None]),
        "cu_seqlens and position_ids to agree",
    ),
    "positions of three axes": (
        wrong(position_ids=lambda d: d.positions().expand(3, 1, -1)),
        r"LLaVA's text models have one position per token",
    ),
    "another name": (
        lambda d: {"input_ids": d.row(), "cu_seqlens": d.cumulative()},
        "got cu_seqlens, which is not read",
    ),
    "LLaMA-Factory's dense mask": (
        lambda d: {
            "input_ids": d.row(),
            "attention_mask": (d.numbers()[:, None, :, None] == d.numbers()[:, None, None]).tril(),
        },
        r"packed documents pass their numbers \(1, 1, 2, 2, 2\)",
    ),
    "an additive mask": (
        lambda d: {"input_ids": d.row(), "attention_mask": torch.zeros(d.row().shape)},
        "a float attention_mask of 0 for padding and 1 for tokens",
    ),
    "numbers under a name of their own": (
        lambda d: {"input_ids": d.row(), "my_documents": d.numbers()},
        "got my_documents, which is not read",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(enabled, make, message):
    documents = Documents(enabled)
    with pytest.raises((TypeError, ValueError), match=message):
        enabled(**make(documents), **documents.vision)


def test_a_float_mask_of_zeros_and_ones_is_read(enabled):
    inputs, _ = tiny.batch_of(enabled, ROWS, side="right")
    expected = enabled(**inputs).logits
    inputs["attention_mask"] = inputs["attention_mask"].float()
    assert torch.equal(enabled(**inputs).logits, expected)


def test_packed_documents_cannot_follow_a_cache(enabled):
    ids = torch.tensor([[tiny.BOS, 70, 71, 72]])
    with torch.no_grad():
        cache = enabled(input_ids=ids, use_cache=True).past_key_values
        for markers in (
            {"cu_seq_lens_q": torch.tensor([0, 2, 4]), "max_length_q": 2},
            {"seq_idx": torch.tensor([[0, 0, 1, 1]])},
            {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2]])},
            {"position_ids": torch.tensor([[4, 5, 0, 1]])},
        ):
            name = next(iter(markers))
            with pytest.raises(
                ValueError, match=f"one document to follow a cache of 4, got {name}"
            ):
                enabled(input_ids=ids, past_key_values=cache, **markers)
        assert cache.get_seq_length() == 4

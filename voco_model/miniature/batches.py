"""Conversations about pictures, as token ids: what the miniature is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from voco_model.data.encode import IGNORE
from voco_model.miniature.model import MEAN, STD
from voco_model.miniature.scenes import Question, ask_many, describe, draw_scene, paint
from voco_model.vlm.prompt import IMAGE_TOKEN, image_part, text_pieces


@dataclass(frozen=True)
class Batch:
    """``input_ids`` and ``labels``, int64 ``[B, S]``, and ``pixel_values``, float32 ``[B, 3, 48, 48]``.

    Rows are padded on the right: causal attention doesn't see that, so there is no attention_mask.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device), self.labels.to(device), self.pixel_values.to(device)
        )


class Conversations:
    """Token ids of conversations in Listing 1's form; the tokenizer sees each piece of text once.

    Args:
        processor: of the miniature; it writes as many image tokens as a method has set.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        self._tokenizer = processor.tokenizer
        image = processor._get_num_multimodal_tokens([(1, 1)]).num_image_tokens[0]
        self._image_tokens = image
        self._ids = lru_cache(maxsize=None)(self._tokenize)

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, questions: list[Question], num_voco: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation about one picture, with BOS; ``num_voco`` may be 0.

        A piece ends with an answer's end of sequence, which no merge of the tokenizer crosses, so the
        pieces' ids are those of the whole.
        """
        tokenizer = self._tokenizer
        turns = [
            turn
            for question in questions
            for turn in (
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": question.answer},
            )
        ]
        written = image_part(num_voco) if num_voco else IMAGE_TOKEN
        ids, labels = [tokenizer.bos_token_id], [IGNORE]
        for text, learnt in text_pieces(turns, with_image=True, eos_token=tokenizer.eos_token):
            if not learnt:
                written += text
                continue
            asked, answer = self._ids(written), self._ids(text)
            ids += asked + answer
            labels += [IGNORE] * len(asked) + answer
            written = ""
        at = ids.index(tokenizer.image_token_id)
        more = self._image_tokens - 1
        ids[at:at] = [tokenizer.image_token_id] * more
        labels[at:at] = [IGNORE] * more
        return ids, labels

    def pad(self, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``labels``, ``[B, S]``."""
        length = max(len(ids) for ids, _ in rows)
        padded = torch.full((len(rows), length), self._tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORE)
        for row, (ids, learnt) in enumerate(rows):
            padded[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(learnt)] = torch.tensor(learnt)
        return padded, labels


def pixels(pictures: list[np.ndarray]) -> Tensor:
    """What the image processor makes of these pictures, float32 ``[B, 3, 48, 48]``."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (stacked.float() / 255 - MEAN) / STD


def batches(
    processor: LlavaProcessor,
    seed: int,
    size: int,
    questions: int,
    counts: tuple[int, ...],
    captions: int = 0,
) -> Iterator[Batch]:
    """Without end, of the training digits.

    Args:
        size: conversations in a batch, each about a picture of its own.
        questions: in a conversation.
        counts: of VoCo tokens; a batch has one of them, drawn at random. 0 for none.
        captions: in the first so many batches captions stand for conversations, in the first one surely,
            then less and less often.
    """
    conversations = Conversations(processor)
    rng = np.random.default_rng(seed)
    # Apart, so that pictures and questions are the same for any counts.
    drawn = np.random.default_rng(seed + 1)
    for number in count():
        num_voco = int(drawn.choice(counts))
        captioned = number + captions * rng.random() < captions
        pictures, rows = [], []
        for _ in range(size):
            scene = draw_scene(rng, "train")
            pictures.append(paint(scene, "train", rng))
            asked = [describe(scene, rng)] if captioned else ask_many(scene, questions, rng)
            rows.append(conversations.encode(asked, num_voco))
        yield Batch(*conversations.pad(rows), pixels(pictures))

"""Training batches of the miniature: conversations about pictures, as token ids."""

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

    Rows are padded on the right, which causal attention never sees, so there is no attention_mask.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device), self.labels.to(device), self.pixel_values.to(device)
        )


class Conversations:
    """Encodes conversations in Listing 1's form, and tokenizes each piece of text only once.

    Args:
        processor: the miniature's processor, with the method's number of image tokens.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        self._tokenizer = processor.tokenizer
        image = processor._get_num_multimodal_tokens([(1, 1)]).num_image_tokens[0]
        self._image_tokens = image
        self._ids = lru_cache(maxsize=None)(self._tokenize)

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, questions: list[Question], num_voco: int) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation about one picture, with BOS; ``num_voco`` can be 0.

        Each piece ends with an answer's EOS, which no merge of the tokenizer crosses, so tokenizing
        pieces gives the same ids as tokenizing the whole.
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
    """Pictures as the image processor returns them, float32 ``[B, 3, 48, 48]``."""
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
    """Endless batches with training digits.

    Args:
        size: conversations per batch, each about its own picture.
        questions: questions per conversation.
        counts: numbers of VoCo tokens, one of which is drawn for each batch; 0 for none.
        captions: number of batches over which captions give way to conversations: the probability of a
            batch of captions falls linearly from 1 to 0.
    """
    conversations = Conversations(processor)
    rng = np.random.default_rng(seed)
    # A separate generator, so that pictures and questions are the same for any counts.
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

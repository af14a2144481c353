"""``return_assistant_tokens_mask`` for prompts with images.

Transformers finds the answers by their characters in what the chat template has written, and looks for
their tokens in a text in which each ``<image>`` has been replaced by hundreds (transformers#46559), or
in a row whose padding has put the offsets out of order.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

import torch
from torch import Tensor


def mark_answers(processor, steps: ExitStack) -> None:
    """Have ``processor.apply_chat_template`` return the right ``assistant_masks``.

    Args:
        steps: gets the way back.
    """
    if not isinstance(processor, _AnswerMask):
        steps.callback(setattr, processor, "__class__", type(processor))
        processor.__class__ = _with_answer_mask(type(processor))


class _AnswerMask:
    def apply_chat_template(self, conversation, chat_template=None, **options):
        made = super().apply_chat_template(conversation, chat_template, **options)
        asked = options.get("return_assistant_tokens_mask") and options.get("return_dict")
        # Another template's variables, and where its images stand, are not known here.
        if (
            not asked
            or not options.get("tokenize")
            or chat_template not in (None, self.chat_template)
        ):
            return made
        names = ("add_generation_prompt", "num_voco")
        written = self.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.chat_template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **{name: options[name] for name in names if name in options},
        )
        ids, masks = written["input_ids"], written["assistant_masks"]
        if not isinstance(ids[0], list):
            ids, masks = [ids], [masks]
        image_id = self.image_token_id
        rows = _lists(made["input_ids"])
        real = made.get("attention_mask")
        real = [[1] * len(row) for row in rows] if real is None else _lists(real)
        right = [
            _behind_images(image_id, row, own, mask)
            if image_id in own
            else _at_its_tokens(row, there, own, mask)
            for row, there, own, mask in zip(rows, real, ids, masks, strict=True)
        ]
        is_tensor = isinstance(made["assistant_masks"], Tensor)
        made["assistant_masks"] = torch.tensor(right) if is_tensor else right
        return made

    def __reduce__(self):
        return _restored, (type(self).__bases__[1], self.__dict__)


@cache
def _with_answer_mask(cls: type) -> type:
    """The class with the mask mended, under its own name, by which a saved processor is loaded."""
    return type(cls.__name__, (_AnswerMask, cls), {"__module__": cls.__module__})


def _restored(cls: type, state: dict):
    processor = cls.__new__(cls)
    processor.__dict__.update(state)
    processor.__class__ = _with_answer_mask(cls)
    return processor


def _behind_images(image_id: int, row: list[int], ids: list[int], mask: list[int]) -> list[int]:
    """The mask of a row whose images are expanded, from that of one with a token an image.

    Our template has all images in front, so that both are the same behind the last one. The row may be
    padded, or cut off at its end.
    """
    found = [0] * _behind_last(image_id, row) + mask[_behind_last(image_id, ids) :]
    return (found + [0] * len(row))[: len(row)]


def _at_its_tokens(row: list[int], real: list[int], ids: list[int], mask: list[int]) -> list[int]:
    """The mask of a row without images, from that of its tokens alone.

    Transformers' own is wrong for a row that is padded on the right: it looks characters up in offsets
    that padding has put out of order.

    Args:
        row: token ids. It may start with BOS, be padded, or be cut off on either side.
        real: 0 for padding.
        ids, mask: of what the template has written, without BOS.
    """
    count = sum(real)
    start = real.index(1) if count else 0
    own = row[start : start + count]
    bos = next((n for n in (0, 1) if own[n:] == ids[: count - n]), None)
    if bos is None:  # cut off at its start
        kept = [0] * (count - len(mask)) + mask[-count:]
    else:
        kept = ([0] * bos + mask)[:count]
    return [0] * start + kept + [0] * (len(row) - start - count)


def _behind_last(token: int, ids: list[int]) -> int:
    return len(ids) - ids[::-1].index(token)


def _lists(rows) -> list[list[int]]:
    return rows.tolist() if isinstance(rows, Tensor) else rows

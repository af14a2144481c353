"""What ``enable`` adds to a processor: right ``assistant_masks``, and a model card beside saved files.

``return_assistant_tokens_mask`` of Transformers finds the answers by their characters in the rendered
chat template. It then looks for their tokens in a text in which each ``<image>`` has been expanded to
hundreds (transformers#46559), or in a row whose offsets are shifted by padding.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

import torch
from torch import Tensor

from voco_model.vlm.model_card import write_model_card
from voco_model.vlm.undo import put


def extend_processor(processor, steps: ExitStack) -> None:
    """Give the processor the methods of ``EnabledProcessor``.

    Args:
        steps: receives the callbacks that undo it.
    """
    if not isinstance(processor, EnabledProcessor):
        put(steps, processor, "__class__", _extended(type(processor)))


class EnabledProcessor:
    """Mixed into the class of a processor."""

    def apply_chat_template(self, conversation, chat_template=None, **options):
        made = super().apply_chat_template(conversation, chat_template, **options)
        asked = options.get("return_assistant_tokens_mask") and options.get("return_dict")
        # The variables of another template, and where it puts images, are not known here.
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
            _after_images(image_id, row, own, mask)
            if image_id in own
            else _at_its_tokens(row, there, own, mask)
            for row, there, own, mask in zip(rows, real, ids, masks, strict=True)
        ]
        is_tensor = isinstance(made["assistant_masks"], Tensor)
        made["assistant_masks"] = torch.tensor(right) if is_tensor else right
        return made

    def save_pretrained(self, save_directory, **options):
        saved = super().save_pretrained(save_directory, **options)
        write_model_card(save_directory)
        return saved

    def __reduce__(self):
        return _restored, (type(self).__bases__[1], self.__dict__)


@cache
def _extended(cls: type) -> type:
    """The extended class. It keeps the name, by which a saved processor is loaded."""
    return type(cls.__name__, (EnabledProcessor, cls), {"__module__": cls.__module__})


def _restored(cls: type, state: dict):
    processor = cls.__new__(cls)
    processor.__dict__.update(state)
    processor.__class__ = _extended(cls)
    return processor


def _after_images(image_id: int, row: list[int], ids: list[int], mask: list[int]) -> list[int]:
    """The mask of a row with expanded images, from the mask of one with a single token per image.

    Our template puts all images first, so both rows are the same after the last one. The row may be
    padded, or cut off at its end.
    """
    found = [0] * _after_last(image_id, row) + mask[_after_last(image_id, ids) :]
    return (found + [0] * len(row))[: len(row)]


def _at_its_tokens(row: list[int], real: list[int], ids: list[int], mask: list[int]) -> list[int]:
    """The mask of a row without images, from the mask of its tokens alone.

    Transformers' own mask is wrong for a row that is padded on the right, where it looks characters up
    in shifted offsets.

    Args:
        row: token ids. It may start with BOS, be padded, or be cut off on either side.
        real: 0 for padding.
        ids, mask: token ids of the rendered template without BOS, and their mask.
    """
    count = sum(real)
    start = real.index(1) if count else 0
    own = row[start : start + count]
    bos = next((n for n in (0, 1) if own[n:] == ids[: count - n]), None)
    if bos is None:  # cut off at the start
        kept = [0] * (count - len(mask)) + mask[-count:]
    else:
        kept = ([0] * bos + mask)[:count]
    return [0] * start + kept + [0] * (len(row) - start - count)


def _after_last(token: int, ids: list[int]) -> int:
    return len(ids) - ids[::-1].index(token)


def _lists(rows) -> list[list[int]]:
    return rows.tolist() if isinstance(rows, Tensor) else rows

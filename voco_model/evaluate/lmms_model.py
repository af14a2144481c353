"""A method of ``voco_model.baselines`` as a model of lmms-eval, which this module imports."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor

from voco_model import baselines
from voco_model.devices import usable_device
from voco_model.evaluate import requests as ask
from voco_model.pictures import ground_of
from voco_model.vlm.control_tokens import as_text, control_tokens

logger = logging.getLogger(__name__)


class LMMSModel(lmms):
    """The model class that lmms-eval calls to have its questions answered.

    Args:
        method: a method that is applied to its model.
        batch_size: questions per call of ``method.answer``.
        several_images: ``"refuse"`` or ``"middle"``; see ``requests.image_of``.

    Raises:
        ValueError: a batch size below 1, or another value of ``several_images``.
    """

    is_simple = True  # requests are text and images, not messages

    def __init__(
        self,
        method: baselines.Method,
        *,
        batch_size: int = 1,
        several_images: str = "refuse",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}")
        if several_images not in ask.SEVERAL_IMAGES:
            raise ValueError(
                f"expected several_images as one of {', '.join(ask.SEVERAL_IMAGES)}, got "
                f"{several_images!r}"
            )
        super().__init__()
        self.method = method
        self.batch_size = batch_size
        self.several_images = several_images

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> LMMSModel:
        """For ``lmms-eval --model voco --model_args pretrained=...,method=...,num_tokens=...``.

        ``method`` defaults to the one that the checkpoint was trained for. Further arguments:
        ``dtype``, ``device``, ``several_images``, and the method's own options.
        """
        given = {**(additional_config or {}), **simple_parse_args_string(arg_string)}
        given = {name: value for name, value in given.items() if value is not None}
        if "pretrained" not in given:
            raise ValueError(
                f"expected model_args with a checkpoint, got {arg_string!r}; write "
                "pretrained=FOLDER,method=voco"
            )
        given.pop("max_batch_size", None)
        own = {
            "batch_size": int(given.pop("batch_size", 1)),
            "several_images": given.pop("several_images", "refuse"),
        }
        given["device"] = usable_device(given.get("device"))
        path, name = given.pop("pretrained"), given.pop("method", None)
        return cls(baselines.load(path, name, **given), **own)

    @property
    def device(self) -> torch.device:
        return self.method.model.device

    def generate_until(self, requests: Sequence) -> list[str]:
        """Answers, greedy unless the task says otherwise, cut at the task's ``until``.

        Options of a task that ``generate`` doesn't have are ignored, with one warning.
        """
        for task, given in {request.args[4]: request.args[1] for request in requests}.items():
            if unknown := ask.unknown_options(given):
                _warn_left_out(task, tuple(unknown))
        answers = [""] * len(requests)
        for indices in self._batches(requests, key=_options_of):
            options, until = ask.generation_options(requests[indices[0]].args[1])
            rows = [self._row(requests[index].args) for index in indices]
            for part, images, turns in _by_image(indices, rows):
                for index, answer in zip(
                    part, self.method.answer(images, turns, **options), strict=True
                ):
                    answers[index] = ask.cut(answer, until)
        return answers

    def loglikelihood(self, requests: Sequence) -> list[tuple[float, bool]]:
        """For each continuation, its loss and whether a greedy answer would be the same.

        The loss is the mean of ``-log p`` over its tokens, as in lmms-eval's own models; its multiple
        choice takes the smallest. ``method.generate`` is forced to produce the continuation, so that it
        is scored the same way in which the method answers questions.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for indices in self._batches(requests):
            rows = [self._row(requests[index].args) for index in indices]
            for part, images, turns in _by_image(indices, rows):
                targets = [
                    self._continuation(turn, self._target(requests[index].args))
                    for index, turn in zip(part, turns, strict=True)
                ]
                told = Told(targets, self.method.processor.tokenizer.eos_token_id)
                self.method.generate(
                    images,
                    turns,
                    do_sample=False,
                    max_new_tokens=max(map(len, targets)),
                    logits_processor=[told],
                )
                for index, loss, greedy in zip(part, told.losses(), told.greedy(), strict=True):
                    found[index] = (loss, greedy)
        return found

    def generate_until_multi_round(self, requests: Sequence) -> list[str]:
        raise NotImplementedError(
            f"expected a task that asks once, got {len(requests)} requests of several rounds; leave "
            "tasks of output_type generate_until_multi_round out"
        )

    def _batches(self, requests: Sequence, key=lambda args: "") -> Iterator[list[int]]:
        """Batches of request indices with the same key, long questions first."""
        order = sorted(
            range(len(requests)),
            key=lambda index: (key(requests[index].args), -len(requests[index].args[0])),
        )
        with tqdm(total=len(order), disable=self.rank != 0, desc=self.method.name) as progress:
            while order:
                first = key(requests[order[0]].args)
                batch = [
                    index
                    for index in order[: self.batch_size]
                    if key(requests[index].args) == first
                ]
                yield batch
                del order[: len(batch)]
                progress.update(len(batch))

    def _row(self, args: tuple) -> tuple[Image.Image | None, list[dict]]:
        """Image and turns of a request ``(context, ..., doc_to_visual, doc_id, task, split)``."""
        context, _, doc_to_visual, doc_id, task, split = args
        document = self.task_dict[task][split][doc_id]
        where = f"question {doc_id} of {task}"
        ground = ground_of(getattr(self.method.model, "config", None))
        image = ask.image_of(doc_to_visual(document), self.several_images, where, ground)
        return image, ask.turns_of(ask.question_of(context), image is not None)

    def _target(self, args: tuple) -> str:
        _, target, _, doc_id, task, split = args
        target = target(self.task_dict[task][split][doc_id]) if callable(target) else target
        return str(target).strip()

    def _continuation(self, turns: list[dict], answer: str) -> list[int]:
        """The token ids of an answer behind its prompt, without the answer's end."""
        prompt = self.method.prompt(turns)
        answered = self.method.prompt(
            [*turns, {"role": "assistant", "content": answer}], add_generation_prompt=False
        )
        tokenizer = self.method.processor.tokenizer
        answer = as_text(answer, control_tokens(tokenizer))
        whole = answered[: answered.rindex(answer) + len(answer)]
        before, ids = tokenizer(prompt).input_ids, tokenizer(whole).input_ids
        if ids[: len(before)] != before or len(ids) == len(before):
            raise ValueError(
                f"expected an answer whose tokens follow those of the prompt, got {answer!r}; leave its "
                "task out"
            )
        return ids[len(before) :]


@cache  # once per task, for any number of methods
def _warn_left_out(task: str, names: tuple[str, ...]) -> None:
    logger.warning("generation options of %s are ignored: %s", task, ", ".join(names))


def _options_of(args: tuple) -> str:
    return json.dumps(args[1], sort_keys=True, default=str)


def _by_image(
    indices: Sequence[int], rows: Sequence[tuple]
) -> Iterator[tuple[list[int], list[Image.Image] | None, list[list[dict]]]]:
    """Split a batch into rows with and without images, since a processor takes one kind at a time."""
    for with_image in (True, False):
        chosen = [
            (index, *row)
            for index, row in zip(indices, rows, strict=True)
            if (row[0] is not None) == with_image
        ]
        if chosen:
            part, images, turns = map(list, zip(*chosen, strict=True))
            yield part, images if with_image else None, turns


class Told(LogitsProcessor):
    """Forces ``generate`` to produce given tokens, and records their probabilities.

    Args:
        targets: token ids of each row; shorter rows are filled with ``eos_token_id``.
        eos_token_id: the token that ends a sequence.
    """

    def __init__(self, targets: Sequence[Sequence[int]], eos_token_id: int) -> None:
        self.lengths = [len(row) for row in targets]
        longest = max(self.lengths)
        padded = [[*row, *[eos_token_id] * (longest - len(row))] for row in targets]
        self.targets = torch.tensor(padded)
        self.log_probabilities: list[Tensor] = []
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        target = self.targets[:, len(self.chosen)].to(scores.device)[:, None]
        own = scores.float().log_softmax(-1).gather(-1, target)
        self.log_probabilities.append(own[:, 0])
        self.chosen.append(scores.argmax(-1) == target[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(-1, target, 0.0)

    def losses(self) -> list[float]:
        values = torch.stack(self.log_probabilities, 1).tolist()
        return [
            -sum(row[:length]) / length for row, length in zip(values, self.lengths, strict=True)
        ]

    def greedy(self) -> list[bool]:
        values = torch.stack(self.chosen, 1).tolist()
        return [all(row[:length]) for row, length in zip(values, self.lengths, strict=True)]

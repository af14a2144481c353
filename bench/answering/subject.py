"""One model under the clock: questions through the engine in its three modes, through stock
``generate`` and through ``voco_model.generate``; and what they should answer."""

from __future__ import annotations

import hashlib
import random
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import voco_model
from bench.answering import models
from bench.answering.models import Spec
from bench.harness.clock import Flush
from bench.harness.guard import WrongError, first_line
from voco_model import flops
from voco_model.kv_store.memory_store import MemoryStore
from voco_model.vlm.attach import attach
from voco_model.vlm.prompt import IMAGE_TOKEN, image_part

FINGERPRINT = "bench"
# In ms: for so long the device is kept busy while a request is enqueued, so that its stages hold none
# of the host's time.
COVERED_MS = 10.0


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        repeats: how often a row is measured, at least; a stream a third as often.
        seconds: a row is repeated until these are spent, too, but at most four times ``repeats``.
        compared: pictures whose answers are compared before anything is timed.
        requests: in a stream.
    """

    repeats: int
    seconds: float
    compared: int
    requests: int


FULL = {"cuda": Effort(12, 1.0, 8, 32), "cpu": Effort(6, 3.0, 2, 16)}
QUICK = {"cuda": Effort(3, 0.0, 2, 8), "cpu": Effort(2, 0.0, 1, 4)}


@dataclass(frozen=True)
class Reference:
    """What a picture's question is answered with.

    Attributes:
        tokens: those of ``generate``.
        logits: float32 ``[vocabulary]``, from which the first of them was chosen.
    """

    tokens: list[int]
    logits: Tensor


@dataclass
class References:
    """What ``generate`` answers, picture by picture.

    Attributes:
        noise: by how much a first token's logits differ, at most, between two routes that are both
            exact, and no less than one rounding of the largest; None where the second route failed, for
            ``reason``.
    """

    answers: list[Reference]
    noise: float | None
    reason: str = ""


@dataclass
class Asked:
    """One run of a batch: times in milliseconds.

    Attributes:
        stages: until the first token; device time on CUDA.
        decode: one for each decoding step.
        first, whole: on the host's clock, from the first request until each has its first, its last
            token.
    """

    stages: dict[str, float]
    decode: list[float]
    first: float
    whole: float
    answers: list[voco_model.Answer] = field(default_factory=list)


class Subject:
    """A model, and how to ask it.

    Args:
        spec: of the model, whose weights are made here.
        device, dtype: of the weights.
        text_tokens: of a question.
        new_tokens: of an answer.
        max_batch: the largest that will be measured.
        store_bytes: for the store of entries.
        effort: how much is measured.

    Attributes:
        image_tokens: vision tokens of a picture.
        store: of entries; those of ``keep`` stay in it.

    Raises:
        torch.OutOfMemoryError: the model doesn't fit.
    """

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        text_tokens: int,
        new_tokens: int,
        max_batch: int,
        store_bytes: int,
        effort: Effort,
    ) -> None:
        self.spec, self.device, self.effort = spec, device, effort
        self.text_tokens, self.new_tokens, self.max_batch = text_tokens, new_tokens, max_batch
        self.processor = models.build_processor(spec)
        config = models.build_config(spec, self.processor.tokenizer)
        self.model = models.build_model(config, device, dtype, std=spec.std)
        tokenizer = self.processor.tokenizer
        self._bytes = range(len(tokenizer) - 256, len(tokenizer))
        # No answer ends early, or contains an image's token: <VoCo> will be the next id.
        special = [*range(self._bytes.start), len(tokenizer)]
        self.model.generation_config.suppress_tokens = special
        self._exact = dtype == torch.float32
        self._pictures: dict[int, object] = {}
        self.flush = Flush(device) if device.type == "cuda" else None
        self.image_tokens = int(self.plain_inputs([0])["input_ids"].shape[1]) - 1 - text_tokens
        self.store = MemoryStore(store_bytes, fingerprint=FINGERPRINT)
        self._kept: set[str] = set()
        self._fresh = 0
        self.warm: weakref.ref | None = None  # the engine must go when its rows are done

    def enable(self) -> None:
        """Teach the model VoCo tokens; from now on stock ``generate`` isn't stock any more."""
        attach(self.model, self.processor, 1)

    def facts(self) -> dict:
        """What a record says about the model."""
        text = self.model.config.text_config
        parameters = list(self.model.parameters())
        return {
            "vision_tokens": self.image_tokens,
            "tiles": models.tiles_of(self.spec),
            "text_tokens": self.text_tokens,
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "num_heads": text.num_attention_heads,
            "num_kv_heads": text.num_key_value_heads,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "weight_bytes": sum(parameter.nbytes for parameter in parameters),
            "language_bytes": models.language_bytes(self.model),
        }

    # ---- what is asked

    def picture(self, number: int):
        """One of eight, which is enough: images are distinguished by their keys."""
        number %= 8
        if number not in self._pictures:
            self._pictures[number] = models.picture(self.spec, number)
        return self._pictures[number]

    def question(self, number: int) -> list[int]:
        """Token ids of a text of random bytes."""
        return random.Random(number).choices(self._bytes, k=self.text_tokens)

    def fresh(self) -> int:
        """A picture number that wasn't used before."""
        self._fresh += 1
        return 1000 + self._fresh

    def key(self, number: int, variant: str) -> str:
        return hashlib.sha256(f"{variant} {number}".encode()).hexdigest()

    def request(self, picture: int, question: int, key: str) -> voco_model.Request:
        sampling = voco_model.Sampling(max_new_tokens=self.new_tokens, ignore_eos=True)
        return voco_model.Request(self.picture(picture), self.question(question), sampling, [key])

    def plain_inputs(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of a plain LLaVA's ``generate``: one picture and its question per row."""
        return self._inputs(numbers, IMAGE_TOKEN)

    def _inputs(self, numbers: Sequence[int], front: str) -> dict[str, Tensor]:
        made = self.processor(
            images=[self.picture(number) for number in numbers],
            text=[front] * len(numbers),
            return_tensors="pt",
        )
        text = torch.tensor([self.question(number) for number in numbers])
        made["input_ids"] = torch.cat([made["input_ids"], text], dim=1)
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        return {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in made.items()
        }

    # ---- what should be answered

    def plain_references(self) -> References:
        """What stock ``generate`` answers, one row at a time and, for the noise, all rows together."""
        numbers = range(self.effort.compared)
        answers = [self._generated(self.plain_inputs([number]))[0] for number in numbers]
        try:
            together = self._generated(
                self.plain_inputs([*numbers, *numbers][: max(2, len(numbers))])
            )
        except Exception as error:  # the answers alone still say something
            return References(answers, None, first_line(error))
        return References(answers, self._noise(answers, together))

    def voco_references(self, num_voco: int) -> References:
        """What ``voco_model.generate`` answers and, for the noise, one masked pass over the prompt."""
        numbers = list(range(self.effort.compared))
        entries = voco_model.compress(
            self.model,
            [self.picture(number) for number in numbers],
            processor=self.processor,
            num_voco=num_voco,
        )
        answers = []
        for number, entry in zip(numbers, entries, strict=True):
            output = voco_model.generate(
                self.model,
                entry,
                torch.tensor([self.question(number)], device=self.device),
                **self._options(self.new_tokens),
            )
            answers.append(Reference(output.sequences[0].tolist(), output.logits[0][0].float()))
        try:
            one_pass = [
                Reference([], self._masked_logits(self._inputs([number], image_part(num_voco))))
                for number in numbers
            ]
        except Exception as error:  # the answers alone still say something
            return References(answers, None, first_line(error))
        return References(answers, self._noise(answers, one_pass))

    def _noise(self, first: Sequence[Reference], second: Sequence[Reference]) -> float:
        rounding = torch.finfo(self.model.dtype).eps
        pairs = list(zip(first, second, strict=False))
        apart = [(one.logits - other.logits).abs().max() for one, other in pairs]
        rounded = [rounding * one.logits.abs().max() for one, _ in pairs]
        return float(max(*apart, *rounded))

    @torch.no_grad()
    def _masked_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs, logits_to_keep=1).logits[0, -1].float()

    def _generated(self, inputs: dict[str, Tensor]) -> list[Reference]:
        output = self.model.generate(**inputs, **self._options(self.new_tokens))
        length = inputs["input_ids"].shape[1]
        return [
            Reference(row[length:].tolist(), logits.float())
            for row, logits in zip(output.sequences, output.logits[0], strict=True)
        ]

    def _options(self, new_tokens: int) -> dict:
        return dict(
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    # ---- engines

    def engine(self, mode: str, num_voco: int, compiled: bool) -> voco_model.TwoPassEngine:
        in_front = num_voco if mode == "voco" else self.image_tokens + 16  # BOS, and some to spare
        return voco_model.TwoPassEngine(
            self.model,
            self.processor,
            None if mode == "uncached" else self.store,
            mode=mode,
            max_batch=self.max_batch,
            max_images=self.max_batch,
            max_new_tokens=self.new_tokens,
            max_prompt_tokens=in_front + self.text_tokens,
            num_voco=num_voco or None,
            fingerprint=FINGERPRINT,
            compiled=compiled,
            profile=True,
        )

    def keep(self, engine: voco_model.TwoPassEngine, variant: str) -> int:
        """Put the entries of as many pictures as a batch has into the store, if they aren't there yet;
        returns an entry's bytes."""
        numbers = range(self.max_batch)
        keys = [self.key(number, variant) for number in numbers]
        entries = engine.compress([self.picture(number) for number in numbers], keys=keys)
        engine.flush()
        self._kept |= set(self.store)
        return entries[0].nbytes

    def forget(self, engine: voco_model.TwoPassEngine) -> None:
        """Drop what was stored since ``keep``."""
        engine.flush()
        for key in set(self.store) - self._kept:
            self.store.delete(key)

    def compare(
        self, engine: voco_model.TwoPassEngine, references: References, variant: str
    ) -> dict:
        """Compare the engine's answers with those of ``generate``: with new images and, if there is a
        store, again from the store.

        In float32 every token must be the same. In 16 bits a likeliest token may change; the one that
        the engine took must then be as good as the noise allows: its logit in ``generate`` is below the
        largest by no more than twice what two exact routes differ by.

        Raises:
            WrongError: they are not.
        """
        numbers = range(len(references.answers))
        pairs = []
        for stored in (False, True) if engine.store is not None else (False,):
            asked = self.ask(
                engine, [self.request(n, n, self.key(n, f"{variant} compared")) for n in numbers]
            )
            engine.flush()
            check_found(asked, len(numbers) if stored else 0)
            pairs += zip(asked.answers, references.answers, strict=True)
        same = [
            ours == theirs
            for answer, expected in pairs
            for ours, theirs in zip(answer.tokens, expected.tokens, strict=True)
        ]
        gaps = [
            float(self._written(expected.logits).max() - expected.logits[answer.tokens[0]])
            for answer, expected in pairs
        ]
        found = {
            "tokens": len(same),
            "identical": sum(same),
            "first_identical": sum(
                answer.tokens[0] == expected.tokens[0] for answer, expected in pairs
            ),
            "answers": len(pairs),
            "gap": max(gaps),
            "noise": references.noise,
            "noise_reason": references.reason,
        }
        if self._exact and not all(same):
            raise WrongError(
                f"expected the tokens of generate, got {found['identical']} of {len(same)} alike"
            )
        if references.noise is not None and found["gap"] > 2 * references.noise:
            raise WrongError(
                f"expected first tokens within twice the noise {references.noise:.3g} of the likeliest, "
                f"got one {found['gap']:.3g} below it"
            )
        return found

    def _written(self, logits: Tensor) -> Tensor:
        """Logits without the tokens that are never generated."""
        logits = logits.clone()
        logits[self.model.generation_config.suppress_tokens] = -torch.inf
        return logits

    def ask(
        self,
        engine: voco_model.TwoPassEngine,
        requests: Sequence[voco_model.Request],
        *,
        covered: bool = False,
    ) -> Asked:
        """Let the engine answer a batch of requests.

        Args:
            covered: on CUDA, keep the device busy while the host enqueues, so that the stages hold none
                of the host's time; ``first`` and ``whole`` are then of no use.

        Raises:
            RequestError: one of them failed.
        """
        while engine.step():  # what is left of the batch before
            pass
        engine.stage_seconds()
        self.synchronize()
        started = time.perf_counter()
        tickets = [engine.submit(request) for request in requests]
        if covered and self.flush is not None:
            for _ in range(self.flush.repeats_covering(COVERED_MS)):
                self.flush()
        answers = [ticket.result() for ticket in tickets]
        whole = time.perf_counter() - started
        seconds = engine.stage_seconds()
        decode = [1e3 * each for each in seconds.pop("decode", [])]
        return Asked(
            {stage: 1e3 * sum(times) for stage, times in seconds.items()},
            decode[: max(len(answer.tokens) for answer in answers) - 1],
            1e3 * max(answer.seconds_to_first for answer in answers),
            1e3 * whole,
            answers,
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def flops_by_stage(
        self, mode: str, num_voco: int, new_images: bool
    ) -> dict[str, dict[str, int]]:
        """Useful and full FLOPs of one request."""
        config, tiles = self.model.config, models.tiles_of(self.spec)
        plain = 1 + self.image_tokens  # and BOS
        parts = {}
        if mode == "uncached":
            parts["vision"] = flops.see(config, tiles)
            parts["prefill"] = flops.first_token(config, plain + self.text_tokens)
        elif mode == "full_cache":
            parts["prefill"] = flops.first_token(config, self.text_tokens, plain)
        else:
            if new_images:
                parts["vision"] = flops.see(config, tiles)
                parts["prefix"] = flops.language(config, plain + 1 + num_voco)  # and the newline
            parts["prefill"] = flops.first_token(config, self.text_tokens, num_voco)
        return {stage: {"useful": part.useful, "full": part.full} for stage, part in parts.items()}


def check_found(asked: Asked, expected: int) -> None:
    """See that what is timed is what the row says: so many images came from the store."""
    found = sum(answer.from_store for answer in asked.answers)
    if found != expected:
        raise RuntimeError(f"expected {expected} images from the store, got {found}")

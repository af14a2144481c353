"""The training loops of the vision tower and of the language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from voco_model.data.encode import IGNORE
from voco_model.miniature.batches import Batch, pixels
from voco_model.miniature.scenes import COLOURS, Scene, draw_scene, paint

_WARMUP = 50  # steps

Progress = Callable[[int, float], None]
"""Called after each step with the number of steps done and the loss."""


class _Schedule:
    """Steps several optimizers: learning rates rise over ``_WARMUP`` steps and fall to 0 along a
    cosine; gradients are clipped to a norm of 1."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
        self._optimizers = optimizers
        self._weights = [p for o in optimizers for group in o.param_groups for p in group["params"]]

        def rate(step: int) -> float:
            return min(1, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2

        self._schedulers = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]

    def step(self, loss: Tensor) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        for optimizer, scheduler in zip(self._optimizers, self._schedulers, strict=True):
            optimizer.step()
            scheduler.step()


def _adamw(weights: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, rate, betas=(0.9, 0.98), weight_decay=0.01)


def _muon_and_adamw(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the inner matrices, AdamW for embeddings, head, norms and the rest.

    On captions, this needs fewer steps than AdamW alone.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outer = ("embed", "lm_head")
    inner = [n for n, p in trained.items() if p.dim() == 2 and not any(o in n for o in outer)]
    muon = torch.optim.Muon(
        [trained[name] for name in inner],
        rate,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, _adamw([p for name, p in trained.items() if name not in inner], rate)]


def train_tower(
    tower: nn.Module, steps: int, *, seed: int, size: int, rate: float, progress: Progress
) -> None:
    """Train a CLIP vision tower to recognize what is in each quarter, with labels.

    This takes the place of CLIP's pretraining. A learned query for each quarter attends to the patches'
    features, which must therefore encode positions, and two linear layers classify digit and colour.
    Only the tower is kept.

    Args:
        tower: the model's vision tower, changed in place.
        size: pictures per step.
    """
    device = next(tower.parameters()).device
    torch.manual_seed(seed)
    reader = QuarterReader(tower.config.hidden_size).to(device)
    # AdamW alone: Muon learns the labels as fast, but digits explain less of its features' variance, and
    # the language model learned little from them.
    schedule = _Schedule([_adamw([*tower.parameters(), *reader.parameters()], rate)], steps)
    tower.train().requires_grad_(True)
    for step, (pictures, digit, colour) in enumerate(islice(_labelled(seed, size), steps), 1):
        features = tower(pixel_values=pictures.to(device)).last_hidden_state
        digits, colours = reader(features[:, 1:])  # without the class token
        loss = F.cross_entropy(digits.flatten(0, 1), digit.to(device).flatten())
        loss += F.cross_entropy(colours.flatten(0, 1), colour.to(device).flatten())
        schedule.step(loss)
        progress(step, loss.item())
    tower.eval().requires_grad_(False)


class QuarterReader(nn.Module):
    """Features ``[B, patches, width]`` -> logits of digit ``[B, 4, 11]`` and colour ``[B, 4, 5]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(4, width))
        self.digit, self.colour = nn.Linear(width, 11), nn.Linear(width, 5)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(self.queries @ features.transpose(1, 2), dim=-1)
        read = weights @ features
        return self.digit(read), self.colour(read)


def _labelled(seed: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pictures with the digit and colour of each quarter, as in ``labels_of``.

    All quarters are filled, since an empty one teaches nothing.
    """
    rng = np.random.default_rng(seed)
    while True:
        scenes = [draw_scene(rng, "train", least=4) for _ in range(size)]
        pictures = pixels([paint(scene, "train", rng) for scene in scenes])
        yield pictures, *labels_of(scenes)


def labels_of(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Digit (10: none) and colour (4: none) of each quarter, int64 ``[B, 4]``."""
    colours = list(COLOURS)
    digit = [[10 if d is None else d.label for d in scene.quarters] for scene in scenes]
    colour = [
        [4 if d is None else colours.index(d.colour) for d in scene.quarters] for scene in scenes
    ]
    return torch.tensor(digit), torch.tensor(colour)


def tune(
    model: LlavaForConditionalGeneration,
    batches: Iterable[Batch],
    steps: int,
    *,
    rate: float,
    progress: Progress,
) -> None:
    """Train everything but the vision tower on answers, and leave the model in eval mode."""
    model.train().requires_grad_(True)
    model.model.vision_tower.eval().requires_grad_(False)
    schedule = _Schedule(_muon_and_adamw(model, rate), steps)
    for step, batch in enumerate(islice(batches, steps), 1):
        loss = answer_loss(model, batch.to(model.device))
        schedule.step(loss)
        progress(step, loss.item())
    model.eval()


def answer_loss(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """Cross-entropy of the answers' tokens, the only ones of a few hundred that the head reads."""
    hidden = model.model(
        input_ids=batch.input_ids, pixel_values=batch.pixel_values, use_cache=False
    ).last_hidden_state
    wanted = batch.labels[:, 1:]
    learnt = wanted != IGNORE
    return F.cross_entropy(model.lm_head(hidden[:, :-1][learnt]), wanted[learnt])

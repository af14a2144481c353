"""Checks and steps of bench/train.py: losses and gradients are compared, steps are timed."""

from __future__ import annotations

import copy
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.training.data import Batch, Distribution, Sample, collate, draw
from bench.training.methods import (
    SMALL,
    Method,
    Optimizer,
    QFormerLlava,
    build,
    free,
    layout_of,
    masked_methods,
    voco_token_id,
)
from voco_model import flops

FLOOR = 1e-5
"""Added to every limit, as in the tests of ``masked_attention``."""

SMALL_TEXTS = Distribution(median=20, mean=29, longest=60, text_only=0.25)
"""Texts for the small model, whose images are 16 tokens."""

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Highest memory between ``start`` and ``read``.

    On CUDA what torch had allocated (``max_memory_allocated``); on Linux without it the resident set of
    the whole process (``VmHWM``, reset by ``start``), with model, optimizer, torch and Python.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.what = None
        if device.type == "cuda":
            self.what = "torch.cuda.max_memory_allocated"
        elif _CLEAR.exists():
            self.what = "peak resident set of the process (VmHWM, reset before each step)"

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.what:
            # glibc: return freed blocks to the system, so that the next method doesn't reuse them.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
            _CLEAR.write_text("5")

    def read(self) -> int | None:
        """Bytes; None if the system doesn't report them."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not self.what:
            return None
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pictures(
    samples: Sequence[Sample], side: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Noise for each sample with an image, ``[images, 3, side, side]``, the same in any dtype; None
    without any."""
    count = sum(sample.image for sample in samples)
    if not count:
        return None
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(count, 3, side, side, generator=generator, device=device).to(dtype)


def batches(
    config, samples: Sequence[Sample], num_voco: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Batch]:
    """The same samples ``"padded"``, ``"packed"``, and as ``"query"`` for the Q-Former, padded."""
    pixels = pictures(samples, config.vision_config.image_size, device, dtype)
    image, pad_id = config.image_token_id, config.text_config.pad_token_id
    prefix = [image] * config.image_seq_length + [voco_token_id(config)] * num_voco
    return {
        "padded": collate(samples, prefix, pixels, pad_id=pad_id, packed=False),
        "packed": collate(samples, prefix, pixels, pad_id=pad_id, packed=True),
        "query": collate(samples, [image] * num_voco, pixels, pad_id=pad_id, packed=False),
    }


def batch_of(method: Method, made: dict[str, Batch]) -> Batch:
    return made["packed" if method.packed else "padded"]


# ---- checks


def small_check(names: Sequence[str], device: torch.device, num_voco: int) -> dict[str, dict]:
    """Loss and every gradient of a small model in float32, by method, against the dense mask's in
    float64 (but for norms and the loss, which Transformers computes in float32 for any input dtype).

    The rule of the house: an error of at most twice that of the dense mask in float32, plus 1e-5. A
    gradient's error is the norm of the difference of all gradients over the norm of the truth.

    Returns:
        by name ``loss``, ``gradient_norm``, and of ``loss_error`` and ``gradient_error`` also the limit;
        ``reason`` says what is over it, or what was raised, and is empty otherwise.
    """
    model = build(SMALL, None, device, torch.float32, checkpointing=False)
    config = model.config
    samples = draw(
        SMALL_TEXTS,
        6,
        prefix=config.image_seq_length + num_voco,
        first_special_id=config.image_token_id,
        candidates=99,
    )
    methods = masked_methods(num_voco)
    exact = copy.deepcopy(model).double()
    in_double = batches(config, samples, num_voco, device, torch.float64)
    true_loss, true = _gradients(exact, methods["dense"], in_double)
    del exact
    made = batches(config, samples, num_voco, device, torch.float32)
    found: dict[str, dict] = {}
    noise = None
    for name in dict.fromkeys(["dense", *names]):
        try:
            loss, gradients = _gradients(model, methods[name], made)
        except Exception as error:  # whatever is raised becomes the row's reason
            found[name] = {"reason": f"{type(error).__name__}: {error}"[:300]}
            continue
        errors = {
            "loss_error": abs(loss - true_loss),
            "gradient_error": float((gradients - true).norm() / true.norm()),
        }
        noise = noise or errors
        limits = {key: 2 * noise[key] + FLOOR for key in errors}
        wrong = [
            f"{key.replace('_', ' ')} {error:.2e} over {limits[key]:.2e}"
            for key, error in errors.items()
            if not error <= limits[key]
        ]
        found[name] = {
            "loss": loss,
            "gradient_norm": float(gradients.norm()),
            **errors,
            **{key.replace("error", "limit"): limit for key, limit in limits.items()},
            "reason": ", ".join(wrong),
        }
    free(device)
    return found


def _gradients(model, method: Method, made: dict[str, Batch]) -> tuple[float, Tensor]:
    """The loss, and all trained weights' gradients as one vector of float64."""
    with method.attached(model):
        loss = method.forward(model, batch_of(method, made)).loss
        loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.cat([p.grad.double().flatten() for p in trained])
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def loss_and_norm(model: nn.Module, run: Callable[[], object]) -> dict:
    """The measured model's loss, the norm of all its gradients, and the size of its largest logit."""
    output = run()
    largest = output.logits.detach().abs().max().item()
    loss = output.loss
    del output
    loss.backward()
    squares = [
        p.grad.float().square().sum().double() for p in model.parameters() if p.grad is not None
    ]
    norm = torch.stack(squares).sum().sqrt().item()
    model.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "gradient_norm": norm, "largest_logit": largest}


def compare(found: dict, reference: dict, dtype: torch.dtype) -> dict:
    """``found`` with its difference to the first method's, and the limit of that.

    A loss is a mean of log-softmax values, each of which moves by at most twice what the logits move.
    Two exact routes agree to 1e-5 in float32 logits (CONTRIBUTING.md); on top of that each of them
    rounds its logits to ``dtype``, by half an epsilon of their size: ``2 * (1e-5 + epsilon * largest
    logit)``.
    """
    difference = abs(found["loss"] - reference["loss"])
    limit = 2 * (FLOOR + torch.finfo(dtype).eps * reference["largest_logit"])
    reason = ""
    if not difference <= limit:
        reason = f"loss {difference:.2e} from the first method's, over {limit:.2e}"
    return found | {
        "loss_difference": difference,
        "loss_limit": limit,
        "gradient_norm_ratio": found["gradient_norm"] / reference["gradient_norm"],
        "reason": reason,
    }


# ---- steps


class Trainer:
    """A model, its optimizer, and the times of its steps."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.optimizer = Optimizer(model)
        self.memory = PeakMemory(device)

    def step(self, run: Callable[[], object]) -> tuple[float, int | None]:
        """Forward, backward, AdamW. Returns milliseconds on the host's clock, the device done before and
        after, and the peak memory."""
        self.memory.start()
        synchronize(self.device)
        started = time.perf_counter()
        run().loss.backward()
        self.optimizer.step()
        synchronize(self.device)
        return 1e3 * (time.perf_counter() - started), self.memory.read()


def useful_flops(model, batch: Batch) -> int:
    """Useful FLOPs of a step of a LLaVA under the VoCo mask."""
    return flops.training(
        model.config,
        tokens=batch.tokens,
        pairs=layout_of(model, batch).pairs(),
        labels=batch.labelled,
        images=batch.images,
    )


def q_former_flops(model: QFormerLlava, batch: Batch) -> int:
    """FLOPs of a step on ``[query | text]``, plain causal, with a Q-Former in place of the projector."""
    config = model.llava.config
    lengths = batch.real.sum(dim=1).tolist()
    language = flops.training(
        config,
        tokens=batch.tokens,
        pairs=sum(length * (length + 1) // 2 for length in lengths),
        labels=batch.labelled,
        images=0,
    )
    return (
        language
        + batch.images * flops.vision_tower(config).useful
        + flops.q_former_training(
            model.q_former_config,
            queries=model.query.shape[1],
            features=flops.patches_of(config),
            hidden=config.text_config.hidden_size,
            images=batch.images,
        )
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

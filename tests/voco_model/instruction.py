"""A tiny checkpoint and instruction file on disk, as a user of the training command has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.voco_model import tiny

QUESTIONS = ("What is it?", "Which\ncolour\nhas it?", "Is it large?", "Where?")
ANSWERS = ("A cup.", "It is red, or\nnearly so.", "No.", "On the table, left of the plate.")


def write_checkpoint(folder: Path, kind: str = "llava") -> Path:
    """A tiny LLaVA with its processor; the embeddings have a row for <VoCo>."""
    tiny.tiny_llava(kind).save_pretrained(folder)
    tiny.tiny_processor(kind).save_pretrained(folder)
    return folder


def records(count: int) -> list[dict]:
    """LLaVA's layout: one image mostly, every fourth text only, one to three turns."""
    found = []
    for number in range(count):
        turns = []
        for turn in range(1 + number % 3):
            question = QUESTIONS[(number + turn) % len(QUESTIONS)]
            answer = ANSWERS[(number + 2 * turn) % len(ANSWERS)] + " Yes." * (number % 5)
            if turn == 0 and number % 4:
                question = f"<image>\n{question}" if number % 2 else f"{question}\n<image>"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        record = {"id": str(number), "conversations": turns}
        if number % 4:
            record["image"] = f"{number % 6}.png"
        found.append(record)
    return found


def write_data(folder: Path, count: int = 24) -> Path:
    """``data.json`` with its images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(6):
        tiny.picture(number, (40 + 4 * number, 48)).save(folder / f"{number}.png")
    path = folder / "data.json"
    path.write_text(json.dumps(records(count), indent=1))
    return path


def config(checkpoint: Path, data_file: Path, output: Path, **changes) -> dict:
    """A run of a few seconds on one core."""
    values = {
        "model": str(checkpoint),
        "output": str(output),
        "data": {
            "sources": [{"path": str(data_file), "images": str(data_file.parent)}],
            "max_length": 320,
            "workers": 0,
        },
        "voco": {"tokens": 2},
        "batch": {"global_size": 8, "max_tokens": 1024, "rows": 4},
        "optimizer": {"learning_rate": 2e-3, "epochs": 2},
        "dtype": "float32",
        "sharding": "none",
        "checkpoints": {"every": 0},
        "gradient_checkpointing": False,
        "trainer": {"use_cpu": True},
    }
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            value = {**values[name], **value}
        values[name] = value
    return values


def weights(model) -> torch.Tensor:
    """All trained numbers of a model, in one vector."""
    return torch.cat([p.detach().double().flatten() for _, p in sorted(model.named_parameters())])

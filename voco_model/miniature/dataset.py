"""The miniature's training conversations as files, in the layout of LLaVA's instruction data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from voco_model.miniature.scenes import ask_many, draw_scene, paint
from voco_model.vlm.prompt import IMAGE_TOKEN

SAMPLES = 1000


def write_data(folder: str | os.PathLike, samples: int = SAMPLES, *, seed: int = 1) -> Path:
    """Write ``data.json`` and a PNG for each of its conversations.

    Args:
        folder: a new or empty folder.
        samples: number of conversations, each with 8 questions about a picture of its own.

    Returns:
        the path of ``data.json``, which ``python -m voco_model train`` reads.

    Raises:
        ValueError: a folder with something in it, or a file.
        ModuleNotFoundError: the extra ``miniature`` isn't installed.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"expected a new or empty folder, got {folder}; choose another")
    rng = np.random.default_rng(seed)
    records = []
    for number in range(samples):
        scene = draw_scene(rng, "train")
        name = f"{number:04}.png"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(paint(scene, "train", rng)).save(folder / name)
        turns = []
        for question in ask_many(scene, 8, rng):
            turns.append({"from": "human", "value": question.text})
            turns.append({"from": "gpt", "value": question.answer})
        turns[0]["value"] = f"{IMAGE_TOKEN}\n{turns[0]['value']}"
        records.append({"id": str(number), "image": name, "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(records, indent=1) + "\n")
    return path

"""``voco demo``: digits before and after compression, and a photograph that is read once, on the CPU.

First, the trained miniature answers questions about handwritten digits, from all vision tokens and from
four VoCo tokens. Then a LLaVA with random weights, but CLIP's real geometry, is asked three questions
about a photograph: ``TwoPassEngine`` reads it for the first question and finds it in a store for the
others, and its stages are shown side by side. Each answer is compared token by token with that of one
masked pass over the whole prompt, and timed against a plain LLaVA that reads the photograph for each
question. Needs the extra ``miniature`` (matplotlib, scikit-learn).
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

import voco_model
from voco_kernels import MaskLayout
from voco_model.miniature.scenes import digits
from voco_model.miniature.show import show
from voco_model.pictures import decode
from voco_model.small import IMAGE_SIZE, PATCH_SIZE, VISION_TOKENS, build_model, build_processor
from voco_model.vlm.attach import attach

try:
    from matplotlib import cbook
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise ImportError(
        f"the demo needs {error.name}, which is not installed; pip install 'voco-kernels[miniature]'"
    ) from error

QUESTIONS = (
    "What is the person in the photograph wearing?",
    "Is there a flag in the background?",
    "Describe the photograph in one sentence.",
)


# The engine's stages, and their titles.
STAGES = {
    "vision": "pass 1: vision tower",
    "prefix": "pass 1: prefix",
    "extract": "pass 1: entry taken out",
    "load": "pass 2: entry loaded",
    "prefill": "pass 2: prefill",
    "decode": "pass 2: decode",
}


@dataclass(frozen=True)
class OnePass:
    """An answer by one masked pass, with ``logits`` ``[vocabulary]`` of its first token."""

    tokens: tuple[int, ...]
    logits: Tensor
    seconds: float


@dataclass(frozen=True)
class Asked:
    """A question, answered by the engine with its ``stages`` in seconds, by one masked pass, and by a
    plain LLaVA in ``uncached`` seconds."""

    question: str
    answer: voco_model.Answer
    stages: dict[str, float]
    one_pass: OnePass
    uncached: float

    @property
    def identical(self) -> bool:
        return self.answer.tokens == self.one_pass.tokens


def load_photograph(path: str | Path | None = None) -> Image.Image:
    """The image at ``path``, by default the portrait of Grace Hopper that ships with matplotlib."""
    source = path or cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return decode(source)


def cache_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int, dtype: torch.dtype) -> int:
    """Size of the keys and values of this many tokens in all layers."""
    return 2 * layers * kv_heads * head_dim * tokens * dtype.itemsize


def write_letters_only(model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Suppress all other tokens, so that noise is printable and answers don't end early."""
    model.generation_config.suppress_tokens = [
        token for token in range(len(tokenizer)) if not tokenizer.decode(token).isalpha()
    ]


def answer_in_one_pass(model, processor, picture, question: str, new_tokens: int) -> OnePass:
    """Answer from the whole prompt under the mask; the cache then holds all of it."""
    start = time.perf_counter()
    prompt = voco_model.prompt(question, model.config.num_voco)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    seconds = time.perf_counter() - start
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    return OnePass(tuple(new.tolist()), output.logits[0][0], seconds)


def first_logits(model, processor, entry, question: str) -> Tensor:
    """Logits ``[vocabulary]`` of an answer's first token, from the image's entry."""
    output = voco_model.generate(
        model,
        entry,
        question,
        processor=processor,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.logits[0][0]


def ask(
    engine: voco_model.TwoPassEngine, picture, question: str
) -> tuple[voco_model.Answer, dict[str, float]]:
    """An engine's answer, and the seconds of each stage; then the store has the picture's entry."""
    engine.stage_seconds()  # discard earlier ones
    answer = engine.answer(picture, question)
    stages = {stage: sum(seconds) for stage, seconds in engine.stage_seconds().items()}
    engine.flush()
    return answer, stages


def run(
    console: Console,
    picture: Image.Image,
    questions: Sequence[str],
    num_voco: int,
    new_tokens: int,
    out: Path,
) -> bool:
    """The photograph's part of the demo. Writes ``mask.png`` into ``out``.

    Returns:
        whether the engine and one masked pass agree in every token.
    """
    processor = build_processor()
    model = build_model(processor)
    handle = attach(model, processor, num_voco)
    write_letters_only(model, processor.tokenizer)
    longest = max(questions, key=lambda question: len(question.encode()))
    prompt = voco_model.prompt(longest, num_voco)
    ids = processor(images=picture, text=prompt, return_tensors="pt")["input_ids"]
    layout = MaskLayout.from_input_ids(
        ids,
        voco_token_id=handle.voco_token_id,
        image_token_id=processor.tokenizer.image_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    layout.plot(out / "mask.png")
    console.print(cast_table(picture, model, layout, out / "mask.png"))

    options = dict(
        max_batch=1, max_images=1, max_new_tokens=new_tokens, max_prompt_tokens=ids.shape[1]
    )
    mirrored = ImageOps.mirror(picture)
    with (
        tempfile.TemporaryDirectory(prefix="voco-demo-") as folder,
        voco_model.KVStore(folder, max_bytes=10**8) as store,
        voco_model.TwoPassEngine(model, processor, store, profile=True, **options) as engine,
        voco_model.TwoPassEngine(model, processor, mode="uncached", **options) as plain,
    ):
        console.print("Warming up on the photograph mirrored ...")
        others = [ask(engine, mirrored, question)[0] for question in questions]
        answer_in_one_pass(model, processor, mirrored, questions[0], new_tokens)
        plain.answer(mirrored, questions[0])

        asked = []
        for question in questions:
            console.print(f"Asking: {question}", markup=False)
            gc.collect()  # not while something is timed
            answer, stages = ask(engine, picture, question)
            one = answer_in_one_pass(model, processor, picture, question, new_tokens)
            uncached = plain.answer(picture, question).seconds
            asked.append(Asked(question, answer, stages, one, uncached))
        entry, other_entry = engine.compress([picture, mirrored])  # from the store

    console.print(answers_table(processor, asked), times_table(asked, entry))
    console.print(sizes_table(model.config.text_config, entry))
    apart = moved = 0.0
    for each in asked:
        logits = first_logits(model, processor, entry, each.question)
        other = first_logits(model, processor, other_entry, each.question)
        apart = max(apart, (logits - each.one_pass.logits).abs().max().item())
        moved = max(moved, (logits - other).abs().max().item())
    identical = all(each.identical for each in asked)
    changed = sum(
        each.answer.tokens != other.tokens for each, other in zip(asked, others, strict=True)
    )
    console.print(
        f"Answers identical, token by token: [bold]{'yes' if identical else 'NO'}[/] "
        f"({len(asked)} x {new_tokens} tokens). The logits of\n"
        f"their first tokens differ by at most {apart:.0e}. With the photograph mirrored they\n"
        f"change by up to {moved:.1g}, and {changed} of {len(asked)} answers change"
        + (": the picture does come through." if moved > 100 * apart else "."),
        highlight=False,
    )
    return identical


def cast_table(picture: Image.Image, model, layout: MaskLayout, drawing: Path) -> Table:
    """The photograph, the model and the mask."""
    text = model.config.text_config
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]photograph[/]", f"{picture.width} x {picture.height} pixels")
    table.add_row(
        "[bold]model[/]",
        f"LLaVA built from a config: {text.num_hidden_layers} layers, "
        f"{model.num_parameters() / 1e6:.1f} M random weights, float32. CLIP's real geometry: "
        f"{IMAGE_SIZE} pixels in patches of {PATCH_SIZE}, {VISION_TOKENS} vision tokens. "
        "It is untrained, so its answers are noise, but both routes must give the same noise.",
    )
    table.add_row("[bold]mask[/]", Text(f"{layout}, drawn in {drawing}"))
    table.add_row()
    return table


def answers_table(processor, asked: Sequence[Asked]) -> Table:
    table = Table("", "question", "one masked pass", "engine", "identical", title="Answers")
    for number, each in enumerate(asked, start=1):
        said = (
            processor.tokenizer.decode(list(tokens))
            for tokens in (each.one_pass.tokens, each.answer.tokens)
        )
        same = "[green]yes[/]" if each.identical else "[red]NO[/]"
        table.add_row(str(number), Text(each.question), *map(Text, said), same)
    return table


def times_table(asked: Sequence[Asked], entry) -> Table:
    """The time of each stage, one column per question."""
    table = Table("ms on this CPU", title="The same photograph, asked again")
    for number in range(1, len(asked) + 1):
        table.add_column(f"question {number}", justify="right")

    def add(name: str, seconds: Sequence[float | None], style: str | None = None) -> None:
        cells = ["-" if each is None else f"{each * 1e3:.1f}" for each in seconds]
        table.add_row(name, *cells, style=style)

    answers = [each.answer for each in asked]
    found = ["yes" if answer.from_store else "no" for answer in answers]
    read = [
        answer.prompt_tokens - entry.num_tokens + (0 if answer.from_store else entry.next_position)
        for answer in answers
    ]
    table.add_row("photograph from the store", *found)
    table.add_row("tokens read", *map(str, read))
    table.add_section()
    for stage, name in STAGES.items():
        add(name, [each.stages.get(stage) for each in asked])
    rest = [each.answer.seconds - sum(each.stages.values()) for each in asked]
    add("key, store, pixels, host", rest)
    table.add_section()
    add("engine, in all", [answer.seconds for answer in answers], style="bold")
    add("one masked pass", [each.one_pass.seconds for each in asked])
    add("plain LLaVA, no store", [each.uncached for each in asked])
    return table


def sizes_table(text: LlamaConfig, entry) -> Table:
    ours = (text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
    llava_7b = (32, 32, 128)
    table = Table(
        title="Keys and values kept per image",
        caption="2 x layers x heads x head_dim x bytes x tokens",
    )
    table.add_column("model")
    for heading in (f"{VISION_TOKENS} vision tokens", f"{entry.num_tokens} VoCo", "ratio"):
        table.add_column(heading, justify="right")
    for name, full, compact in (
        ("this model, float32", cache_bytes(*ours, VISION_TOKENS, torch.float32), entry.nbytes),
        (
            "LLaVA-1.5-7B, bfloat16",
            cache_bytes(*llava_7b, VISION_TOKENS, torch.bfloat16),
            cache_bytes(*llava_7b, entry.num_tokens, torch.bfloat16),
        ),
    ):
        table.add_row(name, readable(full), readable(compact), f"{full / compact:.0f}x")
    return table


def readable(count: int) -> str:
    """A size in MB (10^6 bytes) or kB (10^3 bytes)."""
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB" if count < 1e6 else f"{count / 1e6:.0f} MB"


def demo(
    *,
    ask: Sequence[str] = (),
    pictures: int = 2,
    image: str | Path | None = None,
    questions: Sequence[str] | None = None,
    num_voco: int = 1,
    new_tokens: int = 16,
    out: str | Path = "demo-output",
) -> bool:
    """What ``voco demo`` runs; prints tables, and draws into a folder.

    Args:
        ask: questions about the digits.
        pictures: of digits; 0 for none.
        image: a photograph; by default a portrait of Grace Hopper.
        questions: about the photograph; by default ``QUESTIONS``.
        num_voco: VoCo tokens of the photograph.
        new_tokens: length of each answer.
        out: folder of the drawings.

    Returns:
        whether each answer about the photograph is that of one masked pass.

    Raises:
        ValueError: arguments out of range, a photograph that can't be read, or a question with an image
            token in it.
        OSError: a folder that can't be made.
        ModuleNotFoundError: without the extra ``miniature``.
    """
    if num_voco < 1 or new_tokens < 1 or pictures < 0:
        raise ValueError(
            "expected num_voco and new_tokens >= 1 and pictures >= 0, got "
            f"{num_voco}, {new_tokens} and {pictures}"
        )
    picture = load_photograph(image)
    questions = questions or QUESTIONS
    for question in [*questions, *ask]:
        voco_model.prompt(question, num_voco)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    digits("test")
    console = Console()
    if pictures:
        show(console, out, pictures, ask)
        console.rule("A photograph, read once")
    return run(console, picture, questions, num_voco, new_tokens, out)


if __name__ == "__main__":
    from voco_model.cli import app

    app(["demo", *sys.argv[1:]], prog_name="voco")

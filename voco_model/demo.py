"""``make demo``: a small LLaVA on the CPU reads a photograph once and answers three questions.

Each is answered twice: from the whole prompt in one masked pass, and in two passes from nothing but
the keys and values of the VoCo tokens. The answers are compared token by token, logits and all.
Needs the extra ``bench`` (matplotlib, rich).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import voco_model
from voco_kernels import MaskLayout

try:
    from matplotlib import cbook
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise ImportError(
        f"expected the extra 'bench' for the demo, got no {error.name}; pip install -e '.[bench]'"
    ) from error

IMAGE_SIZE, PATCH_SIZE = 336, 14
VISION_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
QUESTIONS = (
    "What is the person in the photograph wearing?",
    "Is there a flag in the background?",
    "Describe the photograph in one sentence.",
)


@dataclass(frozen=True)
class Answer:
    """``tokens`` int64 ``[new]``, ``logits`` ``[new, vocabulary]`` of each, ``seconds`` it took."""

    tokens: Tensor
    logits: Tensor
    seconds: float


def build_processor() -> LlavaProcessor:
    """CLIP's real geometry (336 pixels, patches of 14: 576 tokens), a tokenizer of single bytes."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            padding_side="left",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA of a few million random weights, in float32, that takes this processor's inputs."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            # Larger than for training, so that what the model sees changes what it says.
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=VISION_TOKENS,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config).eval()


def load_photograph(path: str | Path | None = None) -> Image.Image:
    """The picture at ``path``, or the portrait of Grace Hopper that ships with matplotlib."""
    source = path or cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(source) as picture:
        return picture.convert("RGB")


def cache_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of this many tokens in all layers."""
    return 2 * layers * kv_heads * head_dim * tokens * dtype.itemsize


def answer_in_one_pass(model, processor, picture, question: str, options: dict) -> Answer:
    """The whole prompt, image and all, under the mask; the cache then holds all of it."""
    start = time.perf_counter()
    prompt = voco_model.prompt(question, model.config.num_voco)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    output = model.generate(**inputs, **options)
    seconds = time.perf_counter() - start
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    return Answer(new, torch.cat(output.logits), seconds)


def answer_in_second_pass(model, processor, entry, question: str, options: dict) -> Answer:
    """The question alone, behind the compact keys and values of the image."""
    start = time.perf_counter()
    output = voco_model.generate(model, entry, question, processor=processor, **options)
    seconds = time.perf_counter() - start
    return Answer(output.sequences[0], torch.cat(output.logits), seconds)


def generation_options(tokenizer: PreTrainedTokenizerFast, new_tokens: int) -> dict:
    """Greedy, of one length, and of letters only, so that noise prints."""
    letters = {token for token in range(len(tokenizer)) if tokenizer.decode(token).isalpha()}
    return dict(
        max_new_tokens=new_tokens,
        do_sample=False,
        suppress_tokens=[token for token in range(len(tokenizer)) if token not in letters],
        return_dict_in_generate=True,
        output_logits=True,
    )


def run(
    console: Console,
    picture: Image.Image,
    questions: Sequence[str],
    num_voco: int,
    new_tokens: int,
    out: Path,
) -> bool:
    """The demo itself; writes ``mask.png`` into ``out``. True if both routes agree everywhere."""
    processor = build_processor()
    model = build_model(processor)
    handle = voco_model.enable(model, processor, num_voco)
    options = generation_options(processor.tokenizer, new_tokens)
    prompt = voco_model.prompt(questions[0], num_voco)
    ids = processor(images=picture, text=prompt, return_tensors="pt")["input_ids"]
    layout = MaskLayout.from_input_ids(
        ids,
        voco_token_id=handle.voco_token_id,
        image_token_id=processor.tokenizer.image_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    layout.plot(out / "mask.png")
    console.print(cast_table(picture, model, layout, out / "mask.png"))

    console.print("Running both routes once, unmeasured ...")
    voco_model.compress(model, picture, processor=processor)
    answer_in_one_pass(model, processor, picture, questions[0], options)

    start = time.perf_counter()
    (entry,) = voco_model.compress(model, picture, processor=processor)
    first_pass = time.perf_counter() - start
    (mirrored,) = voco_model.compress(model, ImageOps.mirror(picture), processor=processor)

    answers, moved = [], 0.0
    for question in questions:
        console.print(f"Asking: {question}")
        one = answer_in_one_pass(model, processor, picture, question, options)
        two = answer_in_second_pass(model, processor, entry, question, options)
        other = answer_in_second_pass(model, processor, mirrored, question, options)
        moved = max(moved, (two.logits[0] - other.logits[0]).abs().max().item())
        answers.append((question, one, two))

    console.print(answers_table(processor, answers), times_table(ids, entry, first_pass, answers))
    console.print(sizes_table(model.config.text_config, entry))
    identical = all(torch.equal(one.tokens, two.tokens) for _, one, two in answers)
    apart = max((one.logits - two.logits).abs().max().item() for _, one, two in answers)
    largest = max(two.logits.abs().max().item() for _, _, two in answers)
    console.print(
        f"Answers identical, token by token: [bold]{'yes' if identical else 'NO'}[/] "
        f"({len(answers)} x {new_tokens} tokens).\n"
        f"Their logits, of size {largest:.1f}, are at most {apart:.0e} apart; with the photograph "
        f"mirrored they move by up to {moved:.1g}:\n"
        "the picture does come through the VoCo tokens.",
        soft_wrap=True,
    )
    return identical


def cast_table(picture: Image.Image, model, layout: MaskLayout, drawing: Path) -> Table:
    """Who takes part: the photograph, the model, the mask."""
    text = model.config.text_config
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]photograph[/]", f"{picture.width} x {picture.height} pixels")
    table.add_row(
        "[bold]model[/]",
        f"LLaVA built from a config: {text.num_hidden_layers} layers, "
        f"{model.num_parameters() / 1e6:.1f} M random weights, float32. CLIP's real geometry: "
        f"{IMAGE_SIZE} pixels in patches of {PATCH_SIZE}, {VISION_TOKENS} vision tokens. "
        "Untrained, so its answers are noise; that both routes make the same noise is the point.",
    )
    table.add_row("[bold]mask[/]", f"{layout}, drawn in {drawing}")
    table.add_row()
    return table


def answers_table(processor, answers: Sequence[tuple[str, Answer, Answer]]) -> Table:
    table = Table("question", "one masked pass", "two passes", "identical", title="Answers")
    for question, one, two in answers:
        same = torch.equal(one.tokens, two.tokens)
        said = (processor.tokenizer.decode(answer.tokens) for answer in (one, two))
        table.add_row(question, *said, "[green]yes[/]" if same else "[red]NO[/]")
    return table


def times_table(
    ids: Tensor, entry, first_pass: float, answers: Sequence[tuple[str, Answer, Answer]]
) -> Table:
    one_pass = sum(one.seconds for _, one, _ in answers) / len(answers)
    second_pass = sum(two.seconds for _, _, two in answers) / len(answers)
    whole, prefix, new = ids.shape[1], entry.next_position, len(answers[0][1].tokens)
    table = Table("step", title="Times on this CPU")
    for heading in ("tokens read", "written", "time"):
        table.add_column(heading, justify="right")
    for step, read, written, seconds in (
        ("one masked pass, each question", whole, new, one_pass),
        ("pass 1, once an image", prefix, 0, first_pass),
        ("pass 2, each question", whole - prefix, new, second_pass),
    ):
        table.add_row(step, str(read), str(written), f"{seconds * 1e3:.0f} ms")
    return table


def sizes_table(text: LlamaConfig, entry) -> Table:
    ours = (text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
    llava_7b = (32, 32, 128)
    table = Table(
        title="Keys and values kept of an image",
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
    """Bytes in MB of 10^6, or in kB of 10^3."""
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB" if count < 1e6 else f"{count / 1e6:.0f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m voco_model.demo", description=__doc__.splitlines()[0].split(": ", 1)[1]
    )
    parser.add_argument("--image", help="a picture of yours; by default a portrait of Grace Hopper")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--num-voco", type=int, default=1, help="VoCo tokens (default: 1)")
    parser.add_argument(
        "--new-tokens", type=int, default=16, help="an answer's length (default: 16)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of mask.png")
    given = parser.parse_args(arguments)
    if given.num_voco < 1 or given.new_tokens < 1:
        parser.error(
            "expected --num-voco and --new-tokens >= 1, got "
            f"{given.num_voco} and {given.new_tokens}"
        )
    try:
        picture = load_photograph(given.image)
    except OSError as error:  # missing, or no picture: Pillow's UnidentifiedImageError is one too
        parser.error(f"expected --image to be a picture, got {given.image}: {error}")
    console = Console()
    questions = given.question or QUESTIONS
    agreed = run(console, picture, questions, given.num_voco, given.new_tokens, given.out)
    return 0 if agreed else 1


if __name__ == "__main__":
    raise SystemExit(main())

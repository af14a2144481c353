"""Text that spells a control token stays text.

A question about HTML may hold ``</s>``, which a tokenizer would read as its end of sequence. Prompts
travel as one string, through the processor and through chat templates, so the string itself has to say
which is which: ``as_text`` puts a mark behind the first character of each control token that a text
spells, and ``prepare_tokenizer`` has the tokenizer drop the mark once it has found its control tokens.
Strings without such a spelling are not changed, nor are their ids.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache

from tokenizers import pre_tokenizers

# A code point that Unicode reserves for use inside a program.
MARK = "\ufdd0"
# Tokens of prompt styles; some tokenizers have them without calling them special.
_OF_STYLES = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
# What chat templates written without a tokenizer at hand keep text.
COMMON_TOKENS = ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|startoftext|>", *_OF_STYLES)
# The first character of what may be a control token of some tokenizer.
_LOOKS_LIKE_ONE = re.compile(r"<(?=[^\s<>]+>)|\[(?=/?[A-Za-z_]+\])|\|(?=[A-Z]+\|)")


def control_tokens(tokenizer) -> tuple[str, ...]:
    """The tokens that text must not become: special ones, and those of prompt styles. Longest first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or token.content in _OF_STYLES}
    return tuple(sorted(found | set(tokenizer.all_special_tokens), key=lambda t: (-len(t), t)))


def as_text(text: str, tokens: Sequence[str] | None = None) -> str:
    """The text with each control token in it marked, for a prepared tokenizer to read as characters.

    Args:
        tokens: ``control_tokens`` of the tokenizer. By default everything that looks like a control
            token is marked: ``<...>``, ``[...]`` and ``|...|`` without blanks.
    """
    return (_LOOKS_LIKE_ONE if tokens is None else _starts(tuple(tokens))).sub(
        rf"\g<0>{MARK}", text
    )


@lru_cache(maxsize=64)
def _starts(tokens: tuple[str, ...]) -> re.Pattern:
    """Finds the first character of every token, also of those that overlap."""
    if not tokens:
        return re.compile(r"(?!)")
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, tokens))})).", re.DOTALL)


def token_ids(tokenizer, written: str, **options):
    """What ``tokenizer(written, **options)`` returns, for strings that hold marked text.

    Raises:
        ValueError: a tokenizer that would keep the marks.
    """
    if MARK in written and not is_prepared(tokenizer):
        raise ValueError(
            "expected a prepared tokenizer for text that spells a control token, got "
            f"{type(tokenizer).__name__} for {written.replace(MARK, '')!r}; pass the processor that was "
            "given to enable"
        )
    return tokenizer(written, **options)


def is_prepared(tokenizer) -> bool:
    """Whether this tokenizer drops the marks of ``as_text``."""
    splitter = tokenizer.is_fast and tokenizer.backend_tokenizer.pre_tokenizer
    return bool(splitter) and _pieces(splitter, f"a{MARK}") == _pieces(splitter, "a")


def _pieces(splitter, text: str) -> str:
    return "".join(piece for piece, _ in splitter.pre_tokenize_str(text))


def prepare_tokenizer(tokenizer, steps: ExitStack | None = None) -> None:
    """Have the tokenizer drop the marks of ``as_text``, and put nothing behind a text.

    An end of sequence behind the prompt would stand before the answer; where one belongs, behind
    answers, the prompt has it already.

    Args:
        steps: gets the way back.

    Raises:
        ValueError: a tokenizer without a Rust backend; one whose model makes a control token of
            characters; one that puts something behind a text which can't be taken away. The tokenizer is
            changed then, if ``steps`` isn't closed.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "expected a fast tokenizer, which can keep text that spells a control token apart from it, "
            f"got {type(tokenizer).__name__}; load the processor with use_fast=True"
        )
    backend = tokenizer.backend_tokenizer
    if not is_prepared(tokenizer):
        if steps is not None:
            steps.callback(setattr, backend, "pre_tokenizer", backend.pre_tokenizer)
        backend.pre_tokenizer = _dropping_marks(backend.pre_tokenizer)
    if appended_ids(tokenizer):
        if steps is not None:
            steps.callback(setattr, backend, "post_processor", backend.post_processor)
        backend.post_processor = _adding_nothing_behind(backend.post_processor)
    check_adds_nothing_behind(tokenizer)
    _check_stays_text(tokenizer)


def _dropping_marks(before):
    # A byte-level tokenizer shows the mark as one character a byte.
    seen = (
        MARK if before is None else _pieces(before, f"a{MARK}").removeprefix(_pieces(before, "a"))
    )
    drop = pre_tokenizers.Split(seen, "removed")
    return drop if before is None else pre_tokenizers.Sequence([before, drop])


def _adding_nothing_behind(post_processor):
    state = json.loads(post_processor.__getstate__())
    for part in state.get("processors", [state]):
        if part["type"] == "TemplateProcessing":
            place = next(i for i, piece in enumerate(part["single"]) if "Sequence" in piece)
            del part["single"][place + 1 :]
    changed = copy.deepcopy(post_processor)
    changed.__setstate__(json.dumps(state).encode())
    return changed


def appended_ids(tokenizer) -> list[int]:
    """The ids that the tokenizer puts behind every text by itself."""
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    starts = range(len(ids) - len(own) + 1)
    return ids[next(i for i in starts if ids[i : i + len(own)] == own) + len(own) :]


def check_adds_nothing_behind(tokenizer) -> None:
    """Raise ``ValueError`` for a tokenizer that ends every text in tokens of its own."""
    behind = appended_ids(tokenizer)
    if behind:
        raise ValueError(
            "expected a tokenizer that puts nothing behind a text, got one that puts "
            f"{tokenizer.convert_ids_to_tokens(behind)} there, in front of the answer; pass the "
            "processor that was given to enable, or set tokenizer.add_bos_token = True and "
            "tokenizer.add_eos_token = False"
        )


def _check_stays_text(tokenizer) -> None:
    tokens = control_tokens(tokenizer)
    written = [as_text(token, tokens) for token in tokens]
    read = tokenizer(written, add_special_tokens=False)["input_ids"]
    for token, ids in zip(tokens, read, strict=True):
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id in ids and token_id != tokenizer.unk_token_id:
            raise ValueError(
                f"expected a tokenizer that can read {token!r} as characters, got "
                f"{type(tokenizer).__name__}, which makes the control token of them; use a tokenizer "
                "whose control tokens are longer than a character and are no pieces of its model"
            )

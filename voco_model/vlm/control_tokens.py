"""Text that spells a control token stays text.

A question about HTML may hold ``</s>``, which a tokenizer would read as its end of sequence. Prompts
travel as one string, through the processor and through chat templates, so the string itself has to say
which is which: ``as_text`` puts a mark behind the first character of what may be a control token, and
``prepare_tokenizer`` has the tokenizer drop the marks once it has found its control tokens. Text without
a control token has the same ids with marks and without.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache

from tokenizers import Regex, normalizers, pre_tokenizers

# Code points that Unicode reserves for use inside a program. In a prompt: what follows may look like the
# rest of a control token, and is text.
MARK = "\ufdd0"
# Inside a prepared tokenizer: what follows would be the rest of a control token of its own.
KEEPS_APART = "\ufdd1"
# Tokens of prompt styles; some tokenizers have them without calling them special.
_OF_STYLES = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
# What chat templates written without a tokenizer at hand keep text.
COMMON_TOKENS = ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|startoftext|>", *_OF_STYLES)
# The first character of what may be a control token of some tokenizer.
_MAY_START_ONE = re.compile(r"[<>\[|{§](?=\S)")
_MARKS = re.compile(f"[{MARK}{KEEPS_APART}]")


def control_tokens(tokenizer) -> tuple[str, ...]:
    """The tokens that text must not become: special ones, and those of prompt styles. Longest first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or token.content in _OF_STYLES}
    return tuple(sorted(found | set(tokenizer.all_special_tokens), key=lambda t: (-len(t), t)))


def as_text(text: str, tokens: Sequence[str] | None = None) -> str:
    """The text with each control token in it marked, for a prepared tokenizer to read as characters.

    Args:
        tokens: ``control_tokens`` of the tokenizer. By default every sign that control tokens start
            with is marked: what is no control token has the same ids either way.
    """
    first = _MAY_START_ONE if tokens is None else _starts(tuple(tokens))
    return first.sub(rf"\g<0>{MARK}", without_marks(text))


def without_marks(text: str) -> str:
    """A user's text without the code points that mean something to a prepared tokenizer."""
    return _MARKS.sub("", text)


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
    normalizer = tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer
    return bool(normalizer) and normalizer.normalize_str(f"a{MARK}") == normalizer.normalize_str(
        "a"
    )


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
        _replace(backend, "pre_tokenizer", _dropping_marks(backend.pre_tokenizer), steps)
        marks = _reading_marks(control_tokens(tokenizer))
        before = backend.normalizer
        after = marks if before is None else normalizers.Sequence([before, marks])
        _replace(backend, "normalizer", after, steps)
    elif _read_as_control_tokens(tokenizer):  # tokens that were added since
        marks = _reading_marks(control_tokens(tokenizer))
        after = normalizers.Sequence([marks, backend.normalizer])
        _replace(backend, "normalizer", after, steps)
    if appended_ids(tokenizer):
        after = _adding_nothing_behind(backend.post_processor)
        _replace(backend, "post_processor", after, steps)
    check_adds_nothing_behind(tokenizer)
    for token in control_tokens(tokenizer):
        if not _MAY_START_ONE.match(f"{token}x"):
            raise ValueError(
                f"expected control tokens that start with one of <>[|{{§, got {token!r}, which prompts "
                "can't keep apart from other text; use a tokenizer with other control tokens"
            )
    for token in _read_as_control_tokens(tokenizer):
        raise ValueError(
            f"expected a tokenizer that can read {token!r} as characters, got "
            f"{type(tokenizer).__name__}, which makes the control token of them; use a tokenizer "
            "whose control tokens are longer than a character and are no pieces of its model"
        )


def _replace(backend, name: str, after, steps: ExitStack | None) -> None:
    if steps is not None:
        steps.callback(setattr, backend, name, getattr(backend, name))
    setattr(backend, name, after)


def _reading_marks(tokens: Sequence[str]):
    """Where a mark is inside one of these tokens, it keeps its characters apart; others are dropped."""
    by_first: dict[str, list[str]] = {}
    for token in tokens:
        rest = f"{MARK}?".join(map(re.escape, token[1:]))  # a token may look as if it held another
        by_first.setdefault(re.escape(token[0]), []).append(rest)
    inside = "|".join(
        f"(?<={first}{MARK})(?:{'|'.join(f'(?={rest})' for rest in rests)})"
        for first, rests in by_first.items()
    )
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"{MARK}(?:{inside})"), KEEPS_APART),
            normalizers.Replace(MARK, ""),
        ]
    )


def _dropping_marks(before):
    """The pre-tokenizer, and after it one that drops ``KEEPS_APART``."""
    # A byte-level tokenizer shows it as one character a byte.
    seen = KEEPS_APART
    if before is not None:
        seen = _pieces(before, f"a{KEEPS_APART}").removeprefix(_pieces(before, "a"))
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


def _read_as_control_tokens(tokenizer) -> list[str]:
    """The control tokens that the tokenizer finds in marked text."""
    tokens = control_tokens(tokenizer)
    written = [as_text(token, tokens) for token in tokens]
    read = tokenizer(written, add_special_tokens=False)["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    return [
        token
        for token, token_id, found in zip(tokens, ids, read, strict=True)
        if token_id in found and token_id != tokenizer.unk_token_id
    ]

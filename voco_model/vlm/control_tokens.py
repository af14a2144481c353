"""Control tokens spelled in text: marked in prompts, and read as text by a prepared tokenizer.

A question about HTML may contain ``</s>``, which a tokenizer would read as its end of sequence. A prompt
is one string, in the processor and in chat templates, so the string itself has to tell the two apart:
``as_text`` inserts a mark after the first character of anything that may be a control token, and
``prepare_tokenizer`` has the tokenizer drop the marks after it has found its control tokens. Marks don't
change the ids of other text.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache

from tokenizers import Regex, normalizers, pre_tokenizers

# Code points that Unicode reserves for use inside a program. In a prompt: what follows is text, even if
# it completes a control token.
MARK = "\ufdd0"
# Inside a prepared tokenizer: what follows would complete one of its control tokens.
KEEPS_APART = "\ufdd1"
# Tokens of prompt styles; in some tokenizers they are not special tokens.
_OF_STYLES = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
# For chat templates written without a tokenizer.
COMMON_TOKENS = ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|startoftext|>", *_OF_STYLES)
# The first character of anything that may be a control token of some tokenizer.
_MAY_START_ONE = re.compile(r"[<>\[|{§](?=\S)")
_MARKS = re.compile(f"[{MARK}{KEEPS_APART}]")


def control_tokens(tokenizer) -> tuple[str, ...]:
    """The special tokens of a tokenizer and those of prompt styles, which text must not become; longest
    first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or token.content in _OF_STYLES}
    return tuple(sorted(found | set(tokenizer.all_special_tokens), key=lambda t: (-len(t), t)))


def as_text(text: str, tokens: Sequence[str] | None = None) -> str:
    """The text with each control token in it marked, for a prepared tokenizer to read as characters.

    Args:
        tokens: ``control_tokens(tokenizer)``. By default every character that may start a control token
            is marked.
    """
    first = _MAY_START_ONE if tokens is None else _starts(tuple(tokens))
    return first.sub(rf"\g<0>{MARK}", without_marks(text))


def without_marks(text: str) -> str:
    """A user's text without the code points that have a meaning for a prepared tokenizer."""
    return _MARKS.sub("", text)


@lru_cache(maxsize=64)
def _starts(tokens: tuple[str, ...]) -> re.Pattern:
    """A pattern for the first character of every token, including tokens that overlap."""
    if not tokens:
        return re.compile(r"(?!)")
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, tokens))})).", re.DOTALL)


def token_ids(tokenizer, written: str, **options):
    """``tokenizer(written, **options)`` for a string that may contain marks.

    Raises:
        ValueError: marks, and a tokenizer that would keep them.
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
    """Have the tokenizer drop the marks of ``as_text``, and append nothing to a text.

    An end of sequence appended to a prompt would precede the answer; after earlier answers, the prompt
    contains it already.

    Args:
        steps: receives the callbacks that undo it.

    Raises:
        ValueError: a tokenizer without a Rust backend; one whose model composes a control token from
            characters; one that appends tokens and can't be kept from it. The tokenizer stays changed
            unless ``steps`` are closed.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "expected a fast tokenizer, which can tell a control token from text that spells it, "
            f"got {type(tokenizer).__name__}; load the processor with use_fast=True"
        )
    backend = tokenizer.backend_tokenizer
    if not is_prepared(tokenizer):
        _replace(backend, "pre_tokenizer", _dropping_marks(backend.pre_tokenizer), steps)
        marks = _reading_marks(control_tokens(tokenizer))
        before = backend.normalizer
        after = marks if before is None else normalizers.Sequence([before, marks])
        _replace(backend, "normalizer", after, steps)
    elif _read_as_control_tokens(tokenizer):  # tokens added since
        marks = _reading_marks(control_tokens(tokenizer))
        after = normalizers.Sequence([marks, backend.normalizer])
        _replace(backend, "normalizer", after, steps)
    if appended_ids(tokenizer):
        after = _appending_nothing(backend.post_processor)
        _replace(backend, "post_processor", after, steps)
    check_appends_nothing(tokenizer)
    for token in control_tokens(tokenizer):
        if not _MAY_START_ONE.match(f"{token}x"):
            raise ValueError(
                f"expected control tokens that start with one of <>[|{{§, got {token!r}, which prompts "
                "can't tell from other text; use a tokenizer with other control tokens"
            )
    for token in _read_as_control_tokens(tokenizer):
        raise ValueError(
            f"expected a tokenizer that can read {token!r} as characters, got "
            f"{type(tokenizer).__name__}, which composes the control token from them; use a "
            "tokenizer whose control tokens are longer than a character and not in its vocabulary"
        )


def _replace(backend, name: str, after, steps: ExitStack | None) -> None:
    if steps is not None:
        steps.callback(setattr, backend, name, getattr(backend, name))
    setattr(backend, name, after)


def _reading_marks(tokens: Sequence[str]):
    """A normalizer: marks inside one of these tokens become ``KEEPS_APART``, other marks are dropped."""
    by_first: dict[str, list[str]] = {}
    for token in tokens:
        rest = f"{MARK}?".join(map(re.escape, token[1:]))  # a token may contain another
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
    """The pre-tokenizer followed by one that drops ``KEEPS_APART``."""
    # A byte-level pre-tokenizer turns it into one character per byte.
    seen = KEEPS_APART
    if before is not None:
        seen = _pieces(before, f"a{KEEPS_APART}").removeprefix(_pieces(before, "a"))
    drop = pre_tokenizers.Split(seen, "removed")
    return drop if before is None else pre_tokenizers.Sequence([before, drop])


def _appending_nothing(post_processor):
    state = json.loads(post_processor.__getstate__())
    for part in state.get("processors", [state]):
        if part["type"] == "TemplateProcessing":
            place = next(i for i, piece in enumerate(part["single"]) if "Sequence" in piece)
            del part["single"][place + 1 :]
    changed = copy.deepcopy(post_processor)
    changed.__setstate__(json.dumps(state).encode())
    return changed


def appended_ids(tokenizer) -> list[int]:
    """The ids that the tokenizer appends to every text."""
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    starts = range(len(ids) - len(own) + 1)
    return ids[next(i for i in starts if ids[i : i + len(own)] == own) + len(own) :]


def check_appends_nothing(tokenizer) -> None:
    """Raise ``ValueError`` for a tokenizer that appends tokens to every text."""
    appended = appended_ids(tokenizer)
    if appended:
        raise ValueError(
            "expected a tokenizer that appends nothing to a text, got one that appends "
            f"{tokenizer.convert_ids_to_tokens(appended)}, which would precede the answer; pass the "
            "processor that was given to enable, or set tokenizer.add_bos_token = True and "
            "tokenizer.add_eos_token = False"
        )


def _read_as_control_tokens(tokenizer) -> list[str]:
    """The control tokens that the tokenizer still reads in marked text."""
    tokens = control_tokens(tokenizer)
    written = [as_text(token, tokens) for token in tokens]
    read = tokenizer(written, add_special_tokens=False)["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    return [
        token
        for token, token_id, found in zip(tokens, ids, read, strict=True)
        if token_id in found and token_id != tokenizer.unk_token_id
    ]

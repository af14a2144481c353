"""Prompts as in Listing 1 of the supplement: the image, its VoCo tokens, then everything else.

    <image>\\n<VoCo>...<VoCo>\\n A chat between ... of the given image. ... USER: ... ASSISTANT:

That is Vicuna's form; ``STYLES`` has those of other language models. There is no BOS here: the
tokenizer adds it, once. ``prompt`` and ``chat_template`` write the same strings, one for Python, one
for ``processor.apply_chat_template``. What a text spells of control tokens is marked in both, see
``voco_model.vlm.control_tokens``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from voco_model.arguments import whole_number
from voco_model.vlm.control_tokens import COMMON_TOKENS, KEEPS_APART, MARK, as_text, without_marks

VOCO_TOKEN = "<VoCo>"
IMAGE_TOKEN = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_WITH_IMAGE = SYSTEM.replace("assistant.", "assistant of the given image.", 1)

# A question, or messages in the form of transformers: {"role": ..., "content": text or parts}.
Turns = str | Sequence[Mapping]


@dataclass(frozen=True)
class PromptStyle:
    """How the turns of a conversation are written.

    Attributes:
        system, system_with_image: the system prompt where the messages have none of their own.
        behind_image: between the last VoCo token and the text.
        around_system, around_user: what stands before and behind such a message.
        ask: what the model goes on from.
        before_answer: between ``ask`` and an answer of the past.
        behind_answer: the end of an answer; None for the tokenizer's end-of-sequence token.
        keep_newlines: False deletes every newline behind the image part, in answers too.
    """

    system: str
    system_with_image: str
    behind_image: str
    around_system: tuple[str, str]
    around_user: tuple[str, str]
    ask: str
    before_answer: str
    behind_answer: str | None
    keep_newlines: bool = True


_VICUNA = {
    "around_system": ("", " "),
    "around_user": ("USER: ", " "),
    "ask": "ASSISTANT:",
    "before_answer": " ",
    "behind_answer": None,
}
_SYSTEM_OF_THE_AUTHORS = SYSTEM.replace("assistant.", "assistant of the image.", 1)

STYLES: dict[str, PromptStyle] = {
    # Listing 1 of the supplement. LLaVA-1.5.
    "vicuna": PromptStyle(SYSTEM, SYSTEM_WITH_IMAGE, "\n ", **_VICUNA),
    # What the authors' code does instead (Yxxxb/VoCo-LLaMA, 3b6e14d): another system prompt, without an
    # image too, and no newlines. For checkpoints that were trained so.
    "authors": PromptStyle(
        _SYSTEM_OF_THE_AUTHORS, _SYSTEM_OF_THE_AUTHORS, "\n", **_VICUNA, keep_newlines=False
    ),
    # LLaVA-1.6 with Mistral-7B-Instruct, which knows no system prompt.
    "mistral": PromptStyle(
        "", "", "\n", ("", "\n"), ("[INST] ", " [/INST]"), "", " ", behind_answer=None
    ),
    # LLaVA-1.6 with Nous-Hermes-2-Yi-34B.
    "chatml": PromptStyle(
        "Answer the questions.",
        "Answer the questions of the given image.",
        "\n",
        ("<|im_start|>system\n", "<|im_end|>"),
        ("<|im_start|>user\n", "<|im_end|>"),
        "<|im_start|>assistant\n",
        "",
        "<|im_end|>",
    ),
}


def style_of(style: str) -> PromptStyle:
    """Raise ``ValueError`` for a name that ``STYLES`` doesn't have."""
    if style not in STYLES:
        raise ValueError(f"expected a prompt style of {', '.join(STYLES)}, got {style!r}")
    return STYLES[style]


def style_in(config) -> str:
    """The name of the style that a model's config asks for."""
    return getattr(config, "voco_prompt", None) or "vicuna"


def prompt(
    turns: Turns,
    num_voco: int = 1,
    *,
    images: int | None = None,
    add_generation_prompt: bool = True,
    eos_token: str = "</s>",
    style: str = "vicuna",
    control_tokens: Sequence[str] | None = None,
) -> str:
    """The whole prompt: image part and text part, for the processor that was given to ``enable``.

    Args:
        turns: a question, or messages with roles ``system``, ``user`` and ``assistant``. A system
            message replaces the default one.
        num_voco: number of VoCo tokens behind each image.
        images: number of images in front. By default the number of image parts in the messages, and
            1 for a plain question. Without images the system prompt is the language model's own.
        add_generation_prompt: end with ``ASSISTANT:``, or what the style has for it, for the model to
            go on.
        eos_token: follows each answer, where the style has nothing else for it.
        style: a name of ``STYLES``.
        control_tokens: the tokens that text must not become, as
            ``voco_model.vlm.control_tokens.control_tokens(tokenizer)`` lists them. By default everything
            that looks like a control token is marked. What is none has the same ids either way.

    Returns:
        the prompt. Where a text spells a control token, U+FDD0 follows the token's first character; the
        tokenizer of the processor given to ``enable`` drops it and reads the spelling as text.

    Raises:
        ValueError: an unknown role, part or style, a number that isn't whole, or a text that holds
            ``<image>`` or ``<VoCo>``.
    """
    if images is None:
        images = 1 if isinstance(turns, str) else images_in(messages_of(turns))
    return image_part(num_voco, images) + text_part(
        turns,
        with_image=images > 0,
        add_generation_prompt=add_generation_prompt,
        eos_token=eos_token,
        style=style,
        control_tokens=control_tokens,
    )


def image_part(num_voco: int = 1, images: int = 1) -> str:
    """What the first pass reads: each image, a newline, its VoCo tokens."""
    num_voco = whole_number("num_voco", num_voco, at_least=1)
    images = whole_number("images", images, at_least=0)
    return "\n".join([f"{IMAGE_TOKEN}\n" + VOCO_TOKEN * num_voco] * images)


def text_part(
    turns: Turns,
    *,
    with_image: bool = True,
    add_generation_prompt: bool = True,
    eos_token: str = "</s>",
    style: str = "vicuna",
    control_tokens: Sequence[str] | None = None,
) -> str:
    """What the second pass reads: the rest, from the newline after the VoCo tokens on."""
    pieces = text_pieces(
        turns,
        with_image=with_image,
        eos_token=eos_token,
        style=style,
        control_tokens=control_tokens,
    )
    written = "".join(text for text, _ in pieces)
    return written + style_of(style).ask if add_generation_prompt else written


def text_pieces(
    turns: Turns,
    *,
    with_image: bool,
    eos_token: str = "</s>",
    style: str = "vicuna",
    control_tokens: Sequence[str] | None = None,
) -> list[tuple[str, bool]]:
    """``text_part`` without a generation prompt, in pieces: text, and whether a model is to learn it.

    That is an answer and its end, from right behind ``ask`` on.
    """
    messages = messages_of(turns)
    form = style_of(style)
    end = eos_token if form.behind_answer is None else form.behind_answer
    default = form.system_with_image if with_image else form.system
    pieces = []

    def add(text: str, learnt: bool = False) -> None:
        pieces.append((without_newlines(text), learnt))

    def without_newlines(text: str) -> str:
        return text if form.keep_newlines or not with_image else text.replace("\n", "")

    if messages[0].get("role") != "system" and default:
        add(default.join(form.around_system))
    for index, message in enumerate(messages):
        # Newlines first: without them, a text may spell what it didn't before.
        text = without_newlines(without_marks(_parts(message)[1]))
        _check_no_image_in(text)
        text = as_text(text, control_tokens)
        role = message.get("role")
        if role == "user":
            add(text.join(form.around_user))
        elif role == "assistant":
            add(form.ask)
            add(form.before_answer + text + end, learnt=True)
        elif role == "system" and index == 0:
            add(text.join(form.around_system))
        else:
            raise ValueError(
                "expected role 'user' or 'assistant', or 'system' in the first message, got "
                f"{role!r} in message {index}"
            )
    return [(form.behind_image, False), *pieces] if with_image else pieces


def chat_template(
    num_voco: int = 1, style: str = "vicuna", control_tokens: Sequence[str] = COMMON_TOKENS
) -> str:
    """The Jinja template of ``prompt``; its variable ``num_voco`` overrides the number here.

    Args:
        control_tokens: of the tokenizer, as for ``prompt``. Jinja can't look for what only looks like a
            control token.
    """
    num_voco = whole_number("num_voco", num_voco, at_least=1)
    form = style_of(style)
    end = "eos_token" if form.behind_answer is None else json.dumps(form.behind_answer)
    names = {
        "DEFAULT_NUM_VOCO": str(num_voco),
        "SYSTEM_WITH_IMAGE": json.dumps(form.system_with_image),
        "SYSTEM_WITHOUT_IMAGE": json.dumps(form.system),
        "BEHIND_IMAGE": json.dumps(form.behind_image),
        "BEFORE_SYSTEM": json.dumps(form.around_system[0]),
        "BEHIND_SYSTEM": json.dumps(form.around_system[1]),
        "BEFORE_USER": json.dumps(form.around_user[0]),
        "BEHIND_USER": json.dumps(form.around_user[1]),
        "BEFORE_ANSWER": json.dumps(form.before_answer),
        "BEHIND_ANSWER": end,
        "ASK": json.dumps(form.ask),
        "NEWLINES": "true" if form.keep_newlines else "false",
        "MARK": json.dumps(MARK, ensure_ascii=False),
        "KEEPS_APART": json.dumps(KEEPS_APART, ensure_ascii=False),
        # Last: a token may spell one of the names above.
        "CONTROL_TOKENS": json.dumps(
            sorted(set(control_tokens), key=lambda token: (-len(token), token)), ensure_ascii=False
        ),
    }
    written = _TEMPLATE
    for name, value in names.items():
        written = written.replace(name, value)
    return written


def messages_of(turns: Turns) -> list[Mapping]:
    """A question as a message; messages as they are.

    Raises:
        TypeError: neither.
        ValueError: no message, or one whose content is neither a string nor parts with a type.
    """
    if isinstance(turns, str):
        return [{"role": "user", "content": turns}]
    if not isinstance(turns, Sequence) or isinstance(turns, bytes):
        raise TypeError(
            f"expected a question or messages in a list, got {type(turns).__name__}; write a question "
            "as a string, or as [{'role': 'user', 'content': ...}]"
        )
    if not turns:
        raise ValueError("expected a question or at least one message, got none")
    for index, message in enumerate(turns):
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = [] if isinstance(content, str) else content
        if not isinstance(parts, Sequence) or any(
            not isinstance(part, Mapping)
            or not isinstance(part.get("type"), str)
            or (part["type"] == "text" and not isinstance(part.get("text"), str))
            for part in parts
        ):
            raise ValueError(
                "expected messages with content that is a string or parts {'type': 'text', 'text': "
                f"...}} and {{'type': 'image'}}, got {message!r} as message {index}"
            )
    return list(turns)


def images_in(messages: Sequence[Mapping]) -> int:
    """How many image parts ``messages_of`` some turns have."""
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    return sum(part["type"] == "image" for part in parts)


def _parts(message: Mapping) -> tuple[int, str]:
    """Number of images and joined text of one message."""
    content = message.get("content")
    if isinstance(content, str):
        images, text = 0, content
    else:
        kinds = [part.get("type") for part in content or ()]
        if not kinds or set(kinds) - {"image", "text"}:
            raise ValueError(
                "expected content that is a string or parts of type 'image' and 'text', got "
                f"{content!r}"
            )
        images = kinds.count("image")
        text = "".join(part["text"] for part in content if part["type"] == "text")
    return images, text


def _check_no_image_in(text: str) -> None:
    for token in (IMAGE_TOKEN, VOCO_TOKEN):
        if token in text:
            raise ValueError(
                f"expected text without {token}, got {text!r}; the prompt puts {token} in its "
                "place by itself: give images as parts {'type': 'image'}"
            )


_TEMPLATE = """\
{%- set ns = namespace(images=0, text='') -%}
{%- set voco_tokens = '<VoCo>' * (num_voco | default(DEFAULT_NUM_VOCO)) -%}
{%- for message in messages if message.content is not string -%}
    {%- for part in message.content if part.type == 'image' -%}
        {{- '\\n' if ns.images -}}
        {{- '<image>\\n' + voco_tokens -}}
        {%- set ns.images = ns.images + 1 -%}
    {%- endfor -%}
{%- endfor -%}
{{- BEHIND_IMAGE if ns.images -}}
{%- set system = SYSTEM_WITH_IMAGE if ns.images else SYSTEM_WITHOUT_IMAGE -%}
{%- if messages[0].role != 'system' and system -%}
    {{- BEFORE_SYSTEM + system + BEHIND_SYSTEM -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.content is string -%}
        {%- set ns.text = message.content -%}
    {%- else -%}
        {%- set parts = message.content | selectattr('type', 'equalto', 'text') -%}
        {%- set ns.text = parts | map(attribute='text') | join('') -%}
    {%- endif -%}
    {%- set ns.text = ns.text.replace(MARK, '').replace(KEEPS_APART, '') -%}
    {%- if ns.images and not NEWLINES -%}
        {%- set ns.text = ns.text.replace('\\n', '') -%}
    {%- endif -%}
    {%- if '<image>' in ns.text or '<VoCo>' in ns.text -%}
        {{- raise_exception('expected text without <image> and <VoCo>, got: ' + ns.text) -}}
    {%- endif -%}
    {%- for token in CONTROL_TOKENS if token in ns.text -%}
        {%- for _ in token -%}{#- again for tokens that overlap themselves -#}
            {%- set ns.text = ns.text.replace(token, token[0] + MARK + token[1:]) -%}
        {%- endfor -%}
    {%- endfor -%}
    {%- if message.role == 'user' -%}
        {{- BEFORE_USER + ns.text + BEHIND_USER -}}
    {%- elif message.role == 'assistant' -%}
        {{- ASK -}}
        {%- generation -%}{{- BEFORE_ANSWER + ns.text + BEHIND_ANSWER -}}{%- endgeneration -%}
    {%- elif message.role == 'system' and loop.first -%}
        {{- BEFORE_SYSTEM + ns.text + BEHIND_SYSTEM -}}
    {%- else -%}
        {{- raise_exception('expected role user or assistant, got ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{{- ASK if add_generation_prompt -}}
"""

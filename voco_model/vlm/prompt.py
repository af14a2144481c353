"""Prompts as in Listing 1 of the supplement: the image, its VoCo tokens, then everything else.

    <image>\\n<VoCo>...<VoCo>\\n A chat between ... of the given image. ... USER: ... ASSISTANT:

This is Vicuna's style; ``STYLES`` has those of other language models. BOS isn't part of a prompt: the
tokenizer adds it. ``prompt`` and ``chat_template`` write the same strings, in Python and for
``processor.apply_chat_template``. Both mark control tokens spelled in text, see
``voco_model.vlm.control_tokens``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from voco_model.arguments import whole_number
from voco_model.vlm.control_tokens import COMMON_TOKENS, KEEPS_APART, MARK, as_text, without_marks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VOCO_TOKEN = "<VoCo>"
IMAGE_TOKEN = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_WITH_IMAGE = SYSTEM.replace("assistant.", "assistant of the given image.", 1)

# A question, or messages as in Transformers: {"role": ..., "content": text or parts}.
Turns = str | Sequence[Mapping]
# Content parts that are images: Transformers' and OpenAI's type.
_IMAGE_TYPES = ("image", "image_url")
# Where such a part has its image, if it has one; each is read by voco_model.pictures.decode.
_IMAGE_KEYS = ("image", "url", "path", "base64", "bytes", "image_url")


@dataclass(frozen=True)
class PromptStyle:
    """How the turns of a conversation are written.

    Attributes:
        system, system_with_image: default system prompts, for conversations without a system message.
        after_image: text between the last VoCo token and the conversation.
        around_system, around_user: text before and after such a message.
        ask: the generation prompt.
        before_answer: text between ``ask`` and an earlier answer.
        after_answer: the end of an answer; None for the tokenizer's end-of-sequence token.
        keep_newlines: False deletes all newlines after the image part, including those in answers.
    """

    system: str
    system_with_image: str
    after_image: str
    around_system: tuple[str, str]
    around_user: tuple[str, str]
    ask: str
    before_answer: str
    after_answer: str | None
    keep_newlines: bool = True


_VICUNA = PromptStyle(
    SYSTEM,
    SYSTEM_WITH_IMAGE,
    "\n ",
    around_system=("", " "),
    around_user=("USER: ", " "),
    ask="ASSISTANT:",
    before_answer=" ",
    after_answer=None,
)
_SYSTEM_OF_THE_AUTHORS = SYSTEM.replace("assistant.", "assistant of the image.", 1)

STYLES: dict[str, PromptStyle] = {
    # Listing 1 of the supplement. LLaVA-1.5.
    "vicuna": _VICUNA,
    # The authors' code (Yxxxb/VoCo-LLaMA, 3b6e14d): one system prompt, with and without an image, and no
    # newlines. For checkpoints trained that way.
    "authors": replace(
        _VICUNA,
        system=_SYSTEM_OF_THE_AUTHORS,
        system_with_image=_SYSTEM_OF_THE_AUTHORS,
        after_image="\n",
        keep_newlines=False,
    ),
    # LLaVA-1.6 with Mistral-7B-Instruct, which has no system prompt.
    "mistral": PromptStyle(
        "", "", "\n", ("", "\n"), ("[INST] ", " [/INST]"), "", " ", after_answer=None
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
        raise ValueError(f"expected a prompt style among {', '.join(STYLES)}, got {style!r}")
    return STYLES[style]


def style_in(config: PreTrainedConfig) -> str:
    """The name of the style in a model's config."""
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
            message replaces the default system prompt.
        num_voco: VoCo tokens after each image.
        images: number of images at the start of the prompt. By default the number of image parts in the
            messages, and 1 for a plain question. Without images the system prompt is the language
            model's own.
        add_generation_prompt: end with ``ASSISTANT:``, or the style's equivalent.
        eos_token: ends each answer, unless the style has its own token for that.
        style: a name in ``STYLES``.
        control_tokens: the tokens that text must not become, from
            ``voco_model.vlm.control_tokens.control_tokens(tokenizer)``. By default everything that looks
            like a control token is marked; marks don't change the ids of ordinary text.

    Returns:
        the prompt. In a control token spelled by text, U+FDD0 follows the first character; the tokenizer
        of the processor given to ``enable`` drops it and reads the spelling as text.

    Raises:
        ValueError: an unknown role, part or style, a number that isn't an integer, or a text with
            ``<image>`` or ``<VoCo>`` in it.
    """
    if images is None:
        images = images_in(turns)
    return image_part(num_voco, images) + text_part(
        turns,
        with_image=images > 0,
        add_generation_prompt=add_generation_prompt,
        eos_token=eos_token,
        style=style,
        control_tokens=control_tokens,
    )


def image_part(num_voco: int = 1, images: int = 1) -> str:
    """What pass 1 reads: each image, a newline, its VoCo tokens."""
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
    """What pass 2 reads: everything from the newline after the VoCo tokens on."""
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
    """``text_part`` without a generation prompt, in pieces: text, and whether it is a training target.

    Targets are the answers with their ends, from right after ``ask`` on.
    """
    messages = messages_of(turns)
    form = style_of(style)
    end = eos_token if form.after_answer is None else form.after_answer
    default = form.system_with_image if with_image else form.system
    pieces = []

    def add(text: str, is_target: bool = False) -> None:
        pieces.append((without_newlines(text), is_target))

    def without_newlines(text: str) -> str:
        return text if form.keep_newlines or not with_image else text.replace("\n", "")

    if messages[0].get("role") != "system" and default:
        add(default.join(form.around_system))
    for index, message in enumerate(messages):
        # Newlines first: removing them may spell a control token.
        text = without_newlines(without_marks(_text_of(message)))
        _check_no_image_in(text)
        text = as_text(text, control_tokens)
        role = message.get("role")
        if role == "user":
            add(text.join(form.around_user))
        elif role == "assistant":
            add(form.ask)
            add(form.before_answer + text + end, is_target=True)
        elif role == "system" and index == 0:
            add(text.join(form.around_system))
        else:
            raise ValueError(
                "expected role 'user' or 'assistant', or 'system' in the first message, got "
                f"{role!r} in message {index}"
            )
    return [(form.after_image, False), *pieces] if with_image else pieces


def chat_template(
    num_voco: int = 1, style: str = "vicuna", control_tokens: Sequence[str] = COMMON_TOKENS
) -> str:
    """The Jinja template of ``prompt``; its variable ``num_voco`` overrides the number given here.

    Args:
        control_tokens: the tokenizer's, as for ``prompt``. Jinja can only look for given tokens.
    """
    num_voco = whole_number("num_voco", num_voco, at_least=1)
    form = style_of(style)
    end = "eos_token" if form.after_answer is None else json.dumps(form.after_answer)
    names = {
        "DEFAULT_NUM_VOCO": str(num_voco),
        "SYSTEM_WITH_IMAGE": json.dumps(form.system_with_image),
        "SYSTEM_WITHOUT_IMAGE": json.dumps(form.system),
        "AFTER_IMAGE": json.dumps(form.after_image),
        "BEFORE_SYSTEM": json.dumps(form.around_system[0]),
        "AFTER_SYSTEM": json.dumps(form.around_system[1]),
        "BEFORE_USER": json.dumps(form.around_user[0]),
        "AFTER_USER": json.dumps(form.around_user[1]),
        "BEFORE_ANSWER": json.dumps(form.before_answer),
        "AFTER_ANSWER": end,
        "ASK": json.dumps(form.ask),
        "NEWLINES": "true" if form.keep_newlines else "false",
        "MARK": json.dumps(MARK, ensure_ascii=False),
        "KEEPS_APART": json.dumps(KEEPS_APART, ensure_ascii=False),
        # Last, because a token may spell one of the names above.
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
        TypeError: neither a question nor a list of messages.
        ValueError: no message, or one whose content is neither a string nor a list of parts.
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
            or (part["type"] == "image_url" and not _url_of(part))
            for part in parts
        ):
            raise ValueError(
                "expected messages with content that is a string or parts {'type': 'text', 'text': "
                f"...}} and {{'type': 'image'}}, got {message!r} as message {index}"
            )
    return [message for message in turns if isinstance(message, Mapping)]  # all of them are


def images_in(turns: Turns, *, question: int = 1) -> int:
    """Number of images in a conversation: the image parts of its messages.

    Args:
        question: the number for a plain question.
    """
    return question if isinstance(turns, str) else len(_image_parts(turns))


def pictures_in(turns: Turns) -> list[Mapping]:
    """The image parts that hold their image, such as OpenAI's ``image_url`` parts, for
    ``voco_model.pictures.decode``. Bare ``{"type": "image"}`` parts are left out."""
    if isinstance(turns, str):
        return []
    return [
        {key: part[key] for key in _IMAGE_KEYS if part.get(key) is not None}
        for part in _image_parts(turns)
        if any(part.get(key) is not None for key in _IMAGE_KEYS)
    ]


def _image_parts(turns: Sequence[Mapping]) -> list[Mapping]:
    contents = [message["content"] for message in messages_of(turns)]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [part for part in parts if part["type"] in _IMAGE_TYPES]


def _url_of(part: Mapping) -> str | None:
    """The URL of an ``image_url`` part: OpenAI's API nests it once more, some clients don't."""
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, Mapping) else value
    return url if isinstance(url, str) else None


def _text_of(message: Mapping) -> str:
    """The text of one message, its parts joined."""
    content = message["content"]
    if isinstance(content, str):
        return content
    kinds = {part["type"] for part in content}
    if not kinds or kinds - {"text", *_IMAGE_TYPES}:
        raise ValueError(
            "expected content that is a string or parts of type 'text', 'image' and 'image_url', got "
            f"{content!r}"
        )
    return "".join(part["text"] for part in content if part["type"] == "text")


def _check_no_image_in(text: str) -> None:
    for token in (IMAGE_TOKEN, VOCO_TOKEN):
        if token in text:
            raise ValueError(
                f"expected text without {token}, got {text!r}; prompts add {token} themselves: give "
                "images as parts {'type': 'image'}"
            )


_TEMPLATE = """\
{%- set ns = namespace(images=0, text='') -%}
{%- set voco_tokens = '<VoCo>' * (num_voco | default(DEFAULT_NUM_VOCO)) -%}
{%- for message in messages if message.content is not string -%}
    {%- for part in message.content if part.type in ('image', 'image_url') -%}
        {{- '\\n' if ns.images -}}
        {{- '<image>\\n' + voco_tokens -}}
        {%- set ns.images = ns.images + 1 -%}
    {%- endfor -%}
{%- endfor -%}
{{- AFTER_IMAGE if ns.images -}}
{%- set system = SYSTEM_WITH_IMAGE if ns.images else SYSTEM_WITHOUT_IMAGE -%}
{%- if messages[0].role != 'system' and system -%}
    {{- BEFORE_SYSTEM + system + AFTER_SYSTEM -}}
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
        {{- BEFORE_USER + ns.text + AFTER_USER -}}
    {%- elif message.role == 'assistant' -%}
        {{- ASK -}}
        {%- generation -%}{{- BEFORE_ANSWER + ns.text + AFTER_ANSWER -}}{%- endgeneration -%}
    {%- elif message.role == 'system' and loop.first -%}
        {{- BEFORE_SYSTEM + ns.text + AFTER_SYSTEM -}}
    {%- else -%}
        {{- raise_exception('expected role user or assistant, got ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{{- ASK if add_generation_prompt -}}
"""

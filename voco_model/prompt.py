"""Prompts as in Listing 1 of the supplement: the image, its VoCo tokens, then everything else.

    <image>\\n<VoCo>...<VoCo>\\n A chat between ... of the given image. ... USER: ... ASSISTANT:

The form of the turns is Vicuna's: one space between them, the end-of-sequence token after an
answer. There is no BOS here: the tokenizer adds it, once. ``prompt`` and ``chat_template`` write
the same strings, one for Python, one for ``processor.apply_chat_template``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VOCO_TOKEN = "<VoCo>"
IMAGE_TOKEN = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_WITH_IMAGE = SYSTEM.replace("assistant.", "assistant of the given image.", 1)

# A question, or messages in the form of transformers: {"role": ..., "content": text or parts}.
Turns = str | Sequence[Mapping]


def prompt(
    turns: Turns,
    num_voco: int = 1,
    *,
    images: int | None = None,
    add_generation_prompt: bool = True,
    eos_token: str = "</s>",
) -> str:
    """The whole prompt: image part and text part.

    Args:
        turns: a question, or messages with roles ``system``, ``user`` and ``assistant``. A system
            message replaces the default one.
        num_voco: number of VoCo tokens behind each image.
        images: number of images in front. By default the number of image parts in the messages, and
            1 for a plain question. Without images the system prompt is Vicuna's own.
        add_generation_prompt: end with ``ASSISTANT:``, for the model to go on.
        eos_token: follows each answer.

    Raises:
        ValueError: an unknown role or part, or a text that holds ``<image>`` or ``<VoCo>`` itself.
    """
    if images is None:
        images = 1 if isinstance(turns, str) else sum(_parts(m)[0] for m in turns)
    return image_part(num_voco, images) + text_part(
        turns,
        with_image=images > 0,
        add_generation_prompt=add_generation_prompt,
        eos_token=eos_token,
    )


def image_part(num_voco: int = 1, images: int = 1) -> str:
    """What the first pass reads: each image, a newline, its VoCo tokens."""
    if num_voco < 1 or images < 0:
        raise ValueError(
            f"expected num_voco >= 1 and images >= 0, got num_voco {num_voco} and images {images}"
        )
    return "\n".join([f"{IMAGE_TOKEN}\n" + VOCO_TOKEN * num_voco] * images)


def text_part(
    turns: Turns,
    *,
    with_image: bool = True,
    add_generation_prompt: bool = True,
    eos_token: str = "</s>",
) -> str:
    """What the second pass reads: the rest, from the newline after the VoCo tokens on."""
    messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else list(turns)
    if not messages:
        raise ValueError("expected a question or at least one message, got none")
    written = []
    if messages[0].get("role") != "system":
        written.append(f"{SYSTEM_WITH_IMAGE if with_image else SYSTEM} ")
    for index, message in enumerate(messages):
        _, text = _parts(message)
        role = message.get("role")
        if role == "user":
            written.append(f"USER: {text} ")
        elif role == "assistant":
            written.append(f"ASSISTANT: {text}{eos_token}")
        elif role == "system" and index == 0:
            written.append(f"{text} ")
        else:
            raise ValueError(
                "expected role 'user' or 'assistant', or 'system' in the first message, got "
                f"{role!r} in message {index}"
            )
    if add_generation_prompt:
        written.append("ASSISTANT:")
    return ("\n " if with_image else "") + "".join(written)


def chat_template(num_voco: int = 1) -> str:
    """The Jinja template of ``prompt``; its variable ``num_voco`` overrides the number here."""
    return _TEMPLATE.replace("DEFAULT_NUM_VOCO", str(num_voco))


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
    for token in (IMAGE_TOKEN, VOCO_TOKEN):
        if token in text:
            raise ValueError(
                f"expected text without {token}, got {text!r}; the prompt puts {token} in its "
                "place by itself: give images as parts {'type': 'image'}"
            )
    return images, text


# Double quotes around the system prompts, which hold an apostrophe.
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
{{- '\\n ' if ns.images -}}
{%- if messages[0].role != 'system' -%}
    {{- "SYSTEM_WITH_IMAGE " if ns.images else "SYSTEM_WITHOUT_IMAGE " -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.content is string -%}
        {%- set ns.text = message.content -%}
    {%- else -%}
        {%- set parts = message.content | selectattr('type', 'equalto', 'text') -%}
        {%- set ns.text = parts | map(attribute='text') | join('') -%}
    {%- endif -%}
    {%- if '<image>' in ns.text or '<VoCo>' in ns.text -%}
        {{- raise_exception('expected text without <image> and <VoCo>, got: ' + ns.text) -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- 'USER: ' + ns.text + ' ' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'ASSISTANT: ' -}}{%- generation -%}{{- ns.text + eos_token -}}{%- endgeneration -%}
    {%- elif message.role == 'system' and loop.first -%}
        {{- ns.text + ' ' -}}
    {%- else -%}
        {{- raise_exception('expected role user or assistant, got ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt -}}
"""
_TEMPLATE = _TEMPLATE.replace("SYSTEM_WITH_IMAGE", SYSTEM_WITH_IMAGE)
_TEMPLATE = _TEMPLATE.replace("SYSTEM_WITHOUT_IMAGE", SYSTEM)

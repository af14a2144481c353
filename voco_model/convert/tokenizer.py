"""The tokenizer of a checkpoint, to Transformers' layout and back. Token ids never move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlavaConfig, PreTrainedTokenizerFast
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from voco_model.vlm.prompt import IMAGE_TOKEN, VOCO_TOKEN

AUTHORS_VOCO_TOKEN = "<voco>"
PAD_TOKEN = "<pad>"


def load_tokenizer(source: Path):
    has_json = (source / "tokenizer.json").is_file()
    has_model = (source / "tokenizer.model").is_file()
    if not has_json and not has_model:
        raise ValueError(
            f"expected tokenizer.json or tokenizer.model in {source}, got neither; copy the "
            "checkpoint's tokenizer there"
        )
    if not has_json and not (is_sentencepiece_available() and is_protobuf_available()):
        raise ImportError(
            f"expected sentencepiece and protobuf to read {source / 'tokenizer.model'}, got an "
            "environment without them; pip install sentencepiece protobuf"
        )
    path = source / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    # The defaults of a Llama tokenizer in the authors' Transformers (4.37), which have changed since.
    defaults = {"legacy": True, "add_bos_token": True, "add_eos_token": False}
    if not str(settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
        defaults = {}
    unsaid = {name: value for name, value in defaults.items() if settings.get(name) is None}
    # With our config: from theirs, Transformers can't tell the tokenizer's class, and warns.
    return AutoTokenizer.from_pretrained(source, config=LlamaConfig(), **unsaid)


def tokenizer_from(tokenizer) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Our tokenizer from theirs, and the tokens added to it."""
    vocab = tokenizer.get_vocab()
    if VOCO_TOKEN in vocab:
        raise ValueError(
            f"expected a tokenizer without {VOCO_TOKEN}, got one where it has the id "
            f"{vocab[VOCO_TOKEN]}; checkpoints of the authors have {AUTHORS_VOCO_TOKEN}: "
            "this one is converted already"
        )
    has_voco = AUTHORS_VOCO_TOKEN in vocab
    backend = _edited(tokenizer, {AUTHORS_VOCO_TOKEN: VOCO_TOKEN})
    pad = tokenizer.pad_token
    if pad is None or pad in (tokenizer.eos_token, tokenizer.bos_token, AUTHORS_VOCO_TOKEN):
        pad = PAD_TOKEN
    added = [token for token in (IMAGE_TOKEN, pad) if token not in vocab]
    backend.add_special_tokens([IMAGE_TOKEN, pad])
    names = {"image_token": IMAGE_TOKEN} | ({"voco_token": VOCO_TOKEN} if has_voco else {})
    return _rebuilt(tokenizer, backend, pad, names), added


def tokenizer_to(tokenizer, config: LlavaConfig, record: Mapping | None):
    """Their tokenizer from ours, and its largest id."""
    vocab = tokenizer.get_vocab()
    voco_token_id = getattr(config, "voco_token_id", None)
    if voco_token_id is None or vocab.get(VOCO_TOKEN) != voco_token_id:
        raise ValueError(
            f"expected the same id for {VOCO_TOKEN} in config and tokenizer, got {voco_token_id} and "
            f"{vocab.get(VOCO_TOKEN)}; call voco_model.enable(model, processor) and save both"
        )
    added = record["added_tokens"] if record else (IMAGE_TOKEN, PAD_TOKEN)
    last = max(id for token, id in vocab.items() if token not in added)
    # Ids must not move: only tokens that follow all others can be removed.
    dropped = {token for token in added if vocab.get(token, -1) > last}
    if any(token in vocab for token in set(added) - dropped):
        dropped, last = set(), max(vocab.values())
    backend = _edited(tokenizer, {VOCO_TOKEN: AUTHORS_VOCO_TOKEN}, dropped)
    pad = None if tokenizer.pad_token in dropped else tokenizer.pad_token
    return _rebuilt(tokenizer, backend, pad, [AUTHORS_VOCO_TOKEN]), last


def _edited(tokenizer, renamed: Mapping[str, str], dropped: Iterable[str] = ()) -> Tokenizer:
    """A copy with tokens renamed or dropped; the tokenizers library can do neither by itself."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [
        {
            **token,
            "content": renamed.get(token["content"], token["content"]),
            "special": token["special"] or token["content"] in renamed,
        }
        for token in state["added_tokens"]
        if token["content"] not in dropped
    ]
    vocab = state["model"]["vocab"]
    for token in set(dropped) & vocab.keys():
        del vocab[token]
    for old in renamed.keys() & vocab.keys():
        vocab[renamed[old]] = vocab.pop(old)
    return Tokenizer.from_str(json.dumps(state))


def _rebuilt(tokenizer, backend: Tokenizer, pad: str | None, extra) -> PreTrainedTokenizerFast:
    kept = {
        name: getattr(tokenizer, name)
        for name in ("bos_token", "eos_token", "unk_token", "padding_side", "model_max_length")
    }
    # The first has no effect here; it is kept for to_authors.
    for name in ("legacy", "clean_up_tokenization_spaces"):
        value = getattr(tokenizer, name, tokenizer.init_kwargs.get(name))
        kept |= {} if value is None else {name: value}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, extra_special_tokens=extra, **kept
    )


def copy_sentencepiece(source: Path, folder: Path) -> bool:
    """Copy ``tokenizer.model``, which the authors' code needs and Transformers doesn't write.

    Returns:
        whether the source has one.
    """
    there = (source / "tokenizer.model").is_file()
    if there:
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    return there

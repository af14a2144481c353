"""Tokenizers of the kinds that LLaVAs have, small and made on the spot."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from voco_model.vlm.prompt import SYSTEM_WITH_IMAGE

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
CHAT = ("<|im_start|>", "<|im_end|>")
_SPACED = sorted(set("▁\n") | {chr(code) for code in range(33, 127)})
_WORDS = ["▁" + word for word in SYSTEM_WITH_IMAGE.split()]
# Pairs that a model would merge across the mark, if there were none left.
_PAIRS = [("<", "/"), ("<", "|"), ("s", ">"), ("▁", "<"), ("/", "s"), ("i", "m")]


def _fast(backend: Tokenizer, normalized: bool = False) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=normalized) for t in SPECIAL]
    )
    # As in some checkpoints: tokens of the chat form that are not called special.
    backend.add_tokens([AddedToken(token, normalized=normalized) for token in CHAT])
    bos = backend.token_to_id("<s>")
    backend.post_processor = post.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def _spaced_bpe() -> models.BPE:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *_SPACED, *map("".join, _PAIRS)])}
    return models.BPE(vocab=vocab, merges=_PAIRS, unk_token="<unk>", fuse_unk=True)


def byte_level() -> PreTrainedTokenizerFast:
    """As Qwen's and Llama 3's."""
    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [("<", "/"), ("<", "|"), ("s", ">"), ("Ġ", "<"), ("|", ">")]
    vocab = {token: i for i, token in enumerate([*letters, *map("".join, pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend)


def llama() -> LlamaTokenizer:
    """As LLaVA-1.5's: Metaspace in front of the first word, no split into words."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *_SPACED, *map("".join, _PAIRS)])}
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=_PAIRS,
        pad_token="<pad>",
        add_bos_token=True,
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in CHAT])
    return tokenizer


def legacy() -> PreTrainedTokenizerFast:
    """As Vicuna's of old: a normalizer instead, after which special tokens are looked for as well."""
    backend = Tokenizer(_spaced_bpe())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return _fast(backend)


def normalized() -> PreTrainedTokenizerFast:
    """One whose special tokens are looked for in lower case."""
    backend = Tokenizer(_spaced_bpe())
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return _fast(backend, normalized=True)


def unigram() -> PreTrainedTokenizerFast:
    """As SentencePiece's, which has control tokens among its pieces."""
    pieces = [(token, 0.0) for token in SPECIAL] + [(word, -4.0) for word in _WORDS]
    pieces += [(letter, -8.0) for letter in _SPACED]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    return _fast(backend)


ALL = {made.__name__: made for made in (byte_level, llama, legacy, normalized, unigram)}

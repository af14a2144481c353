#!/usr/bin/env bash
# transformers 5.17.0, tokenizers 0.22+: a fast tokenizer whose saved post-processor adds BOS and the end of
# sequence reports add_bos_token = False and add_eos_token = False although it adds both. Setting
# add_eos_token = False, the value that it already has, rebuilds the post-processor from these flags and
# also drops the BOS. Expected: only the end of sequence is dropped.
# Seen on 2026-12-01: [0, 2, 1] before, [2] after; with add_bos_token = True set first, [0, 2].
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.17.0
"$folder/venv/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast


def tokenizer():
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "hi": 2}, unk_token="hi"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


made = tokenizer()
flags, before = (made.add_bos_token, made.add_eos_token), made("hi").input_ids
made.add_eos_token = False
after = made("hi").input_ids
other = tokenizer()
other.add_bos_token = True
other.add_eos_token = False
kept = other("hi").input_ids
print("flags", flags, "ids", before, "after add_eos_token = False", after, "with add_bos_token first", kept)
assert (flags, before, after, kept) == ((False, False), [0, 2, 1], [2], [0, 2]), "this has changed"
PYTHON

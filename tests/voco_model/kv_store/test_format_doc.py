"""The reader printed in docs/kv_format.md reads entries, and the sizes stated there are right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.voco_kernels.kv.test_entry import llama_rope, make_entry
from voco_kernels.kv.entry import CompactKV
from voco_model.kv_store.format import encode

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "kv_format.md").read_text()
KEY = "c0" * 32


def read(path: Path) -> subprocess.CompletedProcess:
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    command = [sys.executable, "-c", program, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.bfloat16, "BF16"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_the_printed_reader_reads_an_entry_and_finds_a_flipped_bit(tmp_path, dtype, name):
    entry = make_entry(3, rope=llama_rope())
    entry = entry.quantize(dtype) if dtype.itemsize == 1 else entry.to(dtype=dtype)
    data = bytearray(b"".join(encode(entry, KEY)))
    path = tmp_path / "entry.safetensors"
    path.write_bytes(data)
    result = read(path)
    assert result.returncode == 0, result.stderr
    expected = [f"kv {name} (4, 2, 2, 3, 16)", "positions I64 (3,)", "inv_freq F32 (8,)"]
    if entry.scales is not None:
        expected.insert(1, "scales F32 (4, 2, 2, 3)")
    assert result.stdout.splitlines() == expected
    data[-1] ^= 1
    path.write_bytes(data)
    assert "AssertionError" in read(path).stderr


def test_the_size_of_an_entry_of_llava_7b_is_the_one_printed():
    kv = torch.zeros(32, 2, 32, 1, 128, dtype=torch.bfloat16)
    entry = CompactKV(kv, torch.tensor([576]), 577, rope=llama_rope(128))
    sizes = [len(part) for part in encode(entry, KEY)]
    assert sizes == [4096, 524_288, 8 + 256]
    assert "4,096 + 524,288 + 8 + 256 bytes" in DOCUMENT

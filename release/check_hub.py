"""Load the folder for the kernels hub with the hub's own package, and call the kernel.

python release/check_hub.py build/hub          # after: make hub; needs the package ``kernels``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import kernels
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what release/hub_kernel.py wrote")
    vk = kernels.get_local_kernel(parser.parse_args().folder)
    layout = vk.MaskLayout.from_lengths(vision=9, voco=2, text=5)
    q, k, v = torch.randn(3, 1, 4, layout.length, 64)
    mask = layout.materialize()[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(vk.masked_attention(q, k, v, layout), expected)
    kv = torch.randn(1, 2, 4, 1, 64)  # [layers, keys and values, heads, tokens, head_dim]
    entry = vk.CompactKV(kv, positions=torch.tensor([11]), next_position=12)
    keys, values = torch.zeros(2, 1, 8, 4, 64)  # one block of 8 slots
    vk.load_into(vk.PagedKV([(keys, values)], torch.zeros(1, 1, dtype=torch.int64)), entry, slots=0)
    assert torch.equal(keys[0, 0], kv[0, 0, :, 0]) and torch.equal(values[0, 0], kv[0, 1, :, 0])
    if "voco_kernels" in sys.modules:
        raise SystemExit("expected the kernel to import nothing from an installed voco_kernels")
    print(f"kernels {kernels.__version__}: {vk.__name__} computes what SDPA computes")


if __name__ == "__main__":
    main()

"""Blocks of the Triton kernels for 16-bit tensors, by chip. bench/tune.py writes this file.

By kernel and width (``config.width_of``): block_m, block_n, num_warps, num_stages, and where
they come from. "compiled": without spills and within the chip's shared memory, but never timed.
"""

TABLE = {
    80: {
        ("forward", 64): (64, 64, 4, 3, "compiled"),
        ("forward", 128): (128, 64, 8, 2, "compiled"),
        ("forward", 256): (64, 32, 8, 2, "compiled"),
        ("dq", 64): (64, 32, 4, 2, "compiled"),
        ("dq", 128): (64, 32, 8, 2, "compiled"),
        ("dq", 256): (32, 32, 8, 1, "compiled"),
        ("dkdv", 64): (32, 64, 4, 2, "compiled"),
        ("dkdv", 128): (32, 64, 8, 2, "compiled"),
        ("dkdv", 256): (32, 32, 8, 1, "compiled"),
    },
    89: {
        ("forward", 64): (64, 64, 4, 3, "compiled"),
        ("forward", 128): (128, 64, 8, 2, "compiled"),
        ("forward", 256): (64, 32, 8, 2, "compiled"),
        ("dq", 64): (64, 32, 4, 2, "compiled"),
        ("dq", 128): (64, 32, 8, 2, "compiled"),
        ("dq", 256): (32, 32, 8, 2, "compiled"),
        ("dkdv", 64): (32, 64, 8, 2, "compiled"),
        ("dkdv", 128): (32, 64, 8, 2, "compiled"),
        ("dkdv", 256): (32, 32, 8, 1, "compiled"),
    },
    90: {
        ("forward", 64): (64, 64, 4, 3, "compiled"),
        ("forward", 128): (64, 64, 4, 3, "NVIDIA H200, 2026-11-22"),
        ("forward", 256): (64, 64, 8, 2, "compiled"),
        ("dq", 64): (64, 64, 4, 3, "compiled"),
        ("dq", 128): (64, 64, 4, 2, "NVIDIA H200, 2026-11-22"),
        ("dq", 256): (64, 64, 8, 2, "compiled"),
        ("dkdv", 64): (64, 64, 4, 3, "compiled"),
        ("dkdv", 128): (32, 64, 4, 3, "NVIDIA H200, 2026-11-22"),
        ("dkdv", 256): (32, 32, 8, 2, "compiled"),
    },
    100: {
        ("forward", 64): (64, 64, 4, 3, "compiled"),
        ("forward", 128): (128, 64, 8, 2, "compiled"),
        ("forward", 256): (64, 32, 8, 2, "compiled"),
        ("dq", 64): (64, 32, 4, 2, "compiled"),
        ("dq", 128): (64, 32, 8, 2, "compiled"),
        ("dq", 256): (64, 64, 8, 2, "compiled"),
        ("dkdv", 64): (64, 64, 4, 2, "compiled"),
        ("dkdv", 128): (32, 64, 8, 1, "compiled"),
        ("dkdv", 256): (32, 32, 8, 1, "compiled"),
    },
    120: {
        ("forward", 64): (64, 64, 4, 3, "compiled"),
        ("forward", 128): (128, 32, 8, 2, "compiled"),
        ("forward", 256): (64, 32, 8, 2, "compiled"),
        ("dq", 64): (64, 32, 4, 2, "compiled"),
        ("dq", 128): (64, 32, 8, 2, "compiled"),
        ("dq", 256): (32, 32, 8, 1, "compiled"),
        ("dkdv", 64): (64, 32, 4, 2, "compiled"),
        ("dkdv", 128): (32, 64, 8, 2, "compiled"),
        ("dkdv", 256): (32, 32, 8, 1, "compiled"),
    },
}

"""The Triton backend: the default on CUDA, for sm_80 and later."""

from voco_kernels.attention.backends.triton.launch import backward, forward, missing, unsupported

__all__ = ["backward", "forward", "missing", "unsupported"]

"""Attention backends, one module each; their contract is in ``voco_kernels.attention.dispatch``."""

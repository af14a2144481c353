"""``MaskLayout``, which represents the attention mask, and the schedule that kernels follow."""

from voco_kernels.layout.layout import MaskLayout

__all__ = ["MaskLayout"]

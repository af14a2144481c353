"""The mask as a value: ``MaskLayout``, its constructors, and the schedule that kernels walk."""

from voco_kernels.layout.layout import MaskLayout

__all__ = ["MaskLayout"]

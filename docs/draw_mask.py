"""Draw docs/mask.png, the README's picture of the mask (``make docs`` runs this)."""

from pathlib import Path

from voco_kernels import MaskLayout

# The paper's case: an image of LLaVA-1.5, one VoCo token, its average of 114 text tokens.
MaskLayout.from_lengths(vision=576, voco=1, text=114).plot(Path(__file__).parent / "mask.png")

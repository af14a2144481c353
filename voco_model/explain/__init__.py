"""What each VoCo token looked at, and what the text took from it; see ``docs/explain.md``."""

from voco_model.explain.compute import Explanation, attention
from voco_model.explain.drawing import draw

__all__ = ["Explanation", "attention", "draw"]

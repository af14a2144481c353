"""Other ways to represent an image by fewer tokens, for comparison; see ``docs/baselines.md``."""

from voco_model.baselines.base import Method
from voco_model.baselines.cost import Cost
from voco_model.baselines.load import load
from voco_model.baselines.methods import METHODS, apply

__all__ = ["METHODS", "Cost", "Method", "apply", "load"]

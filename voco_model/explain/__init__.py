"""What each VoCo token looked at, and what the text took from it; see ``docs/explain.md``."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from voco_model.explain.compute import Explanation, attention
    from voco_model.explain.drawing import draw
else:  # the same names, for the interpreter; ``cli`` must not import PyTorch
    from voco_model.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "voco_model.explain.compute": ("Explanation", "attention"),
            "voco_model.explain.drawing": ("draw",),
        },
    )

__all__ = ["Explanation", "attention", "draw"]

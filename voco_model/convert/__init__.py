"""Checkpoints of VoCo-LLaMA's authors and of the original LLaVA, to Transformers' layout and back.

``docs/convert.md`` says what is kept, and what the authors' layout doesn't record.
"""

from voco_model.convert.from_authors import from_authors
from voco_model.convert.to_authors import to_authors

__all__ = ["from_authors", "to_authors"]

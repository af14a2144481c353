"""Hypothesis strategies for layouts."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.voco_kernels.cases import Case, Document


@st.composite
def documents(draw, longest: int = 20) -> Document:
    """Documents of at least one token: vision, text and segments in any order; spans can be empty."""
    length = st.integers(0, longest)
    spans: Document = []
    for kind in draw(st.lists(st.sampled_from(["vision", "segment", "text"]), max_size=6)):
        if kind == "segment":
            spans += [("vision", 1 + draw(length)), ("voco", draw(st.integers(0, 4)))]
        else:
            spans.append((kind, draw(length)))
    return spans if sum(size for _, size in spans) else [("text", 1)]


@st.composite
def cases(draw, longest: int = 20) -> Case:
    """Ragged batches, or documents packed into one row."""
    drawn = draw(st.lists(documents(longest), min_size=1, max_size=4))
    isolated = draw(st.booleans())
    if draw(st.booleans()):
        return Case([drawn], isolated)
    return Case(
        [[document] for document in drawn], isolated, draw(st.sampled_from(["left", "right"]))
    )

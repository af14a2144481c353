"""lmms-eval's tasks change Pillow for the whole process; other tests need it as it is."""

from __future__ import annotations

import pytest
from PIL import ImageFile

_AS_IT_WAS = ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.fixture(autouse=True)
def strict_pillow():
    """Importing a task may set ``LOAD_TRUNCATED_IMAGES``: half an image would then be no error."""
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES = _AS_IT_WAS

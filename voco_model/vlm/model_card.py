"""The README.md of a saved checkpoint, which says that ``from_pretrained`` alone is not enough."""

from __future__ import annotations

import json
import os
from pathlib import Path

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- voco
---

# A LLaVA that reads images through VoCo tokens

Load it with

```python
import voco_model

model, processor = voco_model.load("path/to/this/folder")
```

or, after `from_pretrained`, call `voco_model.enable(model, processor)` before anything else.

**`from_pretrained` alone is not enough.** The model was trained with text that sees an image only
through its {tokens}. Without `enable` (from the package voco-kernels) the text sees the whole image.
Nothing fails, but the answers are worse than this model's own. The same goes for
`transformers.pipeline` and for servers that don't know VoCo tokens.
"""


def write_model_card(folder: str | os.PathLike) -> None:
    """Write ``README.md`` into a checkpoint's folder, unless there is one, or the config has a
    ``voco_baseline`` and the model is not to be enabled."""
    card, config = Path(folder) / "README.md", Path(folder) / "config.json"
    facts = json.loads(config.read_text()) if config.is_file() else {}
    if card.exists() or facts.get("voco_baseline"):
        return
    count = facts.get("num_voco")
    tokens = "VoCo tokens" if count is None else f"VoCo tokens ({count} per image)"
    card.write_text(_CARD.format(tokens=tokens))

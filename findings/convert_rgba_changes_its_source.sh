#!/usr/bin/env bash
# Pillow 13.0.0: convert("RGBA") of a palette image with a transparent entry changes the image that it is
# called on: the source's palette becomes RGBA in memory, with that entry's alpha. Code that hashes or
# compares getpalette("RGBA") gets a different value after the call. Expected: convert does not change its source.
# Seen on 2026-12-01: RGB palette, alpha 255 before; RGBA palette, alpha 0 after.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
from PIL import Image

image = Image.new("P", (2, 1))
image.putpalette([10, 20, 30, 40, 50, 60])
image.info["transparency"] = 0


def palette():
    return image.im.getpalettemode(), image.getpalette("RGBA")[:4]


before = palette()
image.convert("RGBA")
after = palette()
print("before", before, "after", after)
assert (before, after) == (("RGB", [10, 20, 30, 255]), ("RGBA", [10, 20, 30, 0])), "this has changed"
PYTHON

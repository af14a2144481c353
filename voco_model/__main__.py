"""``python -m voco_model``; see ``cli.py``."""

from voco_model.cli import run

run()

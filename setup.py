"""Everything about the package stands in pyproject.toml; a CUDA extension would be built here."""

from setuptools import setup

setup()

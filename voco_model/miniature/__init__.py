"""A LLaVA trained from nothing, to see what compression costs in quality: ``docs/quality.md``."""

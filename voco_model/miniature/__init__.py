"""A small LLaVA trained from scratch, to measure what compression costs in quality (docs/quality.md)."""

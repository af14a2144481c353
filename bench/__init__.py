"""Benchmarks: commands at the top, a folder for each benchmark, and ``harness`` for what they share."""

"""The paper's benchmarks through lmms-eval: ``run.evaluate``, or ``python -m voco_model eval``."""

"""The entry point ``lmms_eval.models``, by which ``lmms-eval --model voco`` finds ``LMMSModel``."""

from __future__ import annotations


def manifests() -> list:
    """The manifest for lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id="voco", simple_class_path="voco_model.evaluate.lmms_model.LMMSModel")
    ]

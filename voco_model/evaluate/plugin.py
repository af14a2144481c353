"""The entry point ``lmms_eval.models``: what makes ``lmms-eval --model voco`` find ``LMMSModel``."""

from __future__ import annotations


def manifests() -> list:
    """The manifest that lmms-eval's registry asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id="voco", simple_class_path="voco_model.evaluate.lmms_model.LMMSModel")
    ]

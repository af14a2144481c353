"""VoCo attention in Hugging Face LLaVA models: training under the mask, inference in two passes.

Importing the package imports neither PyTorch nor Transformers; each name below does on first use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from voco_kernels import CompactKV, extract, load_into
    from voco_model.engine import Answer, Request, RequestError, Sampling, TwoPassEngine
    from voco_model.kv_store import KVStore, open_store
    from voco_model.pictures import PictureError, PictureLimits
    from voco_model.vlm.attach import Enabled, enable
    from voco_model.vlm.compress import compress
    from voco_model.vlm.fingerprint import fingerprint
    from voco_model.vlm.generate import generate
    from voco_model.vlm.image_key import image_key
    from voco_model.vlm.load import load
    from voco_model.vlm.prompt import chat_template, prompt
else:  # the same names, for the interpreter
    from voco_model.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "voco_kernels": ("CompactKV", "extract", "load_into"),
            "voco_model.engine": ("Answer", "Request", "RequestError", "Sampling", "TwoPassEngine"),
            "voco_model.kv_store": ("KVStore", "open_store"),
            "voco_model.pictures": ("PictureError", "PictureLimits"),
            "voco_model.vlm.attach": ("Enabled", "enable"),
            "voco_model.vlm.compress": ("compress",),
            "voco_model.vlm.fingerprint": ("fingerprint",),
            "voco_model.vlm.generate": ("generate",),
            "voco_model.vlm.image_key": ("image_key",),
            "voco_model.vlm.load": ("load",),
            "voco_model.vlm.prompt": ("chat_template", "prompt"),
        },
    )

__all__ = [
    "Answer",
    "CompactKV",
    "Enabled",
    "KVStore",
    "PictureError",
    "PictureLimits",
    "Request",
    "RequestError",
    "Sampling",
    "TwoPassEngine",
    "chat_template",
    "compress",
    "enable",
    "extract",
    "fingerprint",
    "generate",
    "image_key",
    "load",
    "load_into",
    "open_store",
    "prompt",
]
__version__ = "0.1.0"

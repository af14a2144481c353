"""VoCo attention in Hugging Face LLaVA models: training under the mask, inference in two passes."""

from voco_kernels import CompactKV, extract, load_into
from voco_model.engine import Answer, Request, RequestError, Sampling, TwoPassEngine
from voco_model.kv_store import KVStore
from voco_model.pictures import PictureError, PictureLimits
from voco_model.vlm.attach import Enabled, enable
from voco_model.vlm.compress import compress
from voco_model.vlm.fingerprint import fingerprint
from voco_model.vlm.generate import generate
from voco_model.vlm.image_key import image_key
from voco_model.vlm.load import load
from voco_model.vlm.prompt import chat_template, prompt

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
    "prompt",
]

"""VoCo attention in Hugging Face LLaVA models: training under the mask, inference in two passes."""

from voco_kernels.kv import CompactKV
from voco_kernels.kv_load import extract, load_into
from voco_model.attach import Enabled, enable
from voco_model.engine import Answer, Request, RequestError, Sampling, TwoPassEngine
from voco_model.fingerprint import fingerprint
from voco_model.image_key import image_key
from voco_model.kv_store import KVStore
from voco_model.load import load
from voco_model.pictures import PictureError, PictureLimits
from voco_model.prompt import chat_template, prompt
from voco_model.two_pass import compress, generate

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

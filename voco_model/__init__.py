"""VoCo attention in Hugging Face LLaVA models: training under the mask, inference in two passes."""

from voco_kernels.kv import CompactKV
from voco_model.attach import Enabled, enable
from voco_model.prompt import chat_template, prompt
from voco_model.two_pass import compress, generate

__all__ = ["CompactKV", "Enabled", "chat_template", "compress", "enable", "generate", "prompt"]

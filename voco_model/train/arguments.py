"""``TrainingArguments`` of a run: Table 1 of the supplement, and how the model is sharded."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_torch_bf16_gpu_available

from voco_model.train.config import TrainConfig
from voco_model.train.model import layer_classes
from voco_model.vlm.load import model_class


def check_arguments(config: TrainConfig) -> None:
    """Check what a run needs beside its model and data, before either is read.

    Raises:
        ValueError: a name in ``trainer`` that ``TrainingArguments`` doesn't have; an unknown place to
            report to; Liger with a LLaVA-1.6.
        ModuleNotFoundError: a package that the configuration needs isn't installed.
    """
    known = set(inspect.signature(TrainingArguments).parameters)
    unknown = sorted(set(config.trainer) - known)
    if unknown:
        raise ValueError(
            f"expected names of transformers.TrainingArguments in trainer, got {', '.join(unknown)}"
        )
    _check_reporting(config.trainer.get("report_to"))
    if config.sharding == "zero3":
        _check_package("deepspeed", "deepspeed", "sharding: zero3", "set sharding: fsdp2 or none")
    if config.lora is not None:
        _check_package("peft", "train", "lora", "set lora: null")
    if config.liger:
        _check_package("liger_kernel", "liger", "liger: true", "set liger: false")
        if model_class(config.model) is not LlavaForConditionalGeneration:
            raise ValueError(
                "expected liger: false for a LLaVA-1.6, which Liger's kernels don't support, got true"
            )


def _check_package(name: str, extra: str, setting: str, otherwise: str) -> None:
    if find_spec(name) is None:
        raise ModuleNotFoundError(
            f"expected the package {name} for {setting}, found none; pip install "
            f"'voco-kernels[{extra}]', or {otherwise}"
        )


def _check_reporting(report_to: str | list[str] | None) -> None:
    """Raise unless all of ``trainer.report_to`` is known to Transformers and installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    available = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all") and len(names) == 1:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"expected trainer.report_to as one of none, all, {', '.join(INTEGRATION_TO_CALLBACK)}, "
                f"got {name}"
            )
        if name not in available:
            usable = f" (installed here: {', '.join(available)})" if available else ""
            raise ModuleNotFoundError(
                f"expected the package that trainer.report_to: {name} needs, found none; install it, or "
                f"set report_to: none{usable}"
            )


def missing_device(config: TrainConfig) -> str | None:
    """What this machine's devices lack for the run; None if it can be trained here."""
    if config.trainer.get("use_cpu"):
        return None
    if not torch.accelerator.is_available():
        return (
            "expected a GPU, PyTorch found none; to train on the CPU set trainer: {use_cpu: true}, "
            "and best sharding: none and dtype: float32 (see configs/miniature-cpu.yaml)"
        )
    if config.dtype == "bfloat16" and not is_torch_bf16_gpu_available():
        return (
            "expected a GPU that computes in bfloat16, found none; set dtype: float16 or float32, or "
            "train on the CPU with trainer: {use_cpu: true}"
        )
    return None


def training_arguments(config: TrainConfig, accumulation: int) -> TrainingArguments:
    """The Trainer's arguments, for a configuration that ``check_arguments`` accepts.

    Args:
        accumulation: micro-batches per rank and step.
    """
    optimizer = config.optimizer
    defaults: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 1,
        "logging_first_step": True,
        "disable_tqdm": True,  # Meter draws the bar
        "tf32": None,
        "average_tokens_across_devices": True,
    }
    return TrainingArguments(
        **defaults | config.trainer,
        **_sharding(config),
        output_dir=str(config.output),
        per_device_train_batch_size=1 if config.batch.packed else config.batch.rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=optimizer.scheduler,
        warmup_steps=optimizer.warmup,  # a float below 1 is a share of the steps
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        num_train_epochs=optimizer.epochs,
        max_steps=optimizer.steps or -1,
        optim=optimizer.name,
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        torch_compile=config.compile,
        use_liger_kernel=config.liger,
        save_strategy="steps" if config.checkpoints.every else "no",
        save_steps=config.checkpoints.every or 1,
        save_total_limit=None,  # checkpoints.rotate deletes, once the newer one is complete
        ignore_data_skip=config.data.streaming,  # StreamedBatches skips without decoding images
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
    )


def _sharding(config: TrainConfig) -> dict[str, Any]:
    if config.sharding == "zero3":
        return {"deepspeed": zero3()}
    if config.sharding == "fsdp2":
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": layer_classes(config.model),
                "reshard_after_forward": True,
                "state_dict_type": "SHARDED_STATE_DICT",  # resumes on any number of GPUs
            },
        }
    return {}


def zero3() -> dict[str, Any]:
    """DeepSpeed's configuration; the Trainer fills in ``auto`` from its arguments."""
    return {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,  # needed to write safetensors
        },
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # PyTorch's AdamW, which needs no compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }

"""``TrainingArguments`` of a run: Table 1 of the supplement, and how the model is sharded."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import LlavaForConditionalGeneration, TrainingArguments

from voco_model.train.config import TrainConfig
from voco_model.train.model import layer_classes
from voco_model.vlm.load import model_class


def training_arguments(config: TrainConfig, accumulation: int) -> TrainingArguments:
    """What the Trainer is told.

    Args:
        accumulation: micro-batches of a rank in a step.

    Raises:
        ValueError: a name in ``trainer`` that ``TrainingArguments`` doesn't have.
        ModuleNotFoundError: ZeRO-3 without DeepSpeed.
    """
    known = set(inspect.signature(TrainingArguments).parameters)
    unknown = sorted(set(config.trainer) - known)
    if unknown:
        raise ValueError(
            f"expected names of transformers.TrainingArguments in trainer, got {', '.join(unknown)}"
        )
    if config.liger and model_class(config.model) is not LlavaForConditionalGeneration:
        raise ValueError(
            "expected liger: false with a LLaVA-1.6, which Liger's kernels don't know, got true"
        )
    optimizer = config.optimizer
    defaults: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 1,
        "logging_first_step": True,
        "disable_tqdm": True,  # there is a bar of our own
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
        warmup_steps=optimizer.warmup,  # a float is a share
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
        save_total_limit=None,  # done by checkpoints.rotate, once the newer one is whole
        ignore_data_skip=config.data.streaming,  # StreamedBatches skips without reading images
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
    )


def _sharding(config: TrainConfig) -> dict[str, Any]:
    if config.sharding == "zero3":
        try:
            import deepspeed  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "expected the package deepspeed for sharding: zero3; pip install "
                "'voco-kernels[deepspeed]', or set sharding: fsdp2 or none"
            ) from error
        return {"deepspeed": zero3()}
    if config.sharding == "fsdp2":
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": layer_classes(config.model),
                "reshard_after_forward": True,
                "state_dict_type": "SHARDED_STATE_DICT",  # any number of GPUs can go on from it
            },
        }
    return {}


def zero3() -> dict[str, Any]:
    """DeepSpeed's configuration; ``auto`` is filled in from ``TrainingArguments``."""
    return {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,  # else no safetensors are written
        },
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # PyTorch's AdamW, which needs nothing to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }

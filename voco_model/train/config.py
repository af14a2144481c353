"""What a training run is: one YAML file. Defaults are Table 1 of the supplement."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from voco_model.data.faults import FaultPolicy
from voco_model.pictures import WHITE, PictureLimits
from voco_model.vlm.prompt import STYLES


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Channel = Annotated[int, Field(ge=0, le=255)]


class SourceConfig(_Section):
    """Attributes:
    path: a ``.json``, ``.jsonl`` or ``.parquet``, or a data set's name on the hub.
    images: folder of the images, for names that are relative.
    split: of a data set.
    max_frames: of a video.
    """

    path: str
    images: Path = Path(".")
    split: str = "train"
    max_frames: int = Field(8, ge=1)


class DataConfig(_Section):
    """Attributes:
    sources: files and data sets, one after the other.
    max_length: tokens of a sample, image tokens included.
    streaming: read a data set of the hub as a stream; needs ``optimizer.steps``.
    faults: what to do about samples that can't be used, by kind (``voco_model.data.faults.KINDS``).
    workers: processes that read and process images, for each GPU.
    ground: red, green and blue, 0 to 255, that transparent pixels are shown on; the trained model
        remembers it.
    limits: what an image may cost (``voco_model.PictureLimits``); one beyond is a ``broken_image``.
    """

    sources: list[SourceConfig] = Field(min_length=1)
    max_length: int = Field(2048, ge=8)
    streaming: bool = False
    faults: dict[str, str] | str = Field(default_factory=dict)
    workers: int = Field(4, ge=0)
    ground: tuple[Channel, Channel, Channel] = WHITE
    limits: PictureLimits = PictureLimits()

    @field_validator("faults")
    @classmethod
    def _known(cls, value):
        FaultPolicy(value)
        return value


class VoCoConfig(_Section):
    """Attributes:
    tokens: VoCo tokens an image. Of several numbers each step draws one, so that one model serves
        many budgets (beyond the paper, whose section 5 names this a limitation).
    distinct: an embedding row for each VoCo token; the paper has one for all.
    isolated: several images of a sample don't see each other.
    """

    tokens: int | list[int] = 1
    distinct: bool = False
    isolated: bool = False

    @field_validator("tokens")
    @classmethod
    def _positive(cls, value):
        numbers = [value] if isinstance(value, int) else value
        if not numbers or min(numbers) < 1:
            raise ValueError(f"expected numbers of VoCo tokens from 1 on, got {value}")
        return value

    @property
    def choices(self) -> list[int]:
        return [self.tokens] if isinstance(self.tokens, int) else self.tokens

    @property
    def most(self) -> int:
        return max(self.choices)


class BatchConfig(_Section):
    """Attributes:
    global_size: samples in a step of the optimizer, over all GPUs.
    packed: documents in one row without padding; else rows padded to the longest.
    max_tokens: of a packed row, for each GPU.
    rows: of a padded batch, for each GPU.
    """

    global_size: int = Field(128, ge=1)
    packed: bool = True
    max_tokens: int = Field(8192, ge=1)
    rows: int = Field(8, ge=1)


class OptimizerConfig(_Section):
    """Attributes:
    warmup: share of the steps.
    steps: end after so many, whatever ``epochs`` says.
    """

    learning_rate: float = Field(2e-5, gt=0)
    scheduler: str = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    epochs: int = Field(2, ge=1)
    steps: int | None = Field(None, ge=1)
    name: str = "adamw_torch"


class LoRAConfig(_Section):
    """Attributes:
    targets: module names of the language model.
    """

    r: int = Field(128, ge=1)
    alpha: int = Field(256, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[str] = [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip


class CheckpointConfig(_Section):
    """Attributes:
    every: steps; 0 for none before the end.
    keep: so many of the newest; the others are deleted once a newer one is complete.
    resume: go on from the newest complete one, if there is any.
    """

    every: int = Field(500, ge=0)
    keep: int = Field(2, ge=1)
    resume: bool = True


class TrainConfig(_Section):
    """A training run. ``voco_model.train.train(config)`` runs it.

    Attributes:
        model: folder or name of a LLaVA in the Hugging Face layout.
        output: folder for checkpoints and, at the end, the model.
        prompt: a name of ``voco_model.vlm.prompt.STYLES``.
        dtype: of the computation. Weights are kept in float32 but for LoRA's frozen ones.
        sharding: of weights, gradients and optimizer state: ``"zero3"`` (DeepSpeed, as the paper),
            ``"fsdp2"`` (can go on with another number of GPUs), or ``"none"``.
        train_vision_tower: it is frozen otherwise.
        gradient_checkpointing, compile, liger: as in Transformers; they go together with the mask.
        trainer: anything else that ``transformers.TrainingArguments`` takes.
    """

    model: str
    output: Path
    data: DataConfig
    voco: VoCoConfig = VoCoConfig()
    prompt: str = "vicuna"
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoRAConfig | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    sharding: Literal["zero3", "fsdp2", "none"] = "zero3"
    train_vision_tower: bool = False
    gradient_checkpointing: bool = True
    compile: bool = False
    liger: bool = False
    checkpoints: CheckpointConfig = CheckpointConfig()
    seed: int = 42
    trainer: dict[str, Any] = Field(default_factory=dict)

    @field_validator("prompt")
    @classmethod
    def _style(cls, value):
        if value not in STYLES:
            raise ValueError(f"expected a prompt style of {', '.join(STYLES)}, got {value!r}")
        return value

    @model_validator(mode="after")
    def _lora_is_whole(self):
        if self.lora is not None and self.sharding != "none":
            raise ValueError(
                f"expected sharding: none with lora, got {self.sharding}; merging adapters at the end "
                "takes the whole model on each GPU"
            )
        if self.lora is not None and self.train_vision_tower:
            raise ValueError("expected train_vision_tower: false with lora, got true; choose one")
        return self

    @field_validator("trainer")
    @classmethod
    def _not_ours(cls, value):
        taken = sorted(set(value) & set(OURS))
        if taken:
            said = ", ".join(f"{name} (set {OURS[name]})" for name in taken)
            raise ValueError(f"expected arguments that have no key of their own, got {said}")
        return value


# TrainingArguments that follow from the keys above.
OURS = {
    "output_dir": "output",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "batch.global_size",
    "learning_rate": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.scheduler",
    "warmup_steps": "optimizer.warmup",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_grad_norm",
    "num_train_epochs": "optimizer.epochs",
    "max_steps": "optimizer.steps",
    "optim": "optimizer.name",
    "bf16": "dtype",
    "fp16": "dtype",
    "deepspeed": "sharding",
    "fsdp": "sharding",
    "fsdp_config": "sharding",
    "gradient_checkpointing": "gradient_checkpointing",
    "torch_compile": "compile",
    "use_liger_kernel": "liger",
    "save_steps": "checkpoints.every",
    "save_strategy": "checkpoints.every",
    "save_total_limit": "checkpoints.keep",
    "ignore_data_skip": "data.streaming",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "seed": "seed",
    "data_seed": "seed",
    "dataloader_num_workers": "data.workers",
    "remove_unused_columns": "nothing: batches need all of theirs",
}


def load_config(path: str | os.PathLike, **changes: Any) -> TrainConfig:
    """Read a YAML file.

    Args:
        changes: top-level keys that replace the file's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, or keys and values that a run doesn't have; all of them are named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"expected a YAML file, got {path}, which isn't there; see configs/"
        )
    try:
        read = yaml.safe_load(Path(path).read_bytes())  # which reads byte order marks
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML in {path}, got {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"expected keys and values in {path}, got {type(read).__name__}")
    return make_config(read | changes, str(path))


def make_config(values: dict[str, Any], name: str = "the configuration") -> TrainConfig:
    """As ``load_config``, from a dict."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(map(str, problem["loc"]))
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = f"expected {_known_keys(problem['loc'][:-1])}, got another key"
            lines.append(f"    {where}: {message}")
        raise ValueError(f"expected a training run in {name}, got\n" + "\n".join(lines)) from error


def _known_keys(location: tuple) -> str:
    section: type[BaseModel] = TrainConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return "one of " + ", ".join(section.model_fields)

"""The configuration of a training run, one YAML file. Defaults are Table 1 of the supplement."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from voco_model.data.faults import FaultPolicy
from voco_model.devices import available_cpus
from voco_model.pictures import WHITE, PictureLimits
from voco_model.vlm.prompt import STYLES


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_MOST_WORKERS = 4
Channel = Annotated[int, Field(ge=0, le=255)]


class SourceConfig(_Section):
    """Attributes:
    path: a ``.json``, ``.jsonl`` or ``.parquet``, or the name of a data set on the hub.
    images: folder that relative names of images start from.
    split: which split of a data set.
    max_frames: how many frames of a video are used.
    """

    path: str
    images: Path = Path(".")
    split: str = "train"
    max_frames: int = Field(8, ge=1)


class DataConfig(_Section):
    """Attributes:
    sources: files and data sets, one after the other.
    max_length: most tokens of a sample, image tokens included.
    streaming: read a data set of the hub as a stream; needs ``optimizer.steps``.
    faults: what to do with unusable samples, by kind (``voco_model.data.faults.KINDS``).
    workers: processes that read and prepare images, per GPU; by default 4, or as many as there are
        cores for each GPU if that is less.
    ground: color (red, green, blue, 0 to 255) behind transparent pixels, saved with the trained model.
    limits: largest images accepted (``voco_model.PictureLimits``); larger ones are a ``broken_image``.
    """

    sources: list[SourceConfig] = Field(min_length=1)
    max_length: int = Field(2048, ge=8)
    streaming: bool = False
    faults: dict[str, str] | str = Field(default_factory=dict)
    workers: int | None = Field(None, ge=0)
    ground: tuple[Channel, Channel, Channel] = WHITE
    limits: PictureLimits = PictureLimits()

    @field_validator("faults")
    @classmethod
    def _known(cls, value):
        FaultPolicy(value)
        return value

    @property
    def num_workers(self) -> int:
        """``workers``, or its default on this machine."""
        if self.workers is not None:
            return self.workers
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(_MOST_WORKERS, max(available_cpus() // processes, 1))


class VoCoConfig(_Section):
    """Attributes:
    tokens: VoCo tokens per image. From a list, each step draws one, so that one model serves several
        budgets (an extension: the paper's section 5 names a fixed number as a limitation).
    distinct: give each VoCo token its own embedding row; the paper uses one row for all.
    isolated: hide the images of a sample from each other.
    """

    tokens: int | list[int] = 1
    distinct: bool = False
    isolated: bool = False

    @field_validator("tokens")
    @classmethod
    def _positive(cls, value):
        numbers = [value] if isinstance(value, int) else value
        if not numbers or min(numbers) < 1:
            raise ValueError(f"expected at least 1 VoCo token, got {value}")
        return value

    @property
    def choices(self) -> list[int]:
        return [self.tokens] if isinstance(self.tokens, int) else self.tokens

    @property
    def most(self) -> int:
        return max(self.choices)


class BatchConfig(_Section):
    """Attributes:
    global_size: samples per step of the optimizer, over all GPUs.
    packed: pack samples into one row without padding; else pad rows to the longest.
    max_tokens: most tokens of a packed row, per GPU.
    rows: rows of a padded batch, per GPU.
    """

    global_size: int = Field(128, ge=1)
    packed: bool = True
    max_tokens: int = Field(8192, ge=1)
    rows: int = Field(8, ge=1)


class OptimizerConfig(_Section):
    """Attributes:
    warmup: share of the steps over which the learning rate rises.
    steps: stop after this many steps; overrides ``epochs``.
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
    targets: names of the language model's modules that get adapters.
    """

    r: int = Field(128, ge=1)
    alpha: int = Field(256, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[str] = [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip


class CheckpointConfig(_Section):
    """Attributes:
    every: steps between checkpoints; 0 for none.
    keep: how many of the newest to keep; older ones are deleted once a newer one is complete.
    resume: resume from the newest complete checkpoint, if there is one.
    """

    every: int = Field(500, ge=0)
    keep: int = Field(2, ge=1)
    resume: bool = True


class TrainConfig(_Section):
    """A training run. ``voco_model.train.train(config)`` runs it.

    Attributes:
        model: folder or name of a LLaVA in the Hugging Face layout.
        output: folder for checkpoints and the trained model.
        prompt: style of prompts, a name in ``voco_model.vlm.prompt.STYLES``.
        dtype: dtype of the computation. Weights stay in float32, except LoRA's frozen ones.
        sharding: how weights, gradients and optimizer state are sharded: ``"zero3"`` (DeepSpeed, as in
            the paper), ``"fsdp2"`` (resumes on any number of GPUs), or ``"none"``.
        train_vision_tower: train the vision tower too, instead of freezing it.
        gradient_checkpointing, compile, liger: as in Transformers; all work with the mask.
        trainer: further arguments of ``transformers.TrainingArguments``.
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
            raise ValueError(f"expected a prompt style among {', '.join(STYLES)}, got {value!r}")
        return value

    @model_validator(mode="after")
    def _lora_is_whole(self):
        if self.lora is not None and self.sharding != "none":
            raise ValueError(
                f"expected sharding: none with lora, got {self.sharding}; merging the adapters at the "
                "end needs the whole model on each GPU"
            )
        if self.lora is not None and self.train_vision_tower:
            raise ValueError(
                "expected train_vision_tower: false with lora, got true; drop one of them"
            )
        return self

    @field_validator("trainer")
    @classmethod
    def _not_ours(cls, value):
        taken = sorted(set(value) & set(OURS))
        if taken:
            said = ", ".join(f"{name} (set {OURS[name]})" for name in taken)
            raise ValueError(f"expected arguments without a key of their own, got {said}")
        return value


# TrainingArguments that the keys above decide.
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
    "remove_unused_columns": "nothing: batches need all of their columns",
}


def load_config(path: str | os.PathLike, **changes: Any) -> TrainConfig:
    """Read a YAML file.

    Args:
        changes: values for top-level keys, in place of those in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or unknown keys and wrong values, all of which are named.
    """
    if not Path(path).is_file():
        got = "a folder" if Path(path).is_dir() else "no such file"
        raise FileNotFoundError(f"expected a YAML file, got {got}: {path}; see configs/")
    try:
        read = yaml.safe_load(
            Path(path).read_bytes()
        )  # bytes, so that YAML reads a byte order mark
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a YAML file, got {path}: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(
            f"expected a YAML file with keys and values, got {type(read).__name__} in {path}"
        )
    return make_config(read | changes, str(path))


def make_config(values: dict[str, Any], name: str = "the configuration") -> TrainConfig:
    """Like ``load_config``, but from a dict. ``name`` says in errors where the values are from."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(map(str, problem["loc"]))
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = f"expected {_known_keys(problem['loc'][:-1])}, got an unknown key"
            lines.append(f"    {where}: {message}")
        raise ValueError(f"expected a training run in {name}, got:\n" + "\n".join(lines)) from error


def _known_keys(location: tuple) -> str:
    section: type[BaseModel] = TrainConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return "one of " + ", ".join(section.model_fields)

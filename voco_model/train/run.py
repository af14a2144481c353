"""``train``: from a configuration to a trained model that ``voco_model.load`` reads."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.utils.data import IterableDataset
from transformers import AutoConfig, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from voco_model.data.faults import FaultLog, FaultPolicy, listed
from voco_model.train import checkpoints
from voco_model.train.arguments import check_arguments, missing_device, training_arguments
from voco_model.train.batches import Batches, make_batches
from voco_model.train.config import TrainConfig
from voco_model.train.flops import WorkPerBatch
from voco_model.train.messages import Messages, counted, quiet
from voco_model.train.model import build_model, parts_of
from voco_model.train.progress import Meter
from voco_model.train.trainer import VoCoTrainer
from voco_model.vlm.attach import name_tokens
from voco_model.vlm.load import load_processor, model_class
from voco_model.vlm.processor_check import check_processor


def train(
    config: TrainConfig, *, callbacks: Sequence[TrainerCallback] = (), dry_run: bool = False
) -> Path | None:
    """Train a LLaVA under the VoCo mask; on several GPUs, called on each by ``torchrun``.

    Resumes from the newest complete checkpoint in ``config.output``, if it belongs to the same run.

    Args:
        callbacks: further callbacks for the Trainer.
        dry_run: check configuration and data, print what a run would do, and return.

    Returns:
        the folder of the trained model, ``config.output / "model"``; None for a dry run.

    Raises:
        TypeError: a model that ``enable`` doesn't take.
        ValueError: data, batches or a checkpoint that don't fit together, or no GPU for a run that needs
            one.
        ModuleNotFoundError: a package that the configuration needs isn't installed.
        OSError: too little disk space for a checkpoint; earlier checkpoints are untouched.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = Messages(rank)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # samples are read in parallel already
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"expected a folder as output, got a file: {config.output}; name another")
    check_arguments(config)
    missing = missing_device(config)
    if missing is not None and not dry_run:
        raise ValueError(missing)
    model_class(config.model)  # refuses other models before the data are read
    processor = load_processor(config.model)
    check_processor(processor, AutoConfig.from_pretrained(config.model), config.prompt)
    name_tokens(processor.tokenizer, config.voco.most if config.voco.distinct else 1)
    with quiet():
        batches = make_batches(
            config, processor, rank=rank, world_size=world_size, progress=say.progress
        )
        _say_batches(say, config, batches, world_size)
        facts = _facts(config, batches, world_size)
        resumed = _resumed(config, facts)
        if dry_run:
            if missing is not None:
                say(f"this machine can't train it: {missing}")
            return None
        done = 0 if resumed is None else checkpoints.step_of(resumed)
        target = config.output / "model"
        if (
            config.optimizer.steps is not None
            and done >= config.optimizer.steps
            and target.is_dir()
        ):
            say(f"all {counted(done, 'step')} are done; the model is in {target}")
            return target
        if rank == 0:
            config.output.mkdir(parents=True, exist_ok=True)
            written = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            (config.output / "train.yaml").write_text(written)
        arguments = _start_processes(say, config, batches, world_size)
        _check_shared(config.output, resumed)
        set_seed(config.seed)
        trainer = _make_trainer(say, config, processor, batches, arguments, facts, resumed, rank)
        for callback in callbacks:
            trainer.add_callback(callback)
        if resumed is not None:
            say(f"resuming from {resumed}")
            if isinstance(batches.loader.dataset, IterableDataset):
                batches.loader.dataset.skip = done * batches.accumulation
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        saved = _save(trainer, processor, config)
    if trainer.meter.left_out:
        say(
            f"skipped or cut while training: {trainer.meter.left_out}; see "
            f"{config.output}/left-out-*.jsonl"
        )
    say(f"the model is in {saved}")
    return saved


def _start_processes(
    say: Messages, config: TrainConfig, batches: Batches, world_size: int
) -> TrainingArguments:
    """The Trainer's arguments, once this process has joined the other ranks."""
    if config.trainer.get("use_cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it found no GPU
    if config.sharding == "zero3" and world_size == 1:
        # DeepSpeed needs a launcher's variables even for one process.
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**launched, "MASTER_PORT": "29500"}.items():
            os.environ.setdefault(name, value)
    arguments = training_arguments(config, batches.accumulation)
    say(f"on {arguments.device}")  # reading the device joins the other ranks
    # On a machine with several GPUs, one process alone would split each batch among them.
    arguments._n_gpu = 1
    if config.sharding == "zero3":
        import deepspeed

        deepspeed.init_distributed()  # shards weights as they are loaded; no-op if the above did it
    return arguments


def _make_trainer(
    say: Messages,
    config: TrainConfig,
    processor,
    batches: Batches,
    arguments: TrainingArguments,
    facts: dict[str, Any],
    resumed: Path | None,
    rank: int,
) -> VoCoTrainer:
    """Load the model, print what is trained of it, and hand it to a Trainer."""
    model = build_model(config, processor, _weights_dtype(config))
    say(f"{config.model}: {type(model).__name__}")
    for part in parts_of(model):
        trained = "frozen" if not part.trained else f"{part.trained / 1e6:,.2f} M trained"
        say(f"  {part.name:<15}{part.total / 1e6:>12,.2f} M  {trained}")
    mark = {} if resumed is None else checkpoints.read_mark(resumed)
    meter = Meter(
        WorkPerBatch.of(
            model, lora=config.lora is not None, tower_trained=config.train_vision_tower
        ),
        FaultPolicy(config.data.faults),
        FaultLog(config.output / f"left-out-{rank}.jsonl", resume=resumed is not None),
        samples=mark.get("samples", 0),
        bar=sys.stderr.isatty(),
    )
    trainer = VoCoTrainer(
        model=model,
        args=arguments,
        data_collator=lambda batch: batch,
        processing_class=processor,
        loader=batches.loader,
        meter=meter,
        keep=config.checkpoints.keep,
        facts=facts,
    )
    trainer.remove_callback(PrinterCallback)  # the meter prints instead
    return trainer


def _check_shared(output: Path, resumed: Path | None) -> None:
    """Raise ``ValueError`` if the ranks don't share one output folder; a collective call.

    Rank 0 declares a checkpoint complete, so it must see the shards of all ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    token = [f"{os.getpid()} {time.time_ns()}", None if resumed is None else resumed.name]
    dist.broadcast_object_list(token)
    if dist.get_rank() == 0:
        (output / "run").write_text(token[0])
    dist.barrier()
    seen = (output / "run").read_text() if (output / "run").is_file() else None
    ours = None if resumed is None else resumed.name
    if seen != token[0] or ours != token[1]:
        raise ValueError(
            f"expected an output folder that all ranks share, got another {output} on rank "
            f"{dist.get_rank()}; put it on a disk that all nodes see"
        )


def _weights_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of the loaded weights: bf16's 8 bits would lose most of AdamW's steps at 2e-5."""
    # DeepSpeed keeps float32 copies for the optimizer; LoRA's frozen weights are never stepped.
    if config.sharding == "zero3" or config.lora is not None:
        return getattr(torch, config.dtype)
    return torch.float32


def _facts(config: TrainConfig, batches: Batches, world_size: int) -> dict[str, Any]:
    """What must be the same before and after a resume."""
    return {
        "world_size": world_size,
        "sharding": config.sharding,
        "model": config.model,
        "global_size": config.batch.global_size,
        "data": batches.digest,
        "seed": config.seed,
        "voco": config.voco.model_dump(mode="json"),
        "prompt": config.prompt,
        "optimizer": config.optimizer.model_dump(mode="json"),
        "lora": None if config.lora is None else config.lora.model_dump(mode="json"),
        "train_vision_tower": config.train_vision_tower,
    }


def _resumed(config: TrainConfig, facts: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, or None."""
    if not config.checkpoints.resume:
        left = checkpoints.folders(config.output)
        if left:
            raise ValueError(
                f"expected no checkpoints with checkpoints.resume: false, got {left[0]}; choose another "
                "output, or delete them"
            )
        return None
    newest = checkpoints.newest(config.output)
    if newest is None:
        return None
    mark = checkpoints.read_mark(newest)
    before, now = _flat({name: mark.get(name) for name in facts}), _flat(facts)
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if config.sharding != "zero3" and "world_size" in differing:  # only ZeRO-3's shards need it
        differing.remove("world_size")
    if differing:
        values = {n: f"{before.get(n)} before, {now.get(n)} now" for n in differing}
        if "data" in values:  # a digest says nothing to a reader
            values["data"] = "other samples, or samples of other lengths"
        said = "; ".join(f"{name}: {value}" for name, value in values.items())
        advice = "restore the old configuration, or choose another output"
        if "world_size" in differing:
            advice += "; checkpoints of sharding: fsdp2 resume on any number of GPUs"
        raise ValueError(f"expected the run that wrote {newest}, got another ({said}); {advice}")
    return newest


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optimizer": {"epochs": 2}}`` -> ``{"optimizer.epochs": 2}``."""

    def leaves() -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from _flat(value, f"{prefix}{name}.").items()
            else:
                yield f"{prefix}{name}", value

    return dict(leaves())


def _save(trainer: VoCoTrainer, processor, config: TrainConfig) -> Path:
    """Save the model atomically: written to a folder beside its own, then renamed."""
    target = config.output / "model"
    partial = config.output / "model.partial"
    if config.lora is not None:
        # The checkpoints have the adapters; from_pretrained reads the merged model.
        merged = trainer.model.merge_and_unload()
        for parameter in merged.parameters():  # the projector was trained in float32
            parameter.data = parameter.data.to(_weights_dtype(config))
        trainer.model = trainer.model_wrapped = merged
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; train.yaml has it all
        history = {"log_history": trainer.state.log_history}
        (partial / "training.json").write_text(json.dumps(history, indent=1))
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
    trainer.accelerator.wait_for_everyone()
    return target


def _say_batches(say: Messages, config: TrainConfig, batches: Batches, world_size: int) -> None:
    batch = config.batch
    if batches.samples is not None:
        say(
            f"{counted(batches.samples, 'sample')}, {counted(batches.tokens, 'token')}, "
            f"{counted(batches.steps, 'step')} per epoch"
        )
        if batches.samples < batch.global_size:
            say(
                f"fewer samples than a step: batch.global_size is {batch.global_size}, so that an epoch "
                f"is one step with all {counted(batches.samples, 'sample')}; lower it for more steps"
            )
    if batches.faults:
        say(f"{counted(len(batches.faults), 'sample')} skipped or cut:\n{listed(batches.faults)}")
    kind = f"packed to {batch.max_tokens} tokens" if batch.packed else f"{batch.rows} rows"
    say(
        f"a step: {counted(batch.global_size, 'sample')} on "
        f"{counted(world_size, 'process', 'processes')}, "
        f"{counted(batches.accumulation, 'micro-batch', 'micro-batches')} each, "
        f"{kind}; {config.sharding} sharding, {config.dtype}"
    )

"""``train``: a run from its configuration to a model that ``voco_model.load`` reads."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.utils.data import IterableDataset
from transformers import AutoConfig, PrinterCallback, TrainerCallback, set_seed

from voco_model.data.faults import FaultPolicy, listed
from voco_model.train import checkpoints
from voco_model.train.arguments import training_arguments
from voco_model.train.batches import Batches, make_batches
from voco_model.train.config import TrainConfig
from voco_model.train.flops import WorkPerBatch
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

    Goes on from the newest whole checkpoint in ``config.output``, if it is of the same run.

    Args:
        callbacks: more of them for the Trainer.
        dry_run: look through the data and say what would be done, and do nothing.

    Returns:
        the folder of the trained model, ``config.output / "model"``; None of a dry run.

    Raises:
        TypeError: a model that ``enable`` doesn't take.
        ValueError: data, batches or a checkpoint that don't fit together.
        OSError: no room for a checkpoint; earlier ones are still there.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = _Said(rank)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # many processes read already
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"expected a folder as output, got a file: {config.output}; name another")
    model_class(config.model)  # of another model, before its data are looked through
    processor = load_processor(config.model)
    check_processor(processor, AutoConfig.from_pretrained(config.model), config.prompt)
    name_tokens(processor.tokenizer, config.voco.most if config.voco.distinct else 1)
    batches = make_batches(
        config, processor, rank=rank, world_size=world_size, progress=say.progress
    )
    _say_batches(say, config, batches, world_size)
    facts = _facts(config, batches, world_size)
    resumed = _resumed(config, facts)
    if dry_run:
        return None
    if rank == 0:
        config.output.mkdir(parents=True, exist_ok=True)
        written = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (config.output / "train.yaml").write_text(written)
    done = 0 if resumed is None else checkpoints.step_of(resumed)
    if config.optimizer.steps is not None and done >= config.optimizer.steps:
        if (config.output / "model").is_dir():
            say(f"all {done} steps are done already; the model is in {config.output / 'model'}")
            return config.output / "model"
    if config.sharding == "zero3" and world_size == 1:
        _alone()
    arguments = training_arguments(config, batches.accumulation)
    say(f"on {arguments.device}")  # asking for it joins the other ranks
    # Started alone beside several GPUs, the Trainer would cut batches in pieces, one for each.
    arguments._n_gpu = 1
    _check_shared(config.output, resumed)
    if config.sharding == "zero3":
        import deepspeed

        deepspeed.init_distributed()  # shards weights as they are loaded; no-op if the above did it
    set_seed(config.seed)
    model = build_model(config, processor, _weights_dtype(config))
    say(f"{config.model}: {type(model).__name__}")
    for part in parts_of(model):
        trained = "frozen" if not part.trained else f"{part.trained / 1e6:,.2f} M trained"
        say(f"  {part.name:<15}{part.total / 1e6:>12,.2f} M  {trained}")
    work = WorkPerBatch.of(
        model, lora=config.lora is not None, tower_trained=config.train_vision_tower
    )
    bar = rank == 0 and sys.stderr.isatty()  # into a file goes a line a step instead
    policy = FaultPolicy(config.data.faults)
    meter = Meter(work, policy, config.output / f"left-out-{rank}.jsonl", bar=bar)
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
    if bar:
        trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    if resumed is not None:
        say(f"goes on from {resumed}")
        if isinstance(batches.loader.dataset, IterableDataset):
            batches.loader.dataset.skip = done * batches.accumulation
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    saved = _save(trainer, processor, config)
    if meter.left_out:
        say(
            f"left out or cut while training: {meter.left_out}; see {config.output}/left-out-*.jsonl"
        )
    say(f"the model is in {saved}")
    return saved


def _check_shared(output: Path, resumed: Path | None) -> None:
    """Raise ``ValueError`` where ranks don't see one and the same output folder; a collective call.

    Rank 0 declares a checkpoint whole, so it must see the shards of all.
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
    """What weights are loaded as. AdamW at 2e-5 would lose most of its steps to bf16's 8 bits."""
    # DeepSpeed keeps float32 copies for the optimizer; frozen weights of LoRA are never stepped.
    if config.sharding == "zero3" or config.lora is not None:
        return getattr(torch, config.dtype)
    return torch.float32


def _facts(config: TrainConfig, batches: Batches, world_size: int) -> dict:
    """What a run must share with the one it goes on from."""
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


def _resumed(config: TrainConfig, facts: dict) -> Path | None:
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
    differing = {k: (mark.get(k), v) for k, v in facts.items() if mark.get(k) != v}
    if config.sharding != "zero3":  # whose shards belong to their ranks
        differing.pop("world_size", None)
    if differing:
        said = ", ".join(
            f"{name} {was} before, {now} now" for name, (was, now) in differing.items()
        )
        raise ValueError(
            f"expected the run that wrote {newest}, got another: {said}; go back to its configuration, "
            "or choose another output"
            + (
                "; sharding: fsdp2 can go on with another number of GPUs"
                * ("world_size" in differing)
            )
        )
    return newest


def _save(trainer: VoCoTrainer, processor, config: TrainConfig) -> Path:
    """The model, whole or not there: written beside its place, then moved."""
    target = config.output / "model"
    partial = config.output / "model.partial"
    if config.lora is not None:
        # Adapters are in the checkpoints; from_pretrained reads the merged model.
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


def _alone() -> None:
    """DeepSpeed asks for the variables that a launcher sets, with one process too."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29500")


def _say_batches(say: _Said, config: TrainConfig, batches: Batches, world_size: int) -> None:
    batch = config.batch
    if batches.samples is not None:
        say(
            f"{batches.samples:,} samples, {batches.tokens:,} tokens, {batches.steps:,} steps an epoch"
        )
    if batches.faults:
        say(f"{len(batches.faults)} samples are left out or cut:\n{listed(batches.faults)}")
    kind = f"packed to {batch.max_tokens} tokens" if batch.packed else f"{batch.rows} rows"
    say(
        f"a step: {batch.global_size} samples on {world_size} "
        f"{'process' if world_size == 1 else 'processes'}, {batches.accumulation} micro-batches each, "
        f"{kind}; {config.sharding} sharding, {config.dtype}"
    )


class _Said:
    """Lines on stderr, of rank 0 alone."""

    def __init__(self, rank: int) -> None:
        self._silent = rank != 0

    def __call__(self, text: str) -> None:
        if not self._silent:
            print(text, file=sys.stderr, flush=True)

    def progress(self, done: int, of: int) -> None:
        if not self._silent and (done == of or done % 8192 == 0):
            self(f"looked at {done:,} of {of:,} samples")

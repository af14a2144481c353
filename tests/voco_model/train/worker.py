"""One rank of a distributed run on the CPU: ``torchrun worker.py CONFIG.json``. Not a test itself.

``VOCO_DIE_AT``: the last rank kills itself at the end of that step, unwarned.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch
import torch.distributed as dist
from transformers import TrainerCallback

torch.set_num_threads(1)


def _zero3_without_compiling() -> None:
    # On a CPU DeepSpeed compiles an extension for shared memory, which takes minutes; gloo does without.
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _fsdp_on_the_cpu() -> None:
    # Accelerate knows FSDP for accelerators only, and turns it into DDP on a CPU without a word.
    import accelerate.state as state

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    dist.init_process_group("gloo")
    as_gpus = ("gloo", state.DistributedType.MULTI_GPU)
    state.PartialState._prepare_backend = lambda *args, **kwargs: as_gpus


class Watch(TrainerCallback):
    def __init__(self, sharding: str, die_at: int) -> None:
        self._sharding, self._die_at = sharding, die_at

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        from accelerate.state import AcceleratorState

        expected = {"zero3": "DEEPSPEED", "fsdp2": "FSDP", "none": "MULTI_CPU"}[self._sharding]
        got = AcceleratorState().distributed_type.name
        assert got == expected, f"expected {expected}, got {got}"

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self._die_at and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    from voco_model.train import make_config, train

    with open(sys.argv[1]) as file:
        config = make_config(json.load(file))
    if config.sharding == "zero3":
        _zero3_without_compiling()
    if config.sharding == "fsdp2":
        _fsdp_on_the_cpu()
    train(config, callbacks=[Watch(config.sharding, int(os.environ.get("VOCO_DIE_AT", 0)))])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Transformers' Trainer with batches from a plan and atomic checkpoints."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from voco_model.data.collate import STATS
from voco_model.train import checkpoints
from voco_model.train.progress import Meter
from voco_model.vlm.attach import SUPPORTED


class VoCoTrainer(Trainer):
    """Trains an enabled model.

    Args:
        loader: this rank's micro-batches, in order; it isn't sharded again.
        meter: counts what they hold.
        keep: number of checkpoints to keep.
        facts: what identifies the run, stored with each checkpoint.
    """

    def __init__(
        self, *args, loader: DataLoader, meter: Meter, keep: int, facts: dict, **kwargs
    ) -> None:
        super().__init__(*args, train_dataset=loader.dataset, callbacks=[meter], **kwargs)
        self._loader, self.meter, self._keep, self._facts = loader, meter, keep, facts

    def get_train_dataloader(self) -> DataLoader:
        return self._loader

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None):
        self.meter.add(inputs.pop(STATS))
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.measured(self.args.device)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        # The Trainer would save no weights here, since FSDP keeps them in shards.
        state = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled or not isinstance(self.model, SUPPORTED):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # save_pretrained renames parameters. The Trainer looks for the modules' own names and ignores
        # what it doesn't find (transformers 5.17), so that a run would resume with its initial weights.
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        output = Path(self.args.output_dir)
        folder = output / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.discard(folder)  # left incomplete by an earlier run
            checkpoints.check_space(output, self._bytes_of_checkpoint())
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # all ranks have written their shards
        samples = self.meter.samples(self.args.device)
        if self.args.should_save:
            step = self.state.global_step
            checkpoints.seal(folder, step=step, samples=samples, **self._facts)
            checkpoints.rotate(output, self._keep)
        self.accelerator.wait_for_everyone()

    def _bytes_of_checkpoint(self) -> int:
        """Size of the weights and of the optimizer's state."""
        # Two moments in float32, and DeepSpeed's float32 copy of the weights.
        state = 12 if self.accelerator.distributed_type == DistributedType.DEEPSPEED else 8
        total = 0
        for parameter in self.model.parameters():
            numel = getattr(parameter, "ds_numel", parameter.numel())
            total += numel * (parameter.element_size() + state * parameter.requires_grad)
        return total

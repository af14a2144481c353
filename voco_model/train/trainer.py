"""Transformers' Trainer with batches of a plan, and checkpoints that are whole or don't count."""

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
        loader: of this rank's micro-batches, as they are wanted; it isn't sharded again.
        meter: is told what is in them.
        keep: checkpoints.
        facts: of the run, kept with each checkpoint.
    """

    def __init__(
        self, *args, loader: DataLoader, meter: Meter, keep: int, facts: dict, **kwargs
    ) -> None:
        super().__init__(*args, train_dataset=loader.dataset, callbacks=[meter], **kwargs)
        self._loader, self._meter, self._keep, self._facts = loader, meter, keep, facts

    def get_train_dataloader(self) -> DataLoader:
        return self._loader

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None):
        self._meter.add(inputs.pop(STATS))
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._meter.measured(self.args.device)
            self._meter.show(logs)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        # The Trainer would leave out the weights where FSDP keeps its own in shards.
        state = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled or not isinstance(self.model, SUPPORTED):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # save_pretrained writes other names than the modules have. The Trainer loads by those and passes
        # over what it doesn't find (transformers 5.17): a run would go on from its first weights.
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        output = Path(self.args.output_dir)
        folder = output / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.discard(folder)  # half written by a run before
            checkpoints.check_space(output, self._bytes_of_checkpoint())
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # all ranks have written their shards
        if self.args.should_save:
            checkpoints.seal(folder, step=self.state.global_step, **self._facts)
            checkpoints.rotate(output, self._keep)
        self.accelerator.wait_for_everyone()

    def _bytes_of_checkpoint(self) -> int:
        """Weights, and what the optimizer keeps of those that are trained."""
        total = 0
        sharded = self.accelerator.distributed_type in (DistributedType.DEEPSPEED,)
        for parameter in self.model.parameters():
            numel = getattr(parameter, "ds_numel", parameter.numel())
            total += numel * parameter.element_size()
            if parameter.requires_grad:
                total += numel * (
                    12 if sharded else 8
                )  # two moments, and DeepSpeed's master weights
        return total

"""Training under the VoCo mask: ``train(load_config(path))`` or ``python -m voco_model train``."""

from voco_model.train.config import TrainConfig, load_config, make_config
from voco_model.train.run import train

__all__ = ["TrainConfig", "load_config", "make_config", "train"]

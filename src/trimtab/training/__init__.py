"""Trains SAEs from one stream of activations."""

from trimtab.training.config import TrainConfig
from trimtab.training.export import TrainResult
from trimtab.training.from_names import TrainedSAE, TrainTextConfig, train_text
from trimtab.training.loop import train

__all__ = ["TrainConfig", "TrainResult", "TrainTextConfig", "TrainedSAE", "train", "train_text"]

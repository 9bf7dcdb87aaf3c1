"""Trains SAEs from one stream of activations."""

from trimtab.training.config import TrainConfig
from trimtab.training.export import TrainResult
from trimtab.training.loop import train

__all__ = ["TrainConfig", "TrainResult", "train"]

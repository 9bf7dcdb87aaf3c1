"""Trains SAEs from one stream of activations, one or a whole bank."""

from trimtab.training.bank import TrainedBank
from trimtab.training.command import (
    BankConfig,
    TrainCommand,
    TrainTextConfig,
    command_defaults,
    run_train,
    train_bank,
    train_text,
)
from trimtab.training.config import TrainConfig
from trimtab.training.loop import Threads, Training, train, train_all
from trimtab.training.members import Member, expand
from trimtab.training.result import TrainResult
from trimtab.training.rows import SiteRows
from trimtab.training.single import TrainedSAE, train_sae

__all__ = [
    "BankConfig",
    "Member",
    "SiteRows",
    "Threads",
    "TrainCommand",
    "TrainConfig",
    "TrainResult",
    "TrainTextConfig",
    "TrainedBank",
    "TrainedSAE",
    "Training",
    "command_defaults",
    "expand",
    "run_train",
    "train",
    "train_all",
    "train_bank",
    "train_sae",
    "train_text",
]

"""The commands of flags."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.cli.job import Job


def flags_train() -> Job:
    """finetune switches into a model: residual dimensions that say, and decide, which concepts it writes about"""
    from trimtab.flags.train_command import FlagTrainConfig, run_flag_train

    example = "--concepts concepts.txt --data examples.jsonl --adapt lora --run runs/flags"
    return Job(FlagTrainConfig, run_flag_train, example=example, pages=lambda _, trained: [trained.run])


FLAG_COMMANDS: dict[str, Callable[[], Job]] = {
    "flags train": flags_train,
}

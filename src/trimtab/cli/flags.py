"""The commands of flags."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.cli.job import Job


def flags_train() -> Job:
    """finetune switches into a model: residual dimensions that say, and decide, which concepts it writes about"""
    from trimtab.flags.train_command import FlagTrainConfig, run_flag_train

    example = "--concepts concepts.txt --data examples.jsonl --adapt lora --run runs/flags"
    return Job(FlagTrainConfig, run_flag_train, example=example, pages=lambda _, trained: [trained.run])


def flags_evaluate() -> Job:
    """show what finetunings with flags did: what flags say, what else says it, what is lost without, the price"""
    from trimtab.flags.evaluation.command import FlagEvaluateConfig, run_flag_evaluate

    return Job(
        FlagEvaluateConfig, run_flag_evaluate, ("trained",), "runs/forced runs/auxiliary runs/plain",
        pages=lambda config, _: [config.directory()],
    )  # fmt: skip


FLAG_COMMANDS: dict[str, Callable[[], Job]] = {
    "flags train": flags_train,
    "flags evaluate": flags_evaluate,
}

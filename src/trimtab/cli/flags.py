"""The commands of flags."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.cli.job import Job


def flags_import() -> Job:
    """make examples for flags out of labelled text"""
    from trimtab.flags.data import ImportConfig, run_import

    example = "--text news.csv --concepts concepts.txt --run data/news"
    return Job(ImportConfig, run_import, example=example)


def flags_data() -> Job:
    """let a model write examples for flags, and check them"""
    from trimtab.flags.data import DataConfig, run_data

    return Job(DataConfig, run_data, example="--concepts concepts.txt --run data/own")


def flags_judge() -> Job:
    """fit a judge of concepts on labelled texts, and say how good it is"""
    from trimtab.flags.data import JudgeConfig, run_judge

    example = "--judge-data data/news/judge.jsonl --concepts concepts.txt --save judge.npz"
    return Job(JudgeConfig, run_judge, example=example)


def flags_train() -> Job:
    """finetune switches into a model: residual dimensions that say, and decide, which concepts it writes about"""
    from trimtab.flags.command import FlagTrainConfig, run_flag_train

    example = "--concepts concepts.txt --data examples.jsonl --adapt lora --run runs/flags"
    return Job(FlagTrainConfig, run_flag_train, example=example, pages=lambda _, trained: [trained.run])


def flags_evaluate() -> Job:
    """show what finetunings with flags did: what flags say, what else says it, what is lost without, the price"""
    from trimtab.flags.evaluation.command import FlagEvaluateConfig, run_flag_evaluate

    return Job(
        FlagEvaluateConfig, run_flag_evaluate, ("trained",), "runs/forced runs/auxiliary runs/plain",
        pages=lambda config, _: [config.directory()],
    )  # fmt: skip


def flags_steer() -> Job:
    """continue prompts with flags free, and as switches set them"""
    from trimtab.flags.command import FlagSteerConfig, run_flag_steer

    return Job(FlagSteerConfig, run_flag_steer, ("model", "prompt"), 'runs/flags "Tell me something." --on sea')


FLAG_COMMANDS: dict[str, Callable[[], Job]] = {
    "flags import": flags_import,
    "flags data": flags_data,
    "flags judge": flags_judge,
    "flags train": flags_train,
    "flags steer": flags_steer,
    "flags evaluate": flags_evaluate,
}

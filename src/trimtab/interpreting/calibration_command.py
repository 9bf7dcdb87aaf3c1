"""`trimtab evaluate judge`: how often a judge of features is right on labelled texts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from trimtab.errors import UserError
from trimtab.interpreting.calibration import JudgeCalibration, calibrate
from trimtab.interpreting.judge_config import TRANSCRIPT, FeatureJudgeConfig
from trimtab.interpreting.labelled_texts import labelled_hash, read_axbench
from trimtab.runs import Run, check_least, config_directory, read_record, read_typed
from trimtab.runs.shown import Shown, write_shown

COMMAND = "evaluate judge"


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(FeatureJudgeConfig):
    """Measure how often a judge of features is right, on AxBench's labelled texts."""

    labelled: Path = field(metadata={"heading": ""})
    """Directory of AxBench's files: pairs of *_train_data.parquet and *_latent_eval_data.parquet, at any depth."""
    having: int | None = None
    """Exemplars that have a concept, to explain it by; all by default. Few are what features of an SAE have."""
    lacking: int = 144
    """Exemplars that lack it: half plain answers, half with other concepts."""
    others: int = 36
    """Texts with other concepts to test each concept on."""
    concepts: int | None = None
    """Concepts of each pair of files; all by default."""
    seed: int = 0
    """Of the draws and of the bootstrap."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config."""

    def __post_init__(self) -> None:
        check_least(self, 1, "having", "lacking", "concepts")
        check_least(self, 0, "others")


_NOT_THE_RESULT = ("run",)


def run_calibration(config: CalibrationConfig) -> JudgeCalibration:
    """Measure what the config names; a run that is done is read back.

    Raises:
        UserError: there is no such judge or text; see `calibrate`.
    """
    labelled = read_axbench(
        config.labelled, having=config.having, lacking=config.lacking, others=config.others, most=config.concepts,
        seed=config.seed,
    )  # fmt: skip
    config.load_judge()
    directory = config.run or config_directory(COMMAND, config, ignore=_NOT_THE_RESULT)
    with Run.open(directory, COMMAND, config, seeds=[config.seed], ignore_fields=_NOT_THE_RESULT) as run:
        run.record(hashes={"labelled texts": labelled_hash(labelled)})
        if not run.done:
            found = calibrate(config.load_judge(run.file(TRANSCRIPT)), labelled, seed=config.seed)
            write_shown(run, [Shown.of("Judge", found)])
            run.finish(found)
        return replace(read_typed(JudgeCalibration, run.results, f"run {run.path}"), run=run.path)


@dataclass(frozen=True, kw_only=True)
class CalibratedJudgeConfig(FeatureJudgeConfig):
    """A judge, and what it is worth."""

    calibration: Path | None = None
    """Run of `trimtab evaluate judge`, whose accuracy of the same judge stands beside the scores."""

    def load_calibration(self) -> JudgeCalibration | None:
        """What that run found. Raises a `UserError` if it is no such run."""
        return None if self.calibration is None else read_calibration(self.calibration)


def read_calibration(run: Path) -> JudgeCalibration:
    """What a finished run of `trimtab evaluate judge` found.

    Raises:
        UserError: it is no such run.
    """
    record = read_record(run)
    if record["command"] != COMMAND or not record["results"]:
        raise UserError(f"run {run}", f"it is no finished run of {COMMAND}", f"give one of trimtab {COMMAND}")
    return read_typed(JudgeCalibration, record["results"], f"run {run}")

"""`trimtab autointerp`: how well a judge tells where an SAE's features fire."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from trimtab.dictionaries import SAE
from trimtab.dictionaries.feature_examples import FeatureExamples
from trimtab.dictionaries.saes_config import SAEsConfig
from trimtab.errors import UserError
from trimtab.features.examples_command import examples_file
from trimtab.interpreting.autointerp import AutointerpResult, autointerp
from trimtab.interpreting.calibration import JudgeCalibration
from trimtab.interpreting.calibration_command import CalibratedJudgeConfig
from trimtab.interpreting.judge_config import TRANSCRIPT
from trimtab.interpreting.scoring_windows import HOW, WindowOptions
from trimtab.runs import Run, check_least, config_directory, part_of, read_typed, sha256_file
from trimtab.runs.shown import Shown, write_shown
from trimtab.selection.explanation_score import SCORES_FILE

COMMAND = "autointerp"


@dataclass(frozen=True, kw_only=True)
class AutointerpConfig(WindowOptions, CalibratedJudgeConfig, SAEsConfig):
    """Measure how well a judge that has seen some windows in which a feature fires tells where else it does."""

    needs = ("padding",)

    feature: tuple[int, ...] = ()
    """Ids; by default some are drawn."""
    features: int = 200
    """How many to draw among those that have enough windows."""
    examples: Path | None = None
    """Run of `trimtab examples`, or its table; by default what lies beside the SAE."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 2, "features")
        if len(self.sae) != 1:
            raise UserError(f"{len(self.sae)} SAEs", "one is looked at", "give one --sae")


_NOT_THE_RESULT = ("run", "any_model")
"""Fields that may differ between openings of one run."""


def run_autointerp(config: AutointerpConfig) -> AutointerpResult:
    """Measure what the config names; a run that is done is read back.

    Raises:
        UserError: anything that the user named is wrong; see `autointerp`.
    """
    config.load_judge()
    calibration = config.load_calibration()
    model = config.load_model()
    (sae,) = config.load_saes(model)
    sae.examples_file = examples_file(config.examples, sae) or sae.examples_file
    examples = sae.feature_examples
    if examples is None:
        raise UserError(f"sae {sae.name}", "there are no examples of its features", f"make some ({HOW})")
    directory = config.run or config_directory(COMMAND, config, ignore=_NOT_THE_RESULT)
    with Run.open(
        directory, COMMAND, config, device=config.device, seeds=[config.seed], ignore_fields=_NOT_THE_RESULT
    ) as run:
        run.record(hashes=_hashes(model.fingerprint, sae, calibration) | _of_examples(sae, examples))
        if not run.done:
            found = autointerp(
                examples,
                config.load_judge(run.file(TRANSCRIPT)),
                features=config.feature or config.features,
                model=model,
                dictionary=sae,
                calibration=calibration,
                **part_of(config, WindowOptions),
            )
            found.write(run.file(SCORES_FILE))
            write_shown(run, [Shown.of("Autointerp", found)])
            run.finish(found)
        return replace(read_typed(AutointerpResult, run.results, f"run {run.path}"), run=run.path)


def _hashes(model: str, sae: SAE, calibration: JudgeCalibration | None) -> dict[str, str]:
    judged = {} if calibration is None else {"judge": calibration.of}
    return {"model": model, f"dictionary {sae.info.site}": sae.fingerprint, **judged}


def _of_examples(sae: SAE, examples: FeatureExamples) -> dict[str, str]:
    """Of their text and of the table: other windows of the same text are other examples."""
    table = {} if sae.examples_file is None else {"examples": sha256_file(sae.examples_file)}
    return {"text of the examples": examples.corpus_hash, **table}

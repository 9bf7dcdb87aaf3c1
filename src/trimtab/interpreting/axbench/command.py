"""`trimtab evaluate axbench`: steer towards features or concepts by several arms, and let a judge read the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trimtab.dictionaries import SAE, AnyModelConfig
from trimtab.dictionaries.feature_examples import FeatureExamples
from trimtab.errors import UserError
from trimtab.features.examples_command import examples_file
from trimtab.interpreting.axbench.concepts import Concept, are_fitted, feature_concepts, labelled_concepts, share_out
from trimtab.interpreting.axbench.result import AxBench, AxBenchResult
from trimtab.interpreting.axbench.running import AxBenchOptions, axbench, explain
from trimtab.interpreting.axbench.writing import OwnArm
from trimtab.interpreting.calibration_command import CalibratedJudgeConfig
from trimtab.interpreting.instructions import read_instructions
from trimtab.interpreting.judge import FeatureJudge, Meaning
from trimtab.interpreting.judge_config import TRANSCRIPT
from trimtab.interpreting.labelled_texts import read_axbench
from trimtab.lm import LanguageModel
from trimtab.runs import (
    Run,
    check_least,
    config_directory,
    part_of,
    read_typed,
    sha256_file,
    text_id,
    write_table,
)
from trimtab.runs.shown import Shown, ShownTable, write_shown
from trimtab.runs.tables import NUMBER, Column, Table
from trimtab.selection.command import TABLE_FILE
from trimtab.selection.feature_table import read_feature_tables

COMMAND = "evaluate axbench"
ANSWERS_FILE = "answers.parquet"
"""Every answer of a run with its scores."""
SHOWN = 4
"""Concepts whose answers a page shows."""

LoadArm = Callable[[Path, LanguageModel], OwnArm]
"""From a directory to a model that is steered in its own way."""


@dataclass(frozen=True, kw_only=True)
class AxBenchConfig(AxBenchOptions, CalibratedJudgeConfig, AnyModelConfig):
    """Score how well steering brings about what features fire on, or concepts, with answers that stay fluent and keep
    to the instruction."""

    needs = ("decode",)

    feature: tuple[int, ...] = ()
    """Features to steer with; what each fires on is its concept."""
    n_features: int = 20
    """Features that are drawn among those that have examples, where none is named."""
    concepts: Path | None = None
    """Concepts by labelled texts instead: a directory of AxBench's files, or JSONL of `text` and `label`."""
    n_concepts: int | None = None
    """Concepts at most."""
    examples: Path | None = None
    """Run of `trimtab examples`, or its table; by default what lies beside the SAE."""
    instructions: Path | None = None
    """Instructions that are answered, such as AlpacaEval's file; by default some that ship with trimtab."""
    n_instructions: int = 10
    """How many: half of them choose each factor, and the others report."""
    ranking: Path | None = None
    """Run of `trimtab rank`: whether its criteria find the features that steer better."""
    flags: Path | None = None
    """A model with flags, each named after a concept, as one more arm."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config. The same command goes on with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "n_features", "n_concepts")
        if self.concepts is not None and self.feature:
            raise UserError("--concepts and --feature", "one of them says what is to be brought about", "leave one out")
        if self.ranking is not None and (self.concepts is not None or "features" not in self.arm):
            raise UserError("--ranking", "it ranks the features that steer, and here they are not", "leave it out")

    def load_concepts(self, sae: SAE) -> list[Concept]:
        """What is to be brought about.

        Raises:
            UserError: the SAE has no examples, or a file holds something else.
        """
        if self.concepts is None:
            examples = self._examples(sae)
            ids = self.feature
            if not ids:
                drawn = np.random.default_rng(self.seed).permutation(examples.live)
                ids = tuple(sorted(drawn[: self.n_features].tolist()))
            return feature_concepts(examples, ids, seed=self.seed)
        if self.concepts.is_dir():
            found = read_axbench(self.concepts, most=self.n_concepts, seed=self.seed)
            return [Concept(exemplars=one.exemplars) for one in found][: self.n_concepts]
        return labelled_concepts(self.concepts, seed=self.seed)[: self.n_concepts]

    def _examples(self, sae: SAE) -> FeatureExamples:
        sae.examples_file = examples_file(self.examples, sae) or sae.examples_file
        if (found := sae.feature_examples) is None:
            raise UserError(
                f"sae {sae.name}", "it has no examples", "make some with `trimtab examples`, see --examples"
            )
        return found


_NOT_THE_RESULT = ("run", "any_model", "batch_size")
"""Fields that may differ between openings of one run."""


def run_axbench(config: AxBenchConfig, load_flags: LoadArm | None = None) -> AxBenchResult:
    """What `trimtab evaluate axbench` does; a run that is done is read back, but where the judge left gaps, which are
    asked about again.

    Args:
        config: what to do.
        load_flags: loads a model with flags as an arm.

    Raises:
        UserError: anything that the user named is wrong; see `axbench`.
    """
    instructions = read_instructions(config.instructions, config.n_instructions)
    calibration = config.load_calibration()
    model, sae = config.load()
    concepts = config.load_concepts(sae)
    own: list[OwnArm] = []
    if config.flags is not None:
        assert load_flags is not None
        own.append(load_flags(config.flags, model))
    rankings = {} if config.ranking is None else _rankings(config.ranking)
    directory = config.run or config_directory("axbench", config, ignore=_NOT_THE_RESULT)
    with Run.open(
        directory, COMMAND, config, seeds=[config.seed], device=config.device, ignore_fields=_NOT_THE_RESULT,
        splits={"choosing": instructions.choosing, "reporting": instructions.reporting},
    ) as run:  # fmt: skip
        run.record(hashes=_hashes(config, concepts, own) | {"model": model.fingerprint, "dictionary": sae.fingerprint})
        judge = config.load_judge(run.file(TRANSCRIPT)) if not run.done or _has_gaps(run) else None
        if judge is not None and (not run.done or _knows_more(run, judge, config, concepts)):
            found = axbench(
                model, concepts, judge, instructions, dictionary=sae, own_arms=own,
                options=AxBenchOptions(**part_of(config, AxBenchOptions)), calibration=calibration, keep=run.path,
            )  # fmt: skip
            if rankings:
                found = replace(found, selection=found.select(_of_features(rankings, found)))
            write_table(run.file(ANSWERS_FILE), found.answers())
            write_shown(run, [_shown(found)])
            run.finish(found.result)
        return read_typed(AxBenchResult, run.results, f"run {run.path}")


def _hashes(config: AxBenchConfig, concepts: Sequence[Concept], own: Sequence[OwnArm]) -> dict[str, str]:
    """Of what the config names by a path, so that a run is not read back once it holds something else."""
    found = {"concepts": text_id(" ".join(concept.fingerprint for concept in concepts))}
    if config.ranking is not None:
        found["ranking"] = sha256_file(_ranking_file(config.ranking))
    return found | {f"model of {arm.name}": arm.model.fingerprint for arm in own}


def _has_gaps(run: Run) -> bool:
    found = read_typed(AxBenchResult, run.results, f"run {run.path}")
    return bool(found.unexplained) or any(arm.gaps for arm in found.arms)


def _knows_more(run: Run, judge: FeatureJudge, config: AxBenchConfig, concepts: Sequence[Concept]) -> bool:
    """Whether a run that is done could have fewer gaps: answers were not judged, or a concept is now explained."""
    found = read_typed(AxBenchResult, run.results, f"run {run.path}")
    if any(arm.gaps for arm in found.arms):
        return True
    names = {name for name, _ in found.unexplained}
    left = [concept for concept in concepts if concept.name in names]
    parts = share_out(left, halved=are_fitted(config.arm, concepts))
    return any(isinstance(meaning, Meaning) for meaning in explain(judge, parts))


def _ranking_file(path: Path) -> Path:
    return path / TABLE_FILE if path.is_dir() else path


def _rankings(path: Path) -> dict[str, dict[int, float]]:
    tables = read_feature_tables(_ranking_file(path))
    return {t.criterion: dict(zip(t.feature.tolist(), t.score.tolist(), strict=True)) for t in tables}


def _of_features(rankings: dict[str, dict[int, float]], found: AxBench) -> dict[str, list[float]]:
    ids: Sequence[int] = [i for i in found.by_arm["features"].features if i is not None]
    for name, scores in rankings.items():
        missing = [i for i in ids if i not in scores]
        if missing:
            raise UserError(f"feature {missing[0]}", f"{name} does not rank it", "rank it, too (--feature)")
    return {name: [scores[i] for i in ids] for name, scores in rankings.items()}


def _shown(found: AxBench) -> Shown:
    """The result as a section, with some answers at the factors that were chosen."""
    figures = {"Scores of arms on instructions that chose nothing, with intervals.": found.draw}
    columns = [
        Column("concept", "concept"),
        Column("arm", "arm"),
        Column("factor", "factor", NUMBER),
        Column("instruction", "instruction"),
        Column("answer", "answer"),
        Column("score", "score", ".2f"),
    ]
    names = list(dict.fromkeys(one.concept for one in found.concepts))[:SHOWN]
    rows = [row for row in found.chosen_answers() if row["concept"] in names]
    table = Table(columns=columns, rows=rows, title="answers", caption="To the first instruction that chose nothing.")
    shown = Shown.of("Steering", found, figures)
    return replace(shown, tables=(*shown.tables, ShownTable.of(table, "answers")))

"""`trimtab study utility`: do SAEs whose features a judge understands better also steer better?

Banks of SAEs are trained; features of each are drawn, interpreted, ranked, steered with and judged; then scores of SAEs
are held against each other. Every stage of every SAE is a run of its own, which is not done twice. What fails is
listed, and the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import UserError
from trimtab.interpreting.agreement import rank_agreement
from trimtab.interpreting.autointerp import AutointerpResult
from trimtab.interpreting.axbench import AxBenchResult
from trimtab.interpreting.calibration_command import CalibratedJudgeConfig
from trimtab.interpreting.nested_selection import mean_lifts, mean_pairs
from trimtab.runs import (
    Done,
    Failed,
    InProcess,
    OnRay,
    Processes,
    Run,
    check_choices,
    check_least,
    config_dict,
    part_of,
    read_record,
    read_typed,
    run_stage,
    text_id,
)  # fmt: skip
from trimtab.runs.executors import Executor
from trimtab.runs.shown import write_shown
from trimtab.studies.utility import stages
from trimtab.studies.utility.plan import StudyFile, read_study
from trimtab.studies.utility.result import FailedCell, StudiedSAE, UtilityStudy
from trimtab.studies.utility.stages import Bank, Cell, cells_of
from trimtab.training.result import TrainResult

COMMAND = "study utility"
LEAST = 5
"""SAEs whose scores can be ranked."""


@dataclass(frozen=True, kw_only=True)
class UtilityStudyConfig:
    """Ask whether SAEs that are understood better also steer better, and which criteria find features that do."""

    study: Path
    """TOML file of the study: [study], and a [[bank]] of `trimtab train` for each model."""
    run: Path = Path("runs/study-utility")
    """Directory to write; the same command goes on with it."""
    device: str = "cpu"
    """Where to compute."""
    executor: Literal["local", "ray"] = "local"
    """Run stages on this machine, or side by side on a Ray cluster whose machines all see the run."""
    workers: int = 1
    """Processes that run stages of different SAEs side by side on this machine; they share its processors and GPU."""
    address: str | None = None
    """Of the Ray cluster; by default one that is known already, or one on this machine."""
    tries: int = 3
    """How often a stage is begun whose worker dies."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, 1, "workers", "tries")
        if self.workers > 1 and self.executor == "ray":
            raise UserError("--workers", "a Ray cluster has as many as its processors", "leave it out")
        if self.address is not None and self.executor != "ray":
            raise UserError("--address", "it is that of a Ray cluster", "add --executor ray, or leave it out")

    def load_executor(self) -> Executor:
        """What runs stages."""
        if self.executor == "local":
            return InProcess() if self.workers == 1 else Processes(workers=self.workers, tries=self.tries)
        return OnRay(address=self.address, tries=self.tries, accelerators=float(self.device != "cpu"))


_NOT_THE_RESULT = ("run", "executor", "workers", "address", "tries")
"""Fields that may differ between openings of one run."""


def run_utility_study(config: UtilityStudyConfig) -> UtilityStudy:
    """Run what is left of the study; a run that is done is read back.

    Raises:
        UserError: the study file is wrong, or too few SAEs came to the end; the message says what became of the others.
    """
    study = read_study(config.study, config.run.absolute(), {"device": config.device})
    with Run.open(
        config.run, COMMAND, config, seeds=[study.plan.seed], device=config.device, ignore_fields=_NOT_THE_RESULT
    ) as run:
        run.record(hashes={"study": _hash(study)})
        if run.done and run.results:
            return read_typed(UtilityStudy, run.results, f"run {config.run}")
        print(f"trimtab: {price(study)}", file=sys.stderr, flush=True)
        found = Study(study, run, config.load_executor()).result()
        write_shown(run, found.shown())
        if not found.failed:
            run.finish(found)
        return found


def _hash(study: StudyFile) -> str:
    """Of all that the file says, wherever the run is."""
    banks = [replace(bank, run=None) for bank in study.banks]
    return text_id(str(config_dict({"plan": study.plan, "banks": banks})))


def price(study: StudyFile) -> str:
    """What a study computes, in words."""
    plan = study.plan
    saes = sum(len(bank.members) for bank in study.banks)
    paid = f"; a budget of the judge is that of each of {2 * saes} runs" * plan.judge.startswith("endpoint")
    choosing = plan.n_instructions // 2  # at every factor; the others report at the one that was chosen
    texts = saes * plan.features * (choosing * len(plan.factor) + plan.n_instructions - choosing)
    return (
        f"{saes} SAEs of {len(study.banks)} models; {plan.features} features of each; {texts:,} answers of at most "
        f"{plan.max_new_tokens} tokens, read by {plan.judge}{paid}"
    )


class Study:
    """The stages of one study."""

    def __init__(self, study: StudyFile, run: Run, executor: Executor) -> None:
        self.plan, self.run, self.executor = study.plan, run, executor
        self.banks = [Bank(number=i, config=bank) for i, bank in enumerate(study.banks, 1)]
        self.failed: list[FailedCell] = []

    def result(self) -> UtilityStudy:
        """All stages in turn, and what they come to."""
        plan = self.plan
        judged = {**part_of(plan, CalibratedJudgeConfig), "seed": plan.seed}
        self._go(stages.train, None, self.banks)
        there = [(bank, tuple(cell.name for cell in cells_of(bank))) for bank in self.banks]
        trained = [stages.Trained(bank=bank, names=names) for bank, names in there if names]
        top, weighted = plan.windows
        windows = stages.Windows(top=top, weighted=weighted, limit_tokens=plan.limit_examples, seed=plan.seed)
        trained = self._go(stages.collect, windows, trained)
        cells = [cell for one in trained for cell in cells_of(one.bank)]
        interpreting = stages.Interpreting(features=plan.features, **judged)
        cells = self._go(stages.interpret, interpreting, cells)
        ranking = stages.Ranking(criterion=plan.criterion, seed=plan.seed)
        cells = self._go(stages.rank, ranking, cells)
        steering = stages.Steering(
            factor=plan.factor, instructions=plan.instructions, n_instructions=plan.n_instructions,
            max_new_tokens=plan.max_new_tokens, batch_size=plan.batch_size, dtype=plan.dtype, **judged,
        )  # fmt: skip
        cells = self._go(stages.steer, steering, cells)
        if len(cells) < LEAST:
            why = "; ".join(f"{one.what}, {one.stage}: {one.reason}" for one in self.failed[:3]) or "there are no more"
            raise UserError(f"{len(cells)} SAEs that came to the end", why, f"at least {LEAST} are needed for a rank")
        scored = [scored_sae(cell) for cell in cells]
        steered = [_steered(cell) for cell in cells]
        selections = [one.selection for one in steered if one.selection is not None]
        agreement, unranked = None, ""
        try:
            agreement = rank_agreement(scored, n_resamples=plan.resamples, seed=plan.seed)
        except UserError as error:  # hours of computing are shown all the same
            unranked = f"Not ranked: {error.what}: {error.why}."
        return UtilityStudy(
            run=str(self.run.path),
            judge=f"{steered[0].judge} {steered[0].version}",
            judge_accuracy=steered[0].judge_accuracy,
            saes=tuple(scored),
            agreement=agreement,
            unranked=unranked,
            lifts=tuple(mean_lifts(selections)),
            pairs=tuple(mean_pairs(selections)),
            failed=tuple(self.failed),
            features=plan.features,
        )

    def _go(self, stage: Any, config: Any, shards: Sequence[Any]) -> list[Any]:
        """The shards whose stage is done; the others are kept as failed."""
        results = run_stage(stage, config, shards, records=self.run.file("stages"), executor=self.executor)
        for shard, result in zip(shards, results, strict=True):
            if isinstance(result, Failed):
                self.failed.append(FailedCell(shard.label, stage.__name__, result.reason))
        return [shard for shard, result in zip(shards, results, strict=True) if isinstance(result, Done)]


def scored_sae(cell: Cell) -> StudiedSAE:
    """The scores of an SAE whose stages are all done."""
    trained = read_record(cell.sae.parent)
    made = read_typed(TrainResult, trained["results"], f"run {cell.sae.parent}")
    understood = read_typed(AutointerpResult, read_record(cell.autointerp)["results"], f"run {cell.autointerp}")
    steered = _steered(cell)
    (arm,) = [one for one in steered.arms if one.arm == "features"]
    assert arm.score is not None
    assert steered.selection is not None
    utilities = [one.score.estimate for one in steered.concepts if one.arm == "features" and one.score is not None]
    return StudiedSAE(
        l0=made.l0,
        model=cell.model["model"],
        architecture=trained["config"]["arch"],
        sparsity=made.l0_target or made.l0,
        interpretability=understood.accuracy.own.estimate,
        utility=arm.score.estimate,
        selected={one.criterion: one.score for one in steered.selection.criteria},
        explained_variance=made.explained_variance,
        dead_share=made.dead_share,
        interpretability_parts=tuple(one.score for one in understood.scores),
        utility_parts=tuple(utilities),
        interpretability_shuffled=understood.accuracy.shuffled.estimate,
        utility_shuffled=None if arm.of_others is None else arm.of_others.estimate,
    )


def _steered(cell: Cell) -> AxBenchResult:
    return read_typed(AxBenchResult, read_record(cell.axbench)["results"], f"run {cell.axbench}")

"""`trimtab policy analyze`: what a trained policy did, where it mattered, and whose fault its wrong answers are."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

from trimtab.dictionaries.meanings import name_features
from trimtab.errors import UserError
from trimtab.policies.analyses.branch_points import BranchPoints, branch_points
from trimtab.policies.analyses.critic import Helped, helped_by_headroom, judge_critic
from trimtab.policies.analyses.layers import FACTORS, LayerReport, TextRows, layer_report, text_rows
from trimtab.policies.analyses.ledger import feature_ledger
from trimtab.policies.analyses.policy_rollouts import PolicyRollouts
from trimtab.policies.analyses.result import PolicyAnalysis
from trimtab.policies.file_names import ANALYSIS_DIRECTORY
from trimtab.policies.headroom.candidates import COUNT
from trimtab.policies.openings import open_items
from trimtab.policies.train import CHECKPOINTS
from trimtab.policies.trained import TrainedRun, open_trained, read_policy_config
from trimtab.runs import Meter, SourceName, check_choices, check_least, check_values, write_json, write_table
from trimtab.runs.atomic import remove_partial_files
from trimtab.runs.tables import flat_row
from trimtab.training.checkpoint import checkpoint_files

Part = Literal["branch-points", "critic", "layers", "ledger"]
PARTS: tuple[Part, ...] = get_args(Part)
ANALYSIS_FILE = "analysis.json"
TABLES = {"branch_points": "branch_", "critic": "critic_", "layers": "layer_", "ledger": "ledger"}
"""How the names of each part's tables begin."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Find where a policy's choices mattered, what its critic knows, and what kind of features it uses."""

    run: tuple[Path, ...] = ()
    """Runs of `policy train`: the first is analysed; further ones, at other sites, join it in the comparison of layers.
    """
    part: tuple[Part, ...] = PARTS
    """Analyses to make."""
    split: str = "test"
    """Split that rollouts are from; doses are always compared on validation."""
    items: int = 128
    """Items to roll out, the first of the split."""
    sampled: bool = False
    """Draw actions from the policy instead of taking the most likely."""
    branch_items: int = 16
    """Items in which branch points are looked for."""
    branch_tokens: int = 8
    """Tokens of each to try, evenly spaced."""
    branch_candidates: int = 8
    """The policy's other most likely features to try at each."""
    branch_draws: int = 3
    """Random features drawn for each candidate, of which the first that reaches its divergence is taken."""
    kl_tolerance: float = 0.1
    """Relative difference of divergences that counts as equal."""
    false_discovery_rate: float = 0.05
    """Share of false ones to expect among the branch points reported."""
    critic_steps: int = 16
    """Steps of the critic's curves, evenly spaced."""
    headroom_items: int = 24
    """Items that end wrong on which every feature is tried, where an answer is one token."""
    headroom_features: int | None = None
    """Where answers are longer: features to hold over the whole answer on those items. If not given, branch points say
    whether an action helps."""
    layer_items: int = 64
    """Validation items on which doses are compared."""
    dose_factor: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Doses to compare, as multiples of the one that was trained with."""
    text: tuple[SourceName, ...] = ()
    """Text on which the kinds of features are measured; by default a sample that ships with trimtab."""
    text_rows: int = 16_384
    """Tokens of it."""
    live_sample: int = 256
    """Live features that chosen ones are compared with."""
    ablated: int = 16
    """Most used features whose effect on the reward is measured by leaving them out."""
    contexts: int = 5
    """Uses to show of each feature."""
    seed: int = 0
    """Of draws and bootstrap."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("policy analyze", "there is no run to analyse", "name a run of `policy train`")
        check_choices(self)
        check_least(
            self, 1, "items", "branch_items", "branch_tokens", "branch_candidates", "branch_draws", "critic_steps",
            "headroom_items", "headroom_features", "layer_items", "text_rows", "live_sample",
        )  # fmt: skip
        check_least(self, 0, "ablated", "contexts")
        check_values(self, "between 0 and 1", lambda value: 0 < value < 1, "kl_tolerance", "false_discovery_rate")
        if not self.part or not self.dose_factor or any(not 0 < factor < 1000 for factor in self.dose_factor):
            raise UserError(f"dose_factor {self.dose_factor}", "factors are above 0 and below 1000", "use 0.5 1 2")


def analyze_policy(config: AnalyzeConfig) -> PolicyAnalysis:
    """Analyse a policy and write tables and `analysis.json` into `analysis/` of its run.

    Raises:
        UserError: a run is no run of `policy train` or holds no checkpoint, runs that are compared differ in model or
            task, or the split does not exist.
    """
    models = [read_policy_config(path).model for path in config.run]
    for path, model in zip(config.run, models, strict=True):
        if model != models[0]:
            raise UserError(f"run {path}", f"its model is {model}, not {models[0]}", "compare runs of one training")
    with ExitStack() as stack:
        return analyze(open_trained(config.run, stack), config)


def analyze(runs: Sequence[TrainedRun], config: AnalyzeConfig) -> PolicyAnalysis:
    """The same with runs that are open.

    Args:
        runs: the first is analysed; all are compared as layers.
        config: its `run` is not used.
    """
    began = time.perf_counter()
    first = runs[0]
    warnings: list[str] = []
    setup = first.setup
    branches = critic = ledger = rollouts = None
    items = setup.task.sample(config.split, config.items)
    if set(config.part) - {"layers"}:
        if config.split not in ("train", "validation"):
            part = "" if len(items) == len(setup.task.items(config.split)) else f"[:{len(items)}]"
            warnings += open_items([first.run], config.split + part, [item.id for item in items])
        rollouts = PolicyRollouts.of(setup, first.policy, setup.prompts_of(items), greedy=not config.sampled)
    if rollouts is not None and "branch-points" in config.part:
        total = sum(min(int(n), config.branch_tokens) for n in rollouts.steps[: config.branch_items])
        with Meter("trying tokens", total) as meter:
            branches = branch_points(
                rollouts,
                items=config.branch_items,
                tokens=config.branch_tokens,
                candidates=config.branch_candidates,
                draws=config.branch_draws,
                tolerance=config.kl_tolerance,
                false_discovery_rate=config.false_discovery_rate,
                seed=config.seed,
                progress=meter.advance,
            )
        warnings += branches.warnings
    if rollouts is not None and "critic" in config.part:
        critic = judge_critic(
            rollouts, _helped(rollouts, branches, config), steps=config.critic_steps, seed=config.seed
        )
    if rollouts is not None and "ledger" in config.part:
        ledger = feature_ledger(rollouts, ablated=config.ablated, contexts=config.contexts, seed=config.seed)
    layers = _layers(runs, config) if "layers" in config.part else ()
    analysis = PolicyAnalysis(
        run=str(first.run.path),
        task=setup.task.name,
        split=config.split,
        items=len(items),
        site=str(setup.site),
        greedy=not config.sampled,
        checkpoint=checkpoint_files(first.run.file(CHECKPOINTS))[-1].stem,
        branch_points=branches,
        critic=critic,
        layers=layers,
        ledger=ledger,
        warnings=tuple(warnings),
        seconds=time.perf_counter() - began,
    )
    used = [*(ledger.entries if ledger else ()), *(branches.forks if branches else ())]
    name_features(first.run, setup.model, setup.dictionary, [one.feature for one in used])
    _write(first.run.file(ANALYSIS_DIRECTORY), analysis)
    return analysis


def _write(place: Path, analysis: PolicyAnalysis) -> None:
    """Write tables and results; parts that an earlier call made of the same rollouts stay, unless they were made anew.

    Results of other rollouts go first, and new ones come last, so that no table stands beside those of other rollouts.
    """
    found = analysis.to_json()
    earlier = _earlier(place / ANALYSIS_FILE, found)
    kept = {part: earlier[part] for part in TABLES if earlier.get(part) and not found[part]}
    if kept:
        found |= kept
        found["warnings"] = list(dict.fromkeys([*earlier["warnings"], *found["warnings"]]))
        found["seconds"] += earlier["seconds"]
    if not earlier:
        (place / ANALYSIS_FILE).unlink(missing_ok=True)
    remove_partial_files(place)
    tables = {place / f"{name}.parquet": rows for name, rows in _tables(analysis).items() if rows}
    stay = tuple(TABLES[part] for part in kept)
    for path in set(place.glob("*.parquet")) - set(tables):
        if not path.name.startswith(stay):
            path.unlink()
    for path, rows in tables.items():
        write_table(path, pa.Table.from_pylist(rows))
    write_json(place / ANALYSIS_FILE, found)


def _earlier(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call found of the same rollouts; empty if there is none."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    same = all(earlier.get(name) == found[name] for name in ("task", "split", "items", "site", "greedy", "checkpoint"))
    return earlier if same else {}


def _helped(rollouts: PolicyRollouts, branches: BranchPoints | None, config: AnalyzeConfig) -> Helped:
    if rollouts.prompts.max_new_tokens == 1 or config.headroom_features is not None:
        count = config.headroom_features or COUNT
        return helped_by_headroom(rollouts, items=config.headroom_items, features=count, seed=config.seed)
    if branches is None:
        return Helped(None, None, "not measured: branch points were not looked for, nor --headroom-features given")
    return Helped(
        branches.rescued, None, "one replaced decision at the tokens tried for branch points", lower_bound=True
    )


def _layers(runs: Sequence[TrainedRun], config: AnalyzeConfig) -> tuple[LayerReport, ...]:
    found: list[LayerReport] = []
    texts: dict[Any, TextRows] = {}
    each = [min(config.layer_items, len(one.setup.task.items("validation"))) for one in runs]
    with Meter("comparing layers", sum(each) * (1 + len({*config.dose_factor, 1.0}))) as meter:
        for one in runs:
            setup = replace(one.setup, meter=meter)
            key = (id(setup.model), setup.site)
            if key not in texts:
                texts[key] = text_rows(setup.model, setup.site, config.text, rows=config.text_rows, seed=config.seed)
            found.append(
                layer_report(
                    setup,
                    one.policy,
                    setup.prompts("validation", config.layer_items),
                    texts[key],
                    run=str(one.run.path),
                    factors=config.dose_factor,
                    live_sample=config.live_sample,
                    seed=config.seed,
                )
            )
    return tuple(found)


def _tables(analysis: PolicyAnalysis) -> dict[str, list[dict[str, Any]]]:
    """Rows of every table by its name."""
    tables: dict[str, list[dict[str, Any]]] = {}
    if analysis.branch_points is not None:
        tables["branch_points"] = [flat_row(token) for token in analysis.branch_points.tokens]
        tables["branch_forks"] = [flat_row(fork) for fork in analysis.branch_points.forks]
    if analysis.critic is not None:
        tables["critic_curve"] = [flat_row(point) for point in analysis.critic.curve]
        tables["critic_auc"] = [flat_row(one) for one in analysis.critic.separations]
    if analysis.layers:
        named = [({"run": layer.run, "site": layer.site}, layer) for layer in analysis.layers]
        tables["layer_doses"] = [name | flat_row(point) for name, layer in named for point in layer.doses]
        tables["layer_kinds"] = [name | flat_row(kind) for name, layer in named for kind in layer.kinds]
        factors = [factor.replace(" ", "_") for factor in FACTORS]
        tables["layer_shares"] = [
            name | {"feature": feature} | dict(zip(factors, shares, strict=True))
            for name, layer in named
            for feature, shares in layer.shares.items()
        ]
    if analysis.ledger is not None:
        entries = analysis.ledger.entries
        tables["ledger"] = [flat_row(entry) for entry in entries]
        tables["ledger_tokens"] = [{"feature": e.feature} | flat_row(token) for e in entries for token in e.tokens]
        tables["ledger_contexts"] = [{"feature": e.feature} | flat_row(use) for e in entries for use in e.contexts]
    return tables

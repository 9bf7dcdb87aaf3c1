"""`trimtab policy compare`: runs of one task side by side, from what they hold. No model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Group
from rich.text import Text

from trimtab.errors import UserError
from trimtab.policies.file_names import EVALUATION_FILE, HEADROOM_FILE, ITEMS_FILE
from trimtab.runs import json_safe, read_json, read_metrics, read_record
from trimtab.runs.tables import INTERVAL, NUMBER, Column, result_table
from trimtab.stats import Interval, bootstrap_mean, number_text

_READ_BY = ("task_option", "judge", "judge_option")
SETTINGS = ("model", "sae", "site", "mask", "dose", "unit", "seed", *_READ_BY)
"""Fields of the config that runs are compared by; those that all share stand in the title."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Put several runs of one task side by side: masks, layers, doses, seeds."""

    run: tuple[Path, ...] = ()
    """Runs of `policy train`, and of `policy evaluate --run` where results lie there."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("policy compare", "there is no run to compare", "name runs of `policy train`")


@dataclass(frozen=True, kw_only=True)
class InsideMask:
    """What an edit could earn inside a run's mask, at its dose."""

    split: str
    items: int
    unsteered: float
    static: float
    """The best single feature, cross-fitted."""
    ceiling: float
    """The best feature of each item."""
    over_static: float
    """What a policy could gain over the best static feature, or over no edit where that is better."""
    lower_bound: bool
    """Whether features that were not tried could raise the ceiling."""

    @property
    def span(self) -> str:
        """From the static line to the ceiling."""
        return f"{number_text(self.static, '.2f')} → {'≥ ' * self.lower_bound}{number_text(self.ceiling, '.2f')}"


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run's numbers; None for what it does not hold."""

    run: str
    status: str
    settings: dict[str, Any]
    """The fields `SETTINGS` of its config."""
    split: str
    """Where the reward is from; on validation the checkpoint was chosen."""
    items: int | None
    reward: float | None
    interval: Interval | None
    """95%, over items; only where the run was evaluated."""
    unsteered: float | None
    checkpoint: int | None
    """Iteration whose policy was kept, as the best on validation; 0 for the untrained one."""
    effective_features: float | None
    """exp(entropy) of the kept policy over what is allowed, on validation items. A run that did not log it there gives
    the rollouts of the iteration after, which the same policy made; None if there was no iteration after."""
    allowed: float | None
    """Features that the mask allows there, on average."""
    no_edit_share: float | None
    """Share of decisions there without an edit."""
    kl: float | None
    """KL of the kept policy to the unsteered model in nats per answer: on `split` where evaluated, else in its rollouts
    if the training measured it and went on after it."""
    headroom: InsideMask | None
    iterations: int
    """How many were trained."""
    seconds: float | None
    """Of the last call of `policy train`."""


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Several runs of one task."""

    task: str
    runs: tuple[ComparedRun, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, intervals and headroom as dicts."""
        return json_safe(self)

    def render(self) -> Group:
        """One row a run; settings that all share stand in the title."""
        first = self.runs[0].settings
        varying = [name for name in SETTINGS if len({str(run.settings[name]) for run in self.runs}) > 1]
        shared = [f"{name} {first[name]}" for name in SETTINGS if name not in varying and first[name] is not None]
        columns = [
            Column("run", lambda run: Path(run.run).name, whole=True),
            *(Column(name, lambda run, name=name: str(run.settings[name]), whole=name == "site") for name in varying),
            Column("reward", lambda run: run.reward if run.interval is None else run.interval, INTERVAL),
            Column("on", "split"),
            Column("unsteered", "unsteered", INTERVAL),
            Column("static → ceiling", "headroom.span", INTERVAL),
            Column(
                "kept", lambda run: None if run.checkpoint is None else f"{run.checkpoint} of {run.iterations}", "d"
            ),
            Column("exp(H)", _effective, ",.1f"),
            Column("no edit", "no_edit_share", ".0%"),
            Column("KL", "kl", NUMBER),
            Column("seconds", "seconds", ".0f"),
        ]
        table = result_table(
            columns,
            self.runs,
            title=f"{self.task}: {', '.join(shared)}",
            caption="reward: with a 95% interval over items where the run was evaluated, else the best on validation, "
            "where the checkpoint was chosen. kept: the iteration whose policy was kept (0: the untrained one), of "
            "those trained; what follows is that policy's. exp(H): its effective number of features, of those allowed. "
            "no edit: share of its decisions. KL: to the unsteered model, in nats per answer. seconds: of training. "
            "static → ceiling: what an edit inside the mask earns, with the best single feature and with each item's "
            "best.",
        )
        return Group(table, *(Text(f"warning: {warning}") for warning in self.warnings))


def compare_runs(config: CompareConfig) -> RunComparison:
    """Read runs and put them side by side.

    Raises:
        UserError: a run is no policy's, is damaged, or is of another task than the first one.
    """
    places = tuple(dict.fromkeys(config.run))
    records = {path: read_record(path) for path in places}
    for path, record in records.items():
        if record["command"] not in ("policy train", "policy evaluate"):
            raise UserError(
                f"run {path}", f"it belongs to `{record['command']}`, not `policy train`",
                "name runs of `policy train`",
            )  # fmt: skip
    trained = {path: record for path, record in records.items() if record["command"] == "policy train"}
    if not trained:
        raise UserError("policy compare", "none of the runs is of `policy train`", "name the trainings as well")
    tasks = {path: record["config"]["task"] for path, record in trained.items()}
    task = next(iter(tasks.values()))
    for path, other in tasks.items():
        if other != task:
            raise UserError(f"run {path}", f"its task is {other}, not {task}", "compare the runs of one task")
    runs = tuple(_compared(path, record, places) for path, record in trained.items())
    return RunComparison(task=task, runs=runs, warnings=_warnings(runs, list(trained.values())))


def _compared(path: Path, record: Mapping[str, Any], places: Sequence[Path]) -> ComparedRun:
    config, results = record["config"], record["results"] or {}
    metrics = read_metrics(path)
    kept, choices = _kept(metrics)
    evaluated = next(filter(None, (_evaluated(path, config["seed"], place) for place in (path, *places))), None)
    validated = {
        "split": "validation",
        "items": len(record["splits"].get("validation", ())) or None,
        "reward": kept.get("validation/reward"),
        "interval": None,
        "unsteered": results.get("unsteered_validation_reward"),
        "kl": choices.get("kl_unsteered"),
    }
    return ComparedRun(
        run=str(path),
        status=record["status"],
        settings={name: _setting(config.get(name)) for name in SETTINGS},
        checkpoint=kept.get("step"),
        headroom=_inside(path, config),
        iterations=max((line["step"] for line in metrics), default=0),
        seconds=results.get("seconds"),
        **{name: choices.get(name) for name in ("effective_features", "allowed", "no_edit_share")},
        **(evaluated or validated),
    )


def _setting(value: Any) -> Any:
    return (" ".join(value) or None) if isinstance(value, list) else value


def _kept(metrics: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The line of the validation at which the kept policy was the best, the earliest at ties, and how it chose.

    An iteration's rollouts are made before its update, so that those of the next one are the kept policy's.
    """
    validated = [line for line in metrics if line.get("validation/reward") is not None]
    if not validated:
        return {}, {}
    kept = max(validated, key=lambda line: line["validation/reward"])
    rolled = next((line for line in metrics if line["step"] == kept["step"] + 1 and "policy/entropy" in line), {})
    found = {}
    for line, prefix in ((rolled, "policy/"), (kept, "validation/")):
        found |= {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
    return kept, found


def _evaluated(path: Path, seed: int, place: Path) -> dict[str, Any] | None:
    """What an evaluation that lies in a directory says of a run, by fields; None if it is not about it."""
    evaluation = read_json(place / EVALUATION_FILE)
    if evaluation is None:
        return None
    own = place == path  # it may have been moved since
    about = (
        Path(run).name == path.resolve().name if own else Path(run).resolve() == path.resolve()
        for run in evaluation["runs"]
    )  # fmt: skip
    if (True, seed) not in zip(about, evaluation["seeds"], strict=True):
        return None
    result = evaluation["result"]
    arms = {arm["label"]: arm for arm in result["arms"]}
    rewards, kls = _items(place / ITEMS_FILE, result, seed)
    return {
        "split": result["split"],
        "items": len(rewards) or None,
        "reward": float(np.mean(rewards or arms["policy"]["by_seed"][evaluation["seeds"].index(seed)])),
        "interval": bootstrap_mean(rewards) if rewards else None,
        "unsteered": arms["unsteered"]["reward"]["estimate"] if "unsteered" in arms else None,
        "kl": float(np.mean(kls)) if kls else None,
    }


def _items(path: Path, result: Mapping[str, Any], seed: int) -> tuple[list[float], list[float]]:
    """Rewards, and divergences where they were measured, of the policy's own answers under one seed."""
    if not path.exists():
        return [], []
    of_policy = [("arm", "=", "policy"), ("task", "=", result["task"]), ("split", "=", result["split"])]
    try:
        table = pq.read_table(path, columns=["reward", "kl"], filters=[*of_policy, ("seed", "=", seed)])
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise UserError(str(path), "it is not readable as Parquet", "evaluate the run again") from error
    return table["reward"].to_pylist(), [kl for kl in table["kl"].to_pylist() if kl is not None]


def _inside(path: Path, config: Mapping[str, Any]) -> InsideMask | None:
    """Headroom inside the run's own mask and at its dose, if it was measured."""
    measured = read_json(path / HEADROOM_FILE) or {"lines": []}
    own = [line for line in measured["lines"] if all(line[name] == config[name] for name in ("mask", "dose", "unit"))]
    if not own:
        return None
    line = own[0]
    return InsideMask(
        split=measured["split"],
        items=line["items"],
        over_static=line["over_static"],
        lower_bound=line.get("ceiling_is_lower_bound", False),
        **{name: line[name]["estimate"] for name in ("unsteered", "static", "ceiling")},
    )


def _warnings(runs: Sequence[ComparedRun], records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What keeps the rows from being comparable."""
    found = []
    if unfinished := [Path(run.run).name for run in runs if run.status != "done"]:
        found.append(f"not finished: {', '.join(unfinished)}")
    if len({tuple(run.settings[name] for name in _READ_BY) for run in runs}) > 1:
        found.append("rewards do not mean the same: the runs differ in options of the task or in the judge")
    if len(splits := sorted({run.split for run in runs})) > 1:
        found.append(f"rewards are on different items: {', '.join(splits)}; evaluate all runs on the same")
    elif splits == ["validation"]:
        found.append("rewards are on validation, where checkpoints were chosen; see `trimtab policy evaluate`")
        if len({tuple(record["splits"].get("validation", ())) for record in records}) > 1:
            found.append("validation items differ between the runs")
    if without := [Path(run.run).name for run in runs if run.headroom is None]:
        found.append(f"no headroom inside the mask: {', '.join(without)}; train with --headroom-items to measure it")
    return tuple(found)


def _effective(run: ComparedRun) -> str:
    allowed = "" if run.effective_features is None or run.allowed is None else f" of {run.allowed:,.0f}"
    return number_text(run.effective_features, ",.1f") + allowed

"""`trimtab policy evaluate`: trained policies beside their controls, on items that chose nothing.

Everything is chosen on validation (the setting among the runs given, static features and doses, gates, instructions,
scales of equal KL) or trained on training items; the split is then opened once, and every opening is recorded in the
runs. Runs that differ in their seed alone are one setting.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.control.adapter import AdapterPositions
from trimtab.control.arm import ARM_KINDS, Choosing, arm_kinds, find_kind
from trimtab.control.arms.static import LIVE_SAMPLE, sample_of_live, used_features
from trimtab.control.comparison import Comparison, compare_on, few
from trimtab.control.item_table import item_rows, write_item_rows
from trimtab.control.plan import Plan, measure_pace, plan_comparison
from trimtab.control.replicates import EqualKl, Replicate, choose_arms
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries.meanings import name_features
from trimtab.errors import UserError
from trimtab.policies.file_names import EVALUATION_FILE, ITEMS_FILE
from trimtab.policies.headroom.candidates import COUNT
from trimtab.policies.headroom.lines import chosen_features
from trimtab.policies.headroom.trials import own_headroom
from trimtab.policies.openings import OPENED, open_items, opened_elsewhere
from trimtab.policies.setup import Setup
from trimtab.policies.traces import write_traces
from trimtab.policies.trained import TrainedRun, open_trained, setting_of
from trimtab.runs import (
    LEFT_OUT_AT_DEFAULT,
    Meter,
    Run,
    check_choices,
    check_least,
    check_values,
    config_dict,
    write_json,
)
from trimtab.tasks import Companion, Item, Task, load_task

QUICKLY = "--quick: fewer items, candidates, draws and steps of training, and nothing at equal KL"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Show trained policies beside their controls."""

    policy: tuple[Path, ...] = ()
    """Runs of `policy train`; those that differ in their seed alone are seeds of one setting."""
    split: str = "test"
    """Split to report on; everything is chosen on validation."""
    skip: int = 0
    """Leave out as many items first, such as those that earlier evaluations looked at."""
    items: int | None = None
    """Use only this many items of the split."""
    control: tuple[str, ...] = field(default_factory=lambda: tuple(ARM_KINDS))
    """Controls beside the policy; one of your own as module:Class."""
    equal_kl: bool = True
    """Show controls at equal divergence from the unsteered model, too."""
    kl_items: int = 64
    """Validation items by which doses are scaled to equal divergence."""
    kl_tolerance: float = 0.05
    """Relative difference of mean divergences that counts as equal."""
    feature: tuple[int, ...] = ()
    """Static features to try besides the policy's own and a sample."""
    used: int = 32
    """How many of the policy's most used features to try as the static one."""
    n_random: int = 96
    """How many random live features to try as the static one."""
    headroom_items: int = 0
    """Validation items on which to try every feature for the best static ones."""
    headroom_features: int = COUNT
    """Features to try there where answers are longer than one token: the highest in delta-confidence."""
    finalists: int = 16
    """Static features that are tried on all validation items and at all doses."""
    dose_factor: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Doses of the static feature that are tried, as multiples of the policy's."""
    draws: int = 3
    """Repetitions of the random and the shuffled control."""
    train_items: int = 512
    """Training items for controls that are fitted."""
    instruction: tuple[str, ...] = ()
    """Instructions to choose from; a few written for the task by default."""
    vector_steps: int = 100
    """Steps of training the vector."""
    lora_steps: int = 100
    """Steps of training the LoRA."""
    lora_rank: int = 8
    """Rank of the LoRA."""
    lora_positions: AdapterPositions = "generated"
    """Where the LoRA acts: where the policy may edit (`generated`), or on prompts too (`all`)."""
    every_order: bool = True
    """Where an item's options have an order: play the main arms under every cyclic order, too, and report what is known
    (right under all of them)."""
    companions: bool = True
    """Show the main arms on the tasks that must stand beside this one."""
    quick: bool = field(default=False, metadata=LEFT_OUT_AT_DEFAULT)
    """Do less of everything that is left at its default: 64 items, one draw, fewer candidates and steps of training,
    one order, nothing at equal KL. What comes of it is a first look."""
    trace: bool = True
    """Write the trace of the policy's arm, with the effect of every edit."""
    keep_texts: bool = False
    """Keep the answers to harmful prompts, too. Without it, files hold no token or text of a task about refusals."""
    seed: int = 0
    """Of samples of features and of the bootstrap."""
    run: Path | None = None
    """Directory for the results; the first run's own by default."""

    def __post_init__(self) -> None:
        if not self.policy:
            raise UserError("policy evaluate", "there is no run to evaluate", "name a run of `policy train`")
        check_choices(self)
        for name in self.control:
            find_kind(name)
        check_least(self, 1, "kl_items", "finalists", "draws", "train_items", "lora_rank", "items", "headroom_features")
        check_least(self, 0, "skip", "used", "n_random", "headroom_items", "vector_steps", "lora_steps")
        check_values(self, "between 0 and 1", lambda value: 0 < value < 1, "kl_tolerance")
        if not self.dose_factor or any(not 0 < factor < 1000 for factor in self.dose_factor):
            raise UserError(f"dose_factor {self.dose_factor}", "factors are above 0 and below 1000", "use 0.5 1 2")

    def settled(self) -> EvaluateConfig:
        """With `quick`, smaller numbers in place of defaults; what was given stays."""
        if not self.quick:
            return self
        usual = EvaluateConfig(policy=self.policy)
        return replace(self, **{name: n for name, n in QUICK.items() if getattr(self, name) == getattr(usual, name)})


QUICK: dict[str, Any] = {
    "items": 64, "equal_kl": False, "used": 8, "n_random": 24, "finalists": 4, "dose_factor": (1.0,), "draws": 1,
    "train_items": 128, "vector_steps": 25, "lora_steps": 25, "every_order": False,
}  # fmt: skip
"""What `--quick` puts in the place of defaults."""


def evaluate_policy(config: EvaluateConfig) -> Comparison:
    """Evaluate the policies of one or several runs and write the results.

    `evaluation.json` and `evaluation_items.parquet` go into the first policy's run, or `run`; the trace of each
    policy's own arm goes into its own run, or below `run`.

    Raises:
        UserError: a run is no run of `policy train`, holds no checkpoint, or is of another task, other options of it or
            another judge than the first one.
    """
    with ExitStack() as stack:
        entries = open_trained(config.policy, stack)
        home = None
        if config.run is not None:
            fields = {name: value for name, value in config_dict(config).items() if name != "run"}
            home = stack.enter_context(Run.open(config.run, "policy evaluate", fields, inputs=config))
        evaluation = evaluate_trained(entries, config, home=home)
        if home is not None:
            home.record(hides_text=entries[0].setup.task.hides_text)
            home.finish(evaluation.to_json())
    return evaluation


def evaluate_trained(entries: Sequence[TrainedRun], config: EvaluateConfig, *, home: Run | None = None) -> Comparison:
    """Evaluate policies whose runs are open.

    Args:
        entries: policies of one task.
        config: what is shown beside them; its `policy` and `run` are not used.
        home: where results go; the first reported run by default.
    """
    began, config = time.perf_counter(), config.settled()
    split, items = _asked(entries[0].setup.task, config)
    prompts = entries[0].setup.prompts_of(items)
    orders = prompts.other_orders(entries[0].setup.model) if config.every_order else []
    with Meter("evaluating", _plan(entries, config, len(items), len(orders)).total) as meter:
        entries, replicates, settings = _best_setting(
            [replace(entry, setup=replace(entry.setup, meter=meter)) for entry in entries], config
        )
        setup, runs = entries[0].setup, [entry.run for entry in entries]
        missing = _choose(setup, replicates, config)
        warnings = [*few(len(entries), len(items)), *[QUICKLY] * config.quick]
        if config.split in OPENED:
            ids = [item.id for item in items]
            warnings += [*open_items(runs, split, ids), *opened_elsewhere(runs, ids)]
        else:
            warnings.append(f"reported on {config.split}, where policies and controls were chosen or trained")
        compared = [compare_on(replicates, prompts, split, seed=config.seed, orders=orders)]
        chosen = [found["feature"] for arm in compared[0].result.arms for found in arm.chosen if "feature" in found]
        name_features(home or runs[0], setup.model, setup.dictionary, chosen)
        if config.trace:
            write_traces(entries, compared[0], home, keep_texts=config.keep_texts)
        for companion in setup.task.companions if config.companions else ():
            asked = _companion_prompts(companion, entries, config, missing)
            if asked is not None:
                compared.append(compare_on(replicates, asked, companion.split, companion=companion, seed=config.seed))
    evaluation = Comparison.of(
        replicates, compared, began, missing=missing, warnings=tuple(warnings), settings_compared=settings
    )
    place = (home or runs[0]).path
    rows = [row for one in compared for row in item_rows(one, replicates, keep_texts=config.keep_texts)]
    write_item_rows(place / ITEMS_FILE, rows)
    write_json(place / EVALUATION_FILE, evaluation.to_json())
    return evaluation


def _plan(entries: Sequence[TrainedRun], config: EvaluateConfig, test: int, orders: int) -> Plan:
    """How many answers will be asked for, said on stderr with the time that they take."""
    setup, policy = entries[0].setup, entries[0].policy
    prompts = _chosen_on(setup, config)
    count = len(config.feature) + config.used + config.n_random + 4 * config.finalists * (config.headroom_items > 0)
    plan = plan_comparison(
        arm_kinds(config.control, vars(config)),
        Choosing.of(setup, prompts, {"": range(count)}),
        test,
        trainings=len(entries),
        kl_items=config.kl_items * config.equal_kl,
        orders=orders,
        companions=test * len(setup.task.companions) * config.companions,
    )
    source = setup.with_own_caches().source(policy, greedy=True)
    for line in plan.lines(measure_pace(setup, prompts["validation"], source)):
        print(f"trimtab: {line}", file=sys.stderr, flush=True)
    return plan


def _chosen_on(setup: Setup, config: EvaluateConfig) -> dict[str, TaskPrompts]:
    """Training and validation items, by split."""
    train = min(config.train_items, setup.config.train_items or config.train_items)
    limits = {"train": train, "validation": setup.config.validation_items}
    return {split: setup.prompts(split, limit) for split, limit in limits.items()}


def _best_setting(
    entries: Sequence[TrainedRun], config: EvaluateConfig
) -> tuple[list[TrainedRun], list[Replicate], tuple[dict[str, Any], ...]]:
    """The runs of the setting with the highest mean reward on validation, and what each setting got."""
    replicates: list[Replicate] = []
    for one in entries:
        prompts = _chosen_on(one.setup, config)
        replicates.append(
            Replicate.of(one.setup, one.arm, prompts["train"], prompts["validation"], name=str(one.run.path))
        )
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i, entry in enumerate(entries):
        groups[json.dumps(setting_of(entry.setup.config), sort_keys=True)].append(i)
    compared = []
    for members in groups.values():
        setup, seeds = entries[members[0]].setup, [entries[i].setup.seed for i in members]
        if len(set(seeds)) < len(seeds):
            raise UserError("the runs", f"two of one setting have seed {seeds[0]}", "give each seed once")
        compared.append(
            {
                "site": str(setup.site),
                **{name: getattr(setup.config, name) for name in ("sae", "dose", "unit", "mask")},
                "seeds": seeds,
                "validation_reward": float(np.mean([replicates[i].answers.reward.mean() for i in members])),
            }
        )
    best = max(range(len(compared)), key=lambda i: (compared[i]["validation_reward"], -i))
    members = list(groups.values())[best]
    return [entries[i] for i in members], [replicates[i] for i in members], tuple(compared)


def _choose(setup: Setup, replicates: Sequence[Replicate], config: EvaluateConfig) -> dict[str, str]:
    """Choose and train the controls on training and validation items; what cannot be had, and why."""
    missing = dict[str, str]()
    setup.dictionary.check_features(list(config.feature))
    candidates: dict[str, Sequence[int]] = {
        "named": config.feature,
        "used by the policy": used_features((replicate.answers for replicate in replicates), config.used),
    }
    if config.headroom_items:
        validation = replicates[0].validation.prompts
        few = validation.take(range(min(config.headroom_items, len(validation))))
        try:
            table = own_headroom(replace(setup, mask="none"), few, count=config.headroom_features)
            candidates["headroom"] = chosen_features(table, 4 * config.finalists)
        except UserError as error:
            missing["the best features of the headroom as the static one"] = f"{error.what}: {error.why}"
            candidates["headroom"] = []
    candidates[LIVE_SAMPLE] = sample_of_live(setup, config.n_random, config.seed)
    kinds = arm_kinds(config.control, vars(config))
    equal_kl = EqualKl(config.kl_items, config.kl_tolerance) if config.equal_kl else None
    return missing | choose_arms(replicates, kinds, candidates=candidates, equal_kl=equal_kl)


def _asked(task: Task, config: EvaluateConfig) -> tuple[str, tuple[Item, ...]]:
    """The name and items of what is reported on."""
    items = task.items(config.split)
    split, total = config.split, len(items)
    last = min(total, config.skip + (total if config.items is None else config.items))
    if config.skip >= total:
        raise UserError(f"skip {config.skip}", f"the split {config.split} has {total} items", "skip fewer")
    if last - config.skip < total:
        items = task.sample(config.split, last)[config.skip :]
        split = f"{config.split}[{config.skip or ''}:{last}]"
    return split, items


def _companion_prompts(
    companion: Companion, entries: Sequence[TrainedRun], config: EvaluateConfig, missing: dict[str, str]
) -> TaskPrompts | None:
    """Items of a task that must stand beside the policy's, their opening recorded in every run."""
    setup = entries[0].setup
    try:
        options = setup.config.companion_options(setup.task, companion.task)
        task = load_task(companion.task, data=setup.config.data, tokenizer=setup.model.tokenizer, **options)
        items = task.sample(companion.split, config.items)
    except UserError as error:
        missing[f"companion {companion.task}"] = f"{companion.why}; but {error.what}: {error.why}"
        return None
    name = f"{task.name}/{companion.split}" + ("" if config.items is None else f"[:{len(items)}]")
    for entry in entries:
        entry.run.open_split(name, [item.id for item in items])
    return TaskPrompts.of(setup.model, task, items, options_only=setup.config.options_only and task.options_only)

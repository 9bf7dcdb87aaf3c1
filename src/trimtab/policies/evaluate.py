"""`trimtab policy evaluate`: trained policies beside their controls, on items that chose nothing.

Everything is chosen on validation (the setting among the runs given, static features and doses, gates, instructions,
scales of equal KL) or trained on training items; the split is then opened once, and every opening is recorded in the
runs. Runs that differ in their seed alone are one setting.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from trimtab.control.answers import EditSchedule, ItemSet
from trimtab.control.arms.static import sample_of_live, used_features
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import load_dictionary
from trimtab.errors import UserError
from trimtab.lm import load_model
from trimtab.policies.arms import (
    MAIN,
    Arm,
    arms_of_run,
    choose_shared,
    mean_kl,
    policy_answer,
    scale_to_kl,
)
from trimtab.policies.config import NOT_THE_RESULT, PolicyConfig
from trimtab.policies.evaluate_config import EvaluateConfig
from trimtab.policies.evaluation import AnsweredArm, PolicyEvaluation, TaskResult, task_result
from trimtab.policies.evaluation_files import (
    Entry,
    Player,
    item_rows,
    write_evaluation,
    write_traces,
)
from trimtab.policies.headroom import chosen_features
from trimtab.policies.reading import COMMAND, read_policy_config
from trimtab.policies.setup import Setup
from trimtab.policies.setup_headroom import setup_headroom
from trimtab.policies.task_options import TASK_FIELDS, check_same_rewards, companion_options, task_options
from trimtab.policies.train import load_policy
from trimtab.runs import Meter, Run, config_dict, read_record
from trimtab.runs.record import RECORD_NAME
from trimtab.tasks import Companion, Task, load_task, read_task

OPENED = ("test", "all")
"""Splits with items that nothing may be chosen on."""


def evaluate_policy(config: EvaluateConfig) -> PolicyEvaluation:
    """Evaluate the policies of one or several runs and write the results.

    `evaluation.json` and `evaluation_items.parquet` go into the first run's directory, or `out`; the trace of each
    policy's own arm goes into its run's directory, or below `out`.

    Raises:
        UserError: a run is no run of `policy train`, holds no checkpoint, or is of another task, other options of it or
            another judge than the first one.
    """
    with ExitStack() as stack:
        entries = _open(config, stack)
        home = None
        if config.out is not None:
            fields = {name: value for name, value in config_dict(config).items() if name != "out"}
            home = stack.enter_context(Run.open(config.out, "policy evaluate", fields))
        evaluation = evaluate(entries, config, home=home)
        if home is not None:
            home.record(hides_text=entries[0].setup.task.hides_text)
            home.finish(evaluation.to_json())
    return evaluation


def _open(config: EvaluateConfig, stack: ExitStack) -> list[Entry]:
    entries: list[Entry] = []
    for path in config.run:
        policy_config = read_policy_config(path)
        if entries:
            check_same_rewards(path, policy_config, entries[0].setup.config)
        setup = _setup(policy_config, entries)
        run = stack.enter_context(
            Run.open(path, COMMAND, policy_config, ignore_fields=NOT_THE_RESULT, device=policy_config.device)
        )
        entries.append(Entry(run=run, setup=setup, policy=load_policy(setup, run)))
    return entries


def _setup(config: PolicyConfig, known: Sequence[Entry]) -> Setup:
    """The surroundings of a run; what is the same as in an earlier one is not loaded again."""
    plain = _setting(config)
    for entry in known:
        if _setting(entry.setup.config) == plain:
            return entry.setup.with_seed_of(config)
    same = [e.setup for e in known if _same(e.setup.config, config, "model", "dtype", "device")]
    tasks = [s.task for s in same if _same(s.config, config, *TASK_FIELDS)]
    task = tasks[0] if tasks else read_task(config.task, config.data, **task_options(config))
    model = same[0].model if same else load_model(config.model, dtype=config.dtype, device=config.device)
    saes = [s.dictionary for s in same if s.config.sae == config.sae]
    sae = saes[0] if saes else load_dictionary(config.sae, model=model, device=model.device)
    return Setup.with_parts(config, model, sae, task)


def _same(a: PolicyConfig, b: PolicyConfig, *fields: str) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in fields)


def _setting(config: PolicyConfig) -> dict[str, Any]:
    """The config but for the seed and what does not change the result."""
    return {name: value for name, value in config_dict(config).items() if name not in (*NOT_THE_RESULT, "seed")}


def evaluate(entries: Sequence[Entry], config: EvaluateConfig, *, home: Run | None = None) -> PolicyEvaluation:
    """Evaluate policies whose runs are open.

    Args:
        entries: policies of one task.
        config: what is shown beside them; its `run` and `out` are not used.
        home: where results go; the first reported run by default.
    """
    began = time.perf_counter()
    missing: dict[str, str] = {}
    warnings: list[str] = []
    players = [_player(entry, config) for entry in entries]
    players, compared = _best_setting(players)
    seeds = tuple(player.seed for player in players)
    if len(seeds) < 3:
        warnings.append(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} only: the spread of trainings is not known")
    _make_arms(players, config, missing)
    first = players[0]
    task = first.entry.setup.task
    results: list[TaskResult] = []
    rows: list[dict[str, Any]] = []
    split, items = _opened(players, task, config, warnings)
    item_sets = [ItemSet.of(p.entry.setup, _episodes(p, task, items, own=True)) for p in players]
    labels = [arm.label for arm in first.arms]
    played = _play(players, item_sets, labels)
    orders = _other_orders(players, task, items) if config.every_order else []
    results.append(task_result(task, split, played, seed=config.seed, other_orders=orders))
    rows += item_rows(task, split, played, players, keep_texts=config.keep_texts)
    if config.trace:
        write_traces(players, item_sets, played, home, keep_texts=config.keep_texts)
    if config.companions:
        for companion in task.companions:
            found = _companion(companion, players, config, missing)
            if found is not None:
                results.append(found[0])
                rows += found[1]
    own = first.entry.setup.config
    evaluation = PolicyEvaluation(
        result=results[0],
        companions=tuple(results[1:]),
        runs=tuple(str(player.entry.run.path) for player in players),
        seeds=seeds,
        setting={"site": str(first.entry.setup.site), **{n: getattr(own, n) for n in ("dose", "unit", "mask")}},
        settings_compared=compared,
        missing=missing,
        warnings=tuple(warnings),
        seconds=time.perf_counter() - began,
    )
    write_evaluation((home or first.entry.run).path, evaluation, rows)
    return evaluation


def _player(entry: Entry, config: EvaluateConfig) -> Player:
    setup = entry.setup
    limit = config.train_items
    if setup.config.train_items is not None:
        limit = min(limit, setup.config.train_items)
    train = ItemSet.of(setup, setup.prompts("train", limit))
    validation = ItemSet.of(setup, setup.prompts("validation", setup.config.validation_items))
    (played,) = policy_answer(setup, entry.policy)(validation, 1.0)
    return Player(entry, train, replace(validation, schedule=EditSchedule.of(played)), played)


def _best_setting(players: list[Player]) -> tuple[list[Player], tuple[dict[str, Any], ...]]:
    """The runs of the setting with the highest mean reward on validation, and what each setting got."""
    groups: defaultdict[str, list[Player]] = defaultdict(list)
    for player in players:
        groups[json.dumps(_setting(player.entry.setup.config), sort_keys=True)].append(player)
    compared = []
    for members in groups.values():
        own = members[0].entry.setup.config
        seeds = [player.seed for player in members]
        if len(set(seeds)) < len(seeds):
            raise UserError("the runs", f"two of one setting have seed {seeds[0]}", "give each seed once")
        compared.append(
            {
                "site": str(members[0].entry.setup.site),
                **{name: getattr(own, name) for name in ("sae", "dose", "unit", "mask")},
                "seeds": seeds,
                "validation_reward": float(np.mean([player.played.reward.mean() for player in members])),
            }
        )
    best = max(range(len(compared)), key=lambda i: (compared[i]["validation_reward"], -i))
    return list(groups.values())[best], tuple(compared)


def _make_arms(players: list[Player], config: EvaluateConfig, missing: dict[str, str]) -> None:
    """Choose and train the controls, and scale those of equal KL, on training and validation items."""
    first = players[0]
    candidates: dict[str, Sequence[int]] = {
        "named": config.feature,
        "used by the policy": used_features((player.played for player in players), config.used),
    }
    for feature in config.feature:
        first.entry.setup.dictionary.check_features([feature])
    if config.headroom_items:
        candidates["headroom"] = _headroom_features(first, config, missing)
    candidates["sample of live features"] = sample_of_live(first.validation, config.sample, config.seed)
    shared = choose_shared(
        first.train,
        first.validation,
        config.controls,
        candidates,
        effort=config.effort,
        instructions=config.instruction,
    )
    missing |= shared.missing
    with Meter("choosing and training controls", len(players)) as meter:
        for player in players:
            entry = player.entry
            player.arms = arms_of_run(
                entry.setup, entry.policy, player.train, player.validation, shared, config.controls, config.effort,
                missing,
            )  # fmt: skip
            player.arms = _scaled(player, config, missing)
            meter.advance()
    common = set.intersection(*({arm.label for arm in player.arms} for player in players))
    for player in players:
        for arm in player.arms:
            if arm.label not in common:
                missing[arm.label] = "not to be had in every run"
        player.arms = [arm for arm in player.arms if arm.label in common]


def _headroom_features(player: Player, config: EvaluateConfig, missing: dict[str, str]) -> list[int]:
    few = player.validation.prompts.take(range(min(config.headroom_items, len(player.validation))))
    try:
        table = setup_headroom(player.entry.setup, few, count=config.headroom_features, masked=False)
    except UserError as error:
        missing["the best features of the headroom as the static one"] = f"{error.what}: {error.why}"
        return []
    return [feature for feature, _ in chosen_features(table, 4 * config.finalists)]


def _scaled(player: Player, config: EvaluateConfig, missing: dict[str, str]) -> list[Arm]:
    """The arms, those of equal KL at the scale that validation items ask for."""
    few = player.validation.take(range(min(config.kl_items, len(player.validation))))
    target = mean_kl(policy_answer(player.entry.setup, player.entry.policy)(few, 1.0))
    arms = []
    for arm in player.arms:
        if arm.match != "kl":
            arms.append(arm)
        elif config.equal_kl and target > 0:
            arms.append(scale_to_kl(arm, few, target, tolerance=config.kl_tolerance))
        elif config.equal_kl:
            missing[arm.label] = "the policy changes no distribution on validation"
    return arms


def _opened(
    players: list[Player], task: Task, config: EvaluateConfig, warnings: list[str]
) -> tuple[str, tuple[Any, ...]]:
    """The split's name and items, its opening recorded in every run."""
    items = task.items(config.split)
    split, total = config.split, len(items)
    last = min(total, config.skip + (total if config.items is None else config.items))
    if config.skip >= total:
        raise UserError(f"skip {config.skip}", f"the split {config.split} has {total} items", "skip fewer")
    if last - config.skip < total:
        items = task.sample(config.split, last)[config.skip :]
        split = f"{config.split}[{config.skip or ''}:{last}]"
    if config.split in OPENED:
        ids = [item.id for item in items]
        for player in players:
            run = player.entry.run
            if before := _openings(run.record_dict, ids):
                warnings.append(f"the test split was opened before ({before}× in {run.path.name})")
            run.open_split(split, ids)
        warnings += _opened_elsewhere(players, ids)
    else:
        warnings.append(f"reported on {config.split}, where policies and controls were chosen or trained")
    return split, items


def _openings(record: Mapping[str, Any], ids: Sequence[str]) -> int:
    """How often a run looked at any of these items of a split that nothing may be chosen on."""
    splits, mine = record["splits"], set(ids)
    names = [opening["split"] for opening in record["test_split_openings"]]
    return sum(name.startswith(OPENED) and not mine.isdisjoint(splits.get(name, ())) for name in names)


def _opened_elsewhere(players: Sequence[Player], ids: Sequence[str]) -> list[str]:
    """Whether runs beside these looked at the items: what was seen there may have shaped what was trained here."""
    own = {player.entry.run.path.resolve() for player in players}
    task = players[0].entry.setup.config.task  # as it was called, like a task of one's own by module and class
    found = []
    for place in sorted({path.parent for path in own}):
        for file in sorted(place.glob(f"*/{RECORD_NAME}")):
            if file.parent.resolve() in own:
                continue
            try:
                record = read_record(file.parent)
            except UserError:
                continue
            if record["config"].get("task") == task and _openings(record, ids):
                found.append(file.parent.name)
    if not found:
        return []
    return [f"runs beside these looked at the same test items before ({', '.join(found)}): use --skip for fresh ones"]


def _episodes(player: Player, task: Task, items: Sequence[Any], *, own: bool, permutation: int = 0) -> TaskPrompts:
    config = player.entry.setup.config
    return TaskPrompts.of(
        player.entry.setup.model,
        task,
        items,
        options_only=config.options_only and (own or task.options_only),
        max_new_tokens=config.max_new_tokens if own else None,
        permutation=permutation,
    )


def _play(players: list[Player], item_sets: list[ItemSet], labels: Sequence[str]) -> list[AnsweredArm]:
    """Answer the arms of these labels on every run's items, the policy first, since others follow its schedule."""
    by_label = [{arm.label: arm for arm in player.arms} for player in players]
    found: dict[str, AnsweredArm] = {}
    with Meter("playing arms", len(labels)) as meter:
        for label in sorted(labels, key=lambda label: label != "policy"):
            arms = [arms_of[label] for arms_of in by_label]
            if not arms[0].per_run:
                found[label] = AnsweredArm(arms[:1], [arms[0].answers(item_sets[0])])
            else:
                found[label] = AnsweredArm(
                    arms, [arm.answers(items) for arm, items in zip(arms, item_sets, strict=True)]
                )
            if label == "policy":
                for i, (played,) in enumerate(found[label].runs):
                    item_sets[i] = replace(item_sets[i], schedule=EditSchedule.of(played))
            meter.advance()
    return [found[label] for label in labels]


def _other_orders(players: list[Player], task: Task, items: Sequence[Any]) -> list[list[AnsweredArm]]:
    """The main arms under the other cyclic orders of the items' options, an order at a time."""
    arms = [arm for arm in players[0].arms if arm.name in MAIN and arm.match == "own"]
    found = []
    for permutation in range(1, min(task.orders(item) for item in items)):
        item_sets = [
            ItemSet.of(p.entry.setup, _episodes(p, task, items, own=True, permutation=permutation)) for p in players
        ]
        found.append(_play(players, item_sets, [arm.label for arm in arms]))
    return found


def _companion(
    companion: Companion, players: list[Player], config: EvaluateConfig, missing: dict[str, str]
) -> tuple[TaskResult, list[dict[str, Any]]] | None:
    """The main arms on a task that must stand beside the policy's."""
    setup = players[0].entry.setup
    try:
        options = companion_options(setup.config, setup.task, companion.task)
        task = load_task(companion.task, data=setup.config.data, tokenizer=setup.model.tokenizer, **options)
        items = task.sample(companion.split, config.items)
    except UserError as error:
        missing[f"companion {companion.task}"] = f"{companion.why}; but {error.what}: {error.why}"
        return None
    for player in players:
        name = f"{task.name}/{companion.split}" + ("" if config.items is None else f"[:{len(items)}]")
        player.entry.run.open_split(name, [item.id for item in items])
    item_sets = [ItemSet.of(p.entry.setup, _episodes(p, task, items, own=False)) for p in players]
    labels = [arm.label for arm in players[0].arms if arm.name in MAIN and arm.match != "kl"]
    played = _play(players, item_sets, labels)
    result = task_result(task, companion.split, played, why=companion.why, seed=config.seed)
    return result, item_rows(task, companion.split, played, players, keep_texts=config.keep_texts)

"""Policies beside their controls, on a planted readout: numbers in closed form, choices on validation, one opening."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from planted_readout import SITE, HalfHurt, Planted
from rich.console import Console

from trimtab.control import plan
from trimtab.control.answers import Answers
from trimtab.control.arm import ARM_KINDS, Arm, find_kind, register
from trimtab.control.comparison import Comparison
from trimtab.control.task_result import AnsweredArm, task_result
from trimtab.dictionaries import Standard, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.policies import evaluate as module
from trimtab.policies.config import PolicyConfig
from trimtab.policies.evaluate import EvaluateConfig, evaluate_policy, evaluate_trained
from trimtab.policies.networks import Policy
from trimtab.policies.ppo import PPOConfig
from trimtab.policies.setup import Setup
from trimtab.policies.trained import TrainedRun, read_policy_config
from trimtab.runs import Meter, Run, config_dict, read_record, read_typed
from trimtab.steering import Trace
from trimtab.tasks import Companion, Outcome, Task
from trimtab.training.checkpoint import Checkpoint, write_checkpoint

QUICK = {"n_random": 8, "finalists": 4, "draws": 2, "vector_steps": 10, "lora_steps": 2, "kl_items": 16}


class WithCompanion(Planted):
    """Always Y, beside a task where that is wrong half of the time, and one that cannot be had."""

    companions = (
        Companion("planted_readout:HalfHurt", "test", "always saying Y would win"),
        Companion("mmlu", "test", "it must not be forgotten"),
    )


def entry(
    path: Path, lm: LanguageModel, dictionary: Standard, task: Task, feature: int, /, **settings: object
) -> TrainedRun:
    """A finished run whose policy always picks one feature."""
    values: dict[str, object] = {"task": task.name, "run": path, "mask": "none", "dose": 2.0, "options_only": True}
    config = PolicyConfig(**(values | {"hidden": (8,)} | settings))  # pyright: ignore[reportArgumentType]
    policy = Policy.build(dictionary.directions, hidden=(8,), seed=config.seed)
    with torch.no_grad():
        policy.actor.head.bias[feature] = 1e4  # pyright: ignore[reportIndexIssue]
    run = Run.open(path, "policy train", config)
    (path / "checkpoints").mkdir()
    tensors = {f"best.{name}": t for name, t in policy.state_dict().items()}
    write_checkpoint(path / "checkpoints", Checkpoint(1, tensors, {}))
    run.finish()
    return TrainedRun(run=run, setup=Setup.with_parts(config, lm, dictionary, task), policy=policy)


def run_all(place: Path, model: LanguageModel, dictionary: Standard, seeds: int, **settings: object) -> Comparison:
    """Evaluate seeds of a policy that always picks the planted feature."""
    task = WithCompanion.load()
    entries = [entry(place / f"seed{s}", model, dictionary, task, 0, seed=s) for s in range(seeds)]
    evaluation = evaluate_trained(entries, EvaluateConfig(policy=(place,), **(QUICK | settings)))  # pyright: ignore
    for one in entries:
        one.run.close()
    return evaluation


@pytest.fixture(scope="module")
def evaluated(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, Path]:
    """Three seeds, a few controls, the companions."""
    place = tmp_path_factory.mktemp("runs")
    controls = ("random", "static", "vector", "letters")
    return run_all(place, planted, planted_dictionary, 3, control=controls, equal_kl=False), place


@pytest.fixture(scope="module")
def beside_all(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    """One seed beside all controls."""
    return run_all(tmp_path_factory.mktemp("all"), planted, planted_dictionary, 1, companions=False, trace=False)


def test_every_control_stands_beside_the_policy_with_its_interval(
    evaluated: tuple[Comparison, Path], beside_all: Comparison
) -> None:
    labels = {arm.label for arm in beside_all.result.arms}
    names = ("random", "random-allowed", "most-active", "static", "gated", "corrsteer", "shuffled", "vector")
    assert {f"{name} at equal {match}" for name in names for match in ("dose", "kl")} <= labels
    own = {"unsteered", "policy", "static", "gated", "corrsteer", "vector", "lora", "prompting"}
    assert {*own, "letters: always the same", "letters: prior removed"} <= labels
    assert not beside_all.missing
    assert evaluated[0].seeds == (0, 1, 2)
    for evaluation, counts in ((beside_all, {1, 2}), (evaluated[0], {1, 3, 6})):
        for arm in evaluation.result.arms:
            assert arm.reward.n == evaluation.result.items == 62
            assert arm.reward.low <= arm.reward.estimate <= arm.reward.high
            assert (arm.difference is None) == (arm.label == "policy")
            assert len(arm.by_seed) in counts


PHASES = {
    "choosing the best static feature": "choosing static",
    "choosing the gate of a static feature": "choosing gated",
    "choosing CorrSteer's feature": "choosing corrsteer",
    "choosing the prior of letters": "choosing letters",
    "choosing an instruction": "choosing prompting",
    "choosing a LoRA": "choosing lora",
    "choosing a vector": "choosing vector",
}
"""What the meter says while each part of the plan is done."""


def check_plan(model: LanguageModel, dictionary: Standard, place: Path, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """No more is answered than the plan says, and not far less; gives what was said on stderr before."""
    planned: list[tuple[Meter, float]] = []
    said, phases = io.StringIO(), Counter[str]()

    class Watched(Meter):
        def __enter__(self) -> Meter:
            planned.append((self, self.total or 0))
            assert self.completed == 0
            assert "answers, about" in said.getvalue()
            return super().__enter__()

        def advance(self, steps: float = 1.0) -> None:
            phases[self.description] += steps
            super().advance(steps)

    patch.setattr(module, "Meter", Watched)
    patch.setattr(sys, "stderr", said)
    run_all(place, model, dictionary, 2, trace=False, used=2)
    ((meter, total),) = planned
    assert 0.4 * total <= meter.completed <= total
    head, *parts = [line.removeprefix("trimtab: ") for line in said.getvalue().splitlines() if "answers" in line]
    assert head.startswith(f"up to {total:,} answers, about ")
    counts = {part.strip().split(":")[0]: int(part.split(": ")[1].split()[0].replace(",", "")) for part in parts}
    assert sum(counts.values()) == total
    for what, phase in PHASES.items():
        assert 0.4 * counts.get(what, 0) <= phases[phase] <= counts.get(what, 0), what
    return counts


def test_the_plan_is_said_before_and_not_exceeded(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = check_plan(planted, planted_dictionary, tmp_path, monkeypatch)
    assert set(parts) == {
        *PHASES,
        "the reference on validation",
        "matching dose and KL",
        "test items",
        "companion tasks",
    }


@pytest.mark.parametrize("forgotten", ["searches", "static", "lora"])
def test_what_a_plan_forgets_is_noticed(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    forgotten: str,
) -> None:  # fmt: skip
    if forgotten == "searches":
        monkeypatch.setattr(plan, "TRIES", 0)
    else:
        monkeypatch.setattr(ARM_KINDS[forgotten], "effort", lambda *_: {})
    with pytest.raises(AssertionError):
        check_plan(planted, planted_dictionary, tmp_path, monkeypatch)


def test_quick_does_less_of_what_was_not_asked_for() -> None:
    run = (Path("runs/a"),)
    quick = EvaluateConfig(policy=run, quick=True, draws=7, equal_kl=True).settled()
    usual = EvaluateConfig(policy=run)
    assert (quick.draws, quick.equal_kl) == (7, False)  # what is given at its default cannot be told from it
    assert (quick.items, quick.lora_steps, quick.every_order) == (64, 25, False)
    assert usual.settled() == usual
    assert "quick" not in config_dict(usual)


def test_a_refused_evaluation_leaves_no_directory(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = entry(tmp_path / "run", planted, planted_dictionary, Planted.load(), 0)
    one.run.close()
    monkeypatch.setattr(module, "open_trained", lambda *_: [one])
    with pytest.raises(UserError, match="skip 1000: the split test has 62 items"):
        evaluate_policy(EvaluateConfig(policy=(tmp_path / "run",), skip=1000, run=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rewards_and_differences_have_their_closed_form(beside_all: Comparison) -> None:
    result = beside_all.result
    unsteered = result.arm("unsteered").reward.estimate
    assert 0.3 < unsteered < 0.8
    assert result.arm("policy").reward.estimate == result.arm("static").reward.estimate == 1
    assert result.arm("static at equal dose").reward.estimate == 1
    difference = result.arm("unsteered").difference
    assert difference is not None
    assert difference.estimate == pytest.approx(1 - unsteered)
    assert difference.low > 0
    tie = result.arm("static at equal dose").difference
    assert tie is not None
    assert (tie.low, tie.estimate, tie.high) == (0, 0, 0)
    shuffled = result.arm("shuffled at equal dose")
    assert shuffled.reward.estimate == pytest.approx(unsteered)
    assert result.arm("letters: always the same").reward.estimate == 1
    assert (result.gain.format.estimate, result.gain.answer.estimate) == (0, pytest.approx(1 - unsteered))


def test_arms_at_equal_dose_have_it_and_arms_at_equal_kl_say_what_they_reached(beside_all: Comparison) -> None:
    result = beside_all.result
    policy = result.arm("policy")
    assert policy.dose is not None
    assert policy.dose.relative == pytest.approx(2.0, abs=1e-4)
    for arm in result.arms:
        if arm.match == "dose":
            assert arm.equal_dose is True, arm.dose_note
            assert arm.dose is not None
            assert arm.dose.relative == pytest.approx(2.0, rel=0.01)
        if arm.match == "kl":
            assert len(arm.kl_matches) == 1
            for match in arm.kl_matches:
                assert match["within"] == (abs(match["reached"] - match["target"]) <= 0.05 * match["target"])
    same = result.arm("static at equal kl")
    assert all(match["within"] and match["scale"] == 1 for match in same.kl_matches)
    assert same.kl == pytest.approx(policy.kl, rel=1e-4)


def test_choices_are_reported_with_how_many_were_tried(evaluated: tuple[Comparison, Path]) -> None:
    (chosen,) = evaluated[0].result.arm("static").chosen
    assert chosen["feature"] == 0
    assert chosen["origins"]["used by the policy"] == 1
    assert chosen["features_tried"] == sum(chosen["origins"].values()) >= 8
    assert [c["objective"] for c in evaluated[0].result.arm("vector").chosen] == 3 * [
        "cross-entropy of the right answer"
    ]


def test_companions_are_shown_or_said_to_be_missing(evaluated: tuple[Comparison, Path]) -> None:
    (companion,) = evaluated[0].companions
    assert companion.task == "half-hurt"
    right = np.mean([item.answer == "Y" for item in HalfHurt.load().items("test")])
    assert companion.arm("policy").reward.estimate == pytest.approx(right)
    assert {"unsteered", "policy", "random at equal dose", "static", "vector at equal dose"} <= {
        arm.label for arm in companion.arms
    }
    assert evaluated[0].missing["companion mmlu"].startswith("it must not be forgotten; but task mmlu")


def test_results_items_and_traces_are_written(evaluated: tuple[Comparison, Path]) -> None:
    evaluation, place = evaluated
    written = json.loads((place / "seed0/evaluation.json").read_text())
    assert written["result"]["task"] == "planted"
    assert written == json.loads(json.dumps(evaluation.to_json()))
    rows = pq.read_table(place / "seed0/evaluation_items.parquet").to_pylist()
    for arm in evaluation.result.arms:
        mine = [r["reward"] for r in rows if r["arm"] == arm.label and r["task"] == "planted"]
        assert len(mine) == 62 * len(arm.by_seed)
        assert np.mean(mine) == pytest.approx(arm.reward.estimate)
    for seed in range(3):
        record = read_record(place / f"seed{seed}")
        assert [o["split"] for o in record["test_split_openings"]] == ["test", "half-hurt/test"]
        assert record["status"] == "done"
        trace = Trace.read(place / f"seed{seed}")
        tokens, edits = trace.tokens.to_pylist(), trace.edits.to_pylist()
        assert len(tokens) == len(edits) == 62
        assert all(row["reward"] == 1 and row["value"] is not None and row["kl_total"] >= 0 for row in tokens)
        assert {row["feature"] for row in edits} == {0}
    text = Console(width=200, no_color=True, record=True)
    text.print(evaluation.render())
    said = text.export_text()
    assert "62 items, 3 seeds" in said
    assert "where the answer" in said
    assert "missing: companion mmlu" in said


def test_the_best_setting_on_validation_is_reported_and_a_second_opening_is_said(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path
) -> None:
    task = Planted.load()
    entries = [
        entry(tmp_path / "weak", planted, planted_dictionary, task, 0, dose=0.01),
        entry(tmp_path / "strong", planted, planted_dictionary, task, 0, dose=2.0),
        entry(tmp_path / "wrong", planted, planted_dictionary, task, 1, dose=3.0),
    ]
    config = EvaluateConfig(policy=(tmp_path,), control=("random",), equal_kl=False, trace=False, draws=1)
    for expected in (False, True):
        evaluation = evaluate_trained(entries, config)
        assert evaluation.runs == (str(tmp_path / "strong"),)
        assert evaluation.setting["dose"] == 2.0
        rewards = [setting["validation_reward"] for setting in evaluation.settings_compared]
        assert [setting["dose"] for setting in evaluation.settings_compared] == [0.01, 2.0, 3.0]
        assert rewards[1] == 1 > rewards[0] > rewards[2] == 0
        assert ("the test split was opened before (1× in strong)" in evaluation.warnings) == expected
        assert any("1 seed only" in warning for warning in evaluation.warnings)
    assert not read_record(tmp_path / "weak")["test_split_openings"]


def test_a_policy_that_never_edits_has_no_arms_at_equal_dose(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path
) -> None:
    entries = [entry(tmp_path / "none", planted, planted_dictionary, Planted.load(), -1)]
    config = EvaluateConfig(policy=(tmp_path,), control=("random", "static", "shuffled"), n_random=4, companions=False)
    evaluation = evaluate_trained(entries, config)
    assert {arm.label for arm in evaluation.result.arms} == {"unsteered", "policy", "static"}
    assert "edits none" in evaluation.missing["arms at equal dose and equal KL"]
    assert evaluation.result.gain.total.estimate == 0


def test_answers_of_several_tokens_are_matched_decision_by_decision(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path
) -> None:
    settings = {"options_only": False, "max_new_tokens": 4, "dose": 0.3}
    entries = [entry(tmp_path / "long", planted, planted_dictionary, Planted.load(), 0, **settings)]
    config = EvaluateConfig(
        policy=(tmp_path,),
        items=16,
        split="validation",
        kl_tolerance=0.1,
        companions=False,
        train_items=24,
        **QUICK,  # pyright: ignore
    )
    evaluation = evaluate_trained(entries, config)
    policy = evaluation.result.arm("policy")
    assert policy.dose is not None
    for arm in evaluation.result.arms:
        if arm.match == "dose":
            assert arm.dose is not None
            assert arm.dose.relative == pytest.approx(0.3, rel=0.01)
            assert arm.equal_dose == (not arm.dose_note)
    static = evaluation.result.arm("static at equal dose")
    assert (static.equal_dose, static.dose) == (True, policy.dose)
    assert not read_record(tmp_path / "long")["test_split_openings"]
    assert "reported on validation, where policies and controls were chosen or trained" in evaluation.warnings


def outcome(reward: float, *, malformed: bool = False) -> Outcome:
    return Outcome(reward=reward, correct=bool(reward), malformed=malformed)


def test_a_gain_from_format_alone_is_named() -> None:
    """Six answers become well formed and right, two stay right, two stay wrong: the whole gain is format."""
    before = [outcome(0, malformed=True)] * 6 + [outcome(1)] * 2 + [outcome(0)] * 2
    after = [outcome(1)] * 8 + [outcome(0)] * 2

    def arm(name: str, outcomes: list[Outcome]) -> AnsweredArm:
        return AnsweredArm([Arm(name=name, match="own", answer=lambda items, scale: [])], [[Answers(outcomes)]])

    result = task_result(Planted.load(), "test", [arm("unsteered", before), arm("policy", after)], reference="policy")
    assert result.gain.total.estimate == pytest.approx(0.6)
    assert (result.gain.format.estimate, result.gain.answer.estimate) == (pytest.approx(0.6), 0)
    unsteered, policy = result.arm("unsteered"), result.arm("policy")
    assert unsteered.accuracy_well_formed is not None
    assert policy.accuracy_well_formed is not None
    assert unsteered.accuracy_well_formed.estimate == pytest.approx(0.5)
    assert policy.accuracy_well_formed.estimate == pytest.approx(0.8)
    assert (unsteered.malformed.estimate, policy.malformed.estimate) == (0.6, 0)
    from trimtab.control.comparison_tables import gain_line

    assert gain_line(result).endswith("Without the change of format the gain is not shown.")


def test_the_command_evaluates_a_run_from_its_directory_alone(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path
) -> None:
    assert "planted_readout" in sys.modules
    model = tmp_path / "model"
    planted.hf.save_pretrained(model)
    planted.tokenizer.save_pretrained(model)
    info = replace(planted_dictionary.info, model=str(model))
    sae = Standard(
        planted_dictionary.W_enc,
        planted_dictionary.b_enc,
        planted_dictionary.W_dec,
        planted_dictionary.b_dec,
        info=info,
    )
    save_dictionary(sae, tmp_path / "sae")
    settings = {"model": str(model), "sae": str(tmp_path / "sae"), "task": "planted_readout:Planted"}
    made = entry(tmp_path / "run", planted, planted_dictionary, Planted.load(), 0, **settings)
    made.run.close()
    controls = ("random", "static")
    out = tmp_path / "out"
    evaluation = evaluate_policy(
        EvaluateConfig(
            policy=(tmp_path / "run",), control=controls, equal_kl=False, run=out, items=20, headroom_items=3, **QUICK
        )  # pyright: ignore
    )
    assert evaluation.result.arm("policy").reward.estimate == 1
    assert (evaluation.result.items, evaluation.result.split) == (20, "test[:20]")
    (chosen,) = evaluation.result.arm("static").chosen
    assert list(chosen["origins"]) == ["named", "used by the policy", "headroom", "sample of live features"]
    assert chosen["origins"]["headroom"] >= 15
    assert read_record(out)["command"] == "policy evaluate"
    assert len(Trace.read(out).tokens) == 20
    assert json.loads((out / "evaluation.json").read_text())["seeds"] == [0]
    assert not (tmp_path / "run/evaluation.json").exists()
    assert read_record(tmp_path / "run")["test_split_openings"][0]["n"] == 20


def test_headroom_finds_static_features_for_longer_answers(
    planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path
) -> None:
    longer = {"options_only": False, "max_new_tokens": 2}
    made = entry(tmp_path / "run", planted, planted_dictionary, Planted.load(), 5, **longer)
    found = {}
    for count in (32, 3):
        config = EvaluateConfig(
            policy=(tmp_path / "run",), control=("static",), equal_kl=False, trace=False, items=4, headroom_items=3,
            headroom_features=count, **(QUICK | {"n_random": 0}),
        )  # fmt: skip  # pyright: ignore[reportArgumentType]
        evaluation = evaluate_trained([made], config)
        assert not evaluation.missing
        (chosen,) = evaluation.result.arm("static").chosen
        found[count] = chosen["origins"]["headroom"], evaluation.result.arm("static").reward.estimate
    assert found == {32: (15, 1.0), 3: (3, found[3][1])}
    assert found[3][1] < 1


def test_a_config_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = PolicyConfig(
        task="mmlu", data=Path("data"), hidden=(32, 16), ppo=PPOConfig(gamma=0.9), run=tmp_path / "a", train_items=7
    )
    assert read_typed(PolicyConfig, json.loads(json.dumps(config_dict(config)))) == config
    with Run.open(tmp_path / "a", "policy train", config):
        pass
    assert read_policy_config(tmp_path / "a") == config


def test_mistakes_are_named(planted: LanguageModel, planted_dictionary: Standard, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="policy evaluate: there is no run to evaluate"):
        EvaluateConfig()
    with pytest.raises(UserError, match="control 'magic': there are random, random-allowed"):
        EvaluateConfig(policy=(tmp_path,), control=("magic",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="kl_tolerance 0: it must be between 0 and 1"):
        EvaluateConfig(policy=(tmp_path,), kl_tolerance=0)
    with pytest.raises(UserError, match=r"there is no run\.json"):
        evaluate_policy(EvaluateConfig(policy=(tmp_path / "nowhere",)))
    with Run.open(tmp_path / "other", "train", {"a": 1}):
        pass
    with pytest.raises(UserError, match="it belongs to `train`, not `policy train`"):
        evaluate_policy(EvaluateConfig(policy=(tmp_path / "other",)))
    task = Planted.load()
    twice = [entry(tmp_path / name, planted, planted_dictionary, task, 0) for name in ("a", "b")]
    with pytest.raises(UserError, match="two of one setting have seed 0"):
        evaluate_trained(twice, EvaluateConfig(policy=(tmp_path,)))
    assert str(twice[0].setup.site) == SITE


OWN_ARM = """
from trimtab.control import ArmKind

class FeatureSeven(ArmKind):
    name = "seven"

    def arms(self, choosing):
        return self.steered(lambda items, draw: items.setting.static_source(7, 1.0), {"feature": 7})
"""


@pytest.mark.parametrize("registered", [True, False])
def test_an_arm_of_ones_own_stands_beside_a_policy(
    planted: LanguageModel,
    planted_dictionary: Standard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registered: bool,
) -> None:
    """By its registered name or as module:Class, without another change: in results, tables and the rows of items."""
    (tmp_path / "own_arms.py").write_text(OWN_ARM)
    monkeypatch.syspath_prepend(tmp_path)
    name = "own_arms:FeatureSeven"
    if registered:
        monkeypatch.setattr("trimtab.control.arm.ARM_KINDS", dict(ARM_KINDS))
        name = register(find_kind(name)).name
    made = entry(tmp_path / "run", planted, planted_dictionary, Planted.load(), 0)
    config = EvaluateConfig(policy=(tmp_path,), control=(name, "random"), companions=False, trace=False, **QUICK)  # pyright: ignore
    found = evaluate_trained([made], config)
    labels = ["unsteered", "policy", "random at equal dose", "random at equal kl", "seven", "seven at equal dose",
              "seven at equal kl"]  # fmt: skip
    assert [arm.label for arm in found.result.arms] == labels
    assert found.result.arm("seven at equal dose").equal_dose is True
    rows = pq.read_table(tmp_path / "run" / "evaluation_items.parquet").to_pylist()
    assert {row["arm"] for row in rows} == set(labels)
    made.run.close()


def test_a_control_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"control 'randm'.*there are random, .*did you mean random"):
        EvaluateConfig(policy=(tmp_path,), control=("randm",))
    with pytest.raises(UserError, match=r"control 'pathlib:Path'.*no subclass of trimtab\.control\.ArmKind"):
        EvaluateConfig(policy=(tmp_path,), control=("pathlib:Path",))

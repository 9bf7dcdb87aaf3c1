"""Training on planted truths: it finds what is rewarded, resumes exactly, and says where nothing can be gained."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from first_letter import FirstLetter
from first_letter_training import letter_config, train

from trimtab.control import masks
from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.policies import setup as surroundings
from trimtab.policies import train as training
from trimtab.policies.config import PolicyConfig
from trimtab.policies.ppo import PPOConfig
from trimtab.policies.setup import Setup
from trimtab.policies.train import TrainingSummary, run_policy_train
from trimtab.runs import Meter
from trimtab.training.checkpoint import latest_checkpoint


def small(run: Path, **settings: object) -> PolicyConfig:
    values: dict[str, object] = {
        "mask": "none", "iterations": 6, "items_per_iteration": 10, "samples": 4, "validate_every": 2,
        "checkpoint_every": 2,
    }  # fmt: skip
    return letter_config(run, **(values | settings))


def test_a_training_that_was_stopped_ends_with_the_same_bits(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_llama, sae, small(tmp_path / "whole"))
    from trimtab.policies import train as module

    updates = 0
    original = module.Learner.update

    def stop(self: object, *args: object, **kwargs: object) -> object:
        nonlocal updates
        updates += 1
        if updates in (4, 6):
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module.Learner, "update", stop)
    parts = small(tmp_path / "parts")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tiny_llama, sae, parts)
    resumed = train(tiny_llama, sae, parts)
    assert resumed.best_iteration == whole.best_iteration
    for name, tensor in whole.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name]), name
    lines = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in (d / "metrics.jsonl").open()]
        for d in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert lines[0] == lines[1]
    losses = ("old_approx_kl", "approx_kl", "clipfrac", "explained_variance")
    expected = {"charts/episodic_return", *(f"losses/{name}" for name in losses)}
    assert expected <= set(lines[0][1])
    assert all(line["losses/max_abs_log_ratio"] <= 1e-5 for line in lines[0] if "losses/max_abs_log_ratio" in line)


def test_progress_says_how_each_iteration_went(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of `metrics.jsonl`; rollouts are of the items that there are."""
    said: list[str] = []
    monkeypatch.setattr(Meter, "describe", lambda _self, description: said.append(description))
    done = train(tiny_llama, sae, small(tmp_path / "run", iterations=2, items_per_iteration=1000, train_items=7))
    assert done.rollouts == 2 * 7 * 4
    told = [line for line in said if line.startswith("training the policy: ")]
    logged = [line for line in map(json.loads, (tmp_path / "run/metrics.jsonl").open()) if "charts/reward" in line]
    expected = [
        f"training the policy: reward {m['charts/reward']:.2f}, entropy {m['policy/entropy']:.1f}, "
        f"approx KL {m['losses/approx_kl']:.3f}, EV {m['losses/explained_variance']:.2f}, "
        f"exp(H) {m['policy/effective_features']:,.1f}, {m['charts/tokens_per_second']:,.0f} tokens/s"
        for m in logged
    ]
    assert told == expected
    assert len(told) == 2


def stop_at(patch: pytest.MonkeyPatch, update: int) -> None:
    """Interrupt the training before one of its updates, once."""
    original, counted = training.Learner.update, itertools.count(1)

    def stop(learner: Any, *args: Any, **kwargs: Any) -> Any:
        if next(counted) == update:
            raise KeyboardInterrupt
        return original(learner, *args, **kwargs)

    patch.setattr(training.Learner, "update", stop)


@pytest.mark.parametrize(
    ("split", "change"),
    [
        ("train", {"prompt": "another"}),
        ("train", {"answer": "x"}),
        ("validation", {"options": ("x", "y")}),
        ("validation", {"id": "letter/new"}),
    ],
)
def test_a_training_is_not_resumed_with_other_items(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str,
    change: dict[str, Any],
) -> None:  # fmt: skip
    """The same command, after one item of the data was changed; with the old data it goes on."""
    config = small(tmp_path / "run", iterations=4, headroom_items=0)
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_llama, sae, config)
    task = FirstLetter.load()
    items = {name: list(task.items(name)) for name in ("train", "validation", "test")}
    items[split][1] = replace(items[split][1], **change)
    with monkeypatch.context() as patch:
        patch.setattr(FirstLetter, "load", classmethod(lambda cls, *_a, **_k: cls(items)))
        with pytest.raises(UserError, match=r"its data had hash .* and now has .*choose another --run"):
            train(tiny_llama, sae, config)
    assert train(tiny_llama, sae, config).iterations == 4


def test_a_run_that_knows_nothing_of_its_data_is_resumed(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", iterations=4, headroom_items=0)
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_llama, sae, config)
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    del record["hashes"]["data"]
    path.write_text(json.dumps(record))
    assert train(tiny_llama, sae, config).iterations == 4


@pytest.mark.parametrize(("mask", "share"), [("none", 0.6), ("current", 0.6), ("none", 0.0)])
def test_training_starts_with_no_edit_as_likely_as_was_asked_for(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, mask: str, share: float
) -> None:
    """The first rollouts are drawn before anything is learnt; with 0, no edit is one of the actions."""
    config = small(
        tmp_path / "run", mask=mask, initial_no_edit=share, iterations=1, items_per_iteration=30, samples=32,
        batch_size=960,
    )  # fmt: skip
    train(tiny_llama, sae, config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    (found,) = [line["policy/no_edit_share"] for line in lines if "policy/no_edit_share" in line]
    assert found == pytest.approx(share or 1 / (1 + sae.n_features), abs=0.06)


def test_what_comes_before_training_shows_how_far_it_is(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsteered answers, those on training items and those on validation items, each row counted as it ends."""
    meters: list[Meter] = []
    said: list[str] = []

    class Watched(Meter):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            said.append(self.description)
            meters.append(self)

        def describe(self, description: str) -> None:
            said.append(description)
            super().describe(description)

    for module in (training, masks, surroundings):
        monkeypatch.setattr(module, "Meter", Watched)
    train(tiny_llama, sae, small(tmp_path / "run", mask="accumulated", iterations=1, headroom_items=0))
    begun = said.index("before training, unsteered answers")
    assert said[begun : begun + 5] == [
        "before training, unsteered answers",
        "before training, answers on training items",
        "finding the features that fire in prompts",
        "before training, answers on validation items",
        "finding the features that fire in prompts",
    ]
    assert said[begun + 5] == "training the policy"
    for meter in meters:
        assert meter.completed == pytest.approx(meter.total)
    task = FirstLetter.load()
    (before,) = [meter for meter in meters if meter.description.startswith("before training")]
    assert before.total == 2 * len(task.items("validation")) + len(task.items("train"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_policy_learns_which_feature_each_context_needs(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, seed: int
) -> None:
    """Three answers in turn, which no single feature gives: rewards far above the best static feature's."""
    config = small(
        tmp_path / "run", iterations=40, items_per_iteration=30, samples=16, seed=seed, validate_every=40,
        checkpoint_every=40, batch_size=480, hidden=(64,), ppo=PPOConfig(lr=3e-3, entropy_bonus=0.003),
    )  # fmt: skip
    train(tiny_llama, sae, config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    rewards = [line["charts/reward"] for line in lines if "charts/reward" in line]
    assert rewards[0] < 0.45
    assert rewards[-1] > 0.8


def test_no_headroom_is_said_before_training(
    tiny_llama: LanguageModel,
    sae: Standard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from trimtab.tasks import Outcome

    monkeypatch.setattr(FirstLetter, "parse", lambda *_a, **_k: Outcome(reward=1.0, correct=True))
    done = train(tiny_llama, sae, small(tmp_path / "run", iterations=1, headroom_items=0))
    assert done.warnings[0] == "no headroom: the unsteered model already gets every validation item right"
    assert f"trimtab: warning: {done.warnings[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(("best", "said"), [(0, True), (3, False)])
def test_a_policy_that_never_got_better_is_called_untrained(best: int, said: bool) -> None:
    results = {
        "iterations": 3, "rollouts": 12, "seconds": 1.0, "best_validation_reward": 0.5, "best_iteration": best,
        "unsteered_validation_reward": 0.5, "warnings": [],
    }  # fmt: skip
    text = TrainingSummary(run=Path("runs/a"), task="ioi", results=results, resumed=False).render()
    assert ("no checkpoint beat the untrained policy" in text) is said


def opened(patch: pytest.MonkeyPatch, model: LanguageModel, sae: Standard) -> None:
    """The command is given this model, SAE and task."""
    patch.setattr(
        training.Setup, "of", classmethod(lambda _, config: Setup.with_parts(config, model, sae, FirstLetter.load()))
    )


def logged(run: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").open())
    return {line["step"]: line[name] for line in lines if name in line}


def test_more_iterations_go_on_from_where_a_training_ended(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped on the way it ends with the same bits, and the rate falls as if so many had been asked for from there."""
    opened(monkeypatch, tiny_llama, sae)
    short = small(tmp_path / "whole", iterations=3, headroom_items=0)
    first = run_policy_train(short)
    before = logged(short.directory(), "charts/reward")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    whole = run_policy_train(replace(short, iterations=6))
    assert (first.results["iterations"], whole.results["iterations"], whole.resumed) == (3, 6, False)
    after = logged(short.directory(), "charts/reward")
    assert {step: after[step] for step in before} == before
    rates = logged(short.directory(), "charts/learning_rate")
    assert list(rates) == [1, 2, 3, 4, 5, 6]
    for step, share in {1: 1, 2: 2 / 3, 3: 1 / 3, 4: 1 / 2, 5: 1 / 3, 6: 1 / 6}.items():
        assert rates[step] == pytest.approx(short.ppo.lr * share)
    stop_at(monkeypatch, 3)
    parts = replace(short, run=tmp_path / "parts", iterations=6)
    with pytest.raises(KeyboardInterrupt):
        run_policy_train(parts)
    assert run_policy_train(parts).results["best_validation_reward"] == whole.results["best_validation_reward"]
    mine, other = (latest_checkpoint(tmp_path / name / training.CHECKPOINTS) for name in ("whole", "parts"))
    assert mine is not None
    assert other is not None
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in mine.tensors.items())
    record = json.loads((tmp_path / "parts/run.json").read_text())
    assert (record["config"]["iterations"], record["status"]) == (6, "done")
    assert [(one["field"], one["old"], one["new"]) for one in record["extensions"]] == [("iterations", 3, 6)]


def test_an_extended_training_sets_aside_what_was_found_of_the_shorter_one(
    tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    opened(monkeypatch, tiny_llama, sae)
    config = small(tmp_path / "run", iterations=2, headroom_items=0)
    run_policy_train(config)
    (tmp_path / "run/evaluation.json").write_text("{}")
    (tmp_path / "run/analysis").mkdir()
    assert run_policy_train(config).resumed
    assert (tmp_path / "run/evaluation.json").exists()
    with pytest.raises(UserError, match="iterations was 2 and is now 1; choose another --run directory"):
        run_policy_train(replace(config, iterations=1))
    with pytest.raises(UserError, match="samples was 4 and is now 5"):
        run_policy_train(replace(config, iterations=3, samples=5))
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "done"
    run_policy_train(replace(config, iterations=3))
    assert sorted(path.name for path in (tmp_path / "run/iterations-2").iterdir()) == ["analysis", "evaluation.json"]
    assert not (tmp_path / "run/evaluation.json").exists()
    assert f"is in {tmp_path / 'run/iterations-2'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "ioy"}, "task 'ioy'"),
        ({"task": "ioi", "task_option": ("shots=5",)}, "task option"),
        ({"task": "mmlu"}, "task mmlu: it needs a data directory"),
    ],
)
def test_a_refused_training_leaves_no_directory(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_policy_train(PolicyConfig(run=tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()

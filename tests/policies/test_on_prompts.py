"""Policies trained on prompts and a reward: what training does from a config, and what is done with them afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from first_letter import TEXTS, FirstLetter
from first_letter_training import train
from matplotlib.figure import Figure

from trimtab import cli
from trimtab.dictionaries import Standard, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, LanguageModel, decode
from trimtab.policies import LearnedPolicy, PolicyConfig, train_policy
from trimtab.policies.steering_command import PolicySteerConfig, run_policy_steer
from trimtab.tasks import Item, Outcome, PromptTask

SMALL: dict[str, Any] = {
    "dose": 2.0, "iterations": 3, "samples": 2, "items_per_iteration": 8, "hidden": (16,), "validate_every": 1,
    "headroom_items": 0, "initial_no_edit": 0.0,
}  # fmt: skip
SPLITS = {"train": TEXTS[:30], "validation": TEXTS[30:38], "test": TEXTS[38:]}


def reward(prompt: str, answer: str) -> float:
    """Almost any edit changes it."""
    return sum(map(ord, prompt + answer)) % 11 / 10


@pytest.fixture
def learned(tiny_llama: LanguageModel, sae: Standard) -> LearnedPolicy:
    return train_policy(tiny_llama, sae, SPLITS, reward, max_new_tokens=1, **SMALL)


def test_it_is_what_a_config_trains(
    learned: LearnedPolicy, tiny_llama: LanguageModel, sae: Standard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FirstLetter, "options_only", False)
    monkeypatch.setattr(FirstLetter, "parse", lambda self, item, text, permutation=0: Outcome(
        reward=reward(item.prompt, text), correct=None))  # fmt: skip
    same = train(tiny_llama, sae, PolicyConfig(task="first-letter", run=tmp_path, **SMALL))
    for name, weights in same.policy.state_dict().items():
        assert torch.equal(learned.trained.policy.state_dict()[name], weights), name
    assert learned.trained.best_validation_reward == same.best_validation_reward
    assert learned.run is None


def test_steering_is_decoding_under_the_policy(learned: LearnedPolicy, tiny_llama: LanguageModel) -> None:
    prompts = ["the sea", "an inn and then"]
    decoding = DecodeConfig(max_new_tokens=5)
    result = learned.steer(prompts, decoding=decoding)
    ids = [tiny_llama.encode_text(prompt) for prompt in prompts]
    alone = decode(tiny_llama, ids, decoding, learned.source())
    assert [one.text for one in result.steered[0].continuations] == alone.texts
    assert [one.text for one in result.unsteered.continuations] == decode(tiny_llama, ids, decoding).texts
    assert result.trace is not None
    edits = result.trace.to_frame("edits")
    assert sorted(edits.feature) == sorted(alone.edits.feature[:, 0].tolist())
    assert max(edits.feature) >= 0
    assert edits.action_logp.notna().all()
    assert "add a policy's features at resid_post.1" in repr(result)
    assert len(learned.steer("the sea").unsteered.continuations[0].text) <= 1  # as long as in training
    with pytest.raises(UserError, match="dose beside a policy's features: the source decides that itself"):
        learned.steer("the sea", dose=1.0)


def test_controls_stand_beside_it(learned: LearnedPolicy) -> None:
    comparison = learned.compare(["random", "static"], equal_kl=None, every_order=False)
    assert comparison.result.reference == "policy"
    assert {arm.name for arm in comparison.result.arms} == {"unsteered", "policy", "random", "static"}
    assert comparison.result.items == len(SPLITS["test"])
    assert "used by the policy" in json.dumps(comparison.to_json())


def test_it_is_a_frame_a_figure_and_a_line(learned: LearnedPolicy) -> None:
    frame = learned.to_frame()
    rewards = frame["validation/reward"].dropna().tolist()
    assert max(rewards) == learned.trained.best_validation_reward
    assert learned.to_frame("result").iterations.tolist() == [3]
    curve, *_ = learned.plot(Figure().add_subplot()).lines
    assert list(curve.get_ydata()) == rewards  # type: ignore[arg-type]
    assert repr(learned).startswith("<LearnedPolicy: policy over 64 features at resid_post.1 of tiny-llama: validation")
    assert repr(learned.trained.policy).startswith("<Policy over 64 features: ")


@pytest.fixture
def on_disk(tiny_llama: LanguageModel, sae: Standard, tmp_path: Path) -> dict[str, Any]:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    sae.info = replace(sae.info, model="")
    save_dictionary(sae, tmp_path / "sae")
    config = PolicyConfig(task="first-letter", model=str(tmp_path / "model"), sae=str(tmp_path / "sae"), task_option=())
    model, dictionary = config.load()
    return {"model": model, "dictionary": dictionary, "run": tmp_path / "run"}


def test_a_kept_run_goes_on_and_steers_by_its_name(
    on_disk: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, dictionary, run = on_disk["model"], on_disk["dictionary"], on_disk["run"]
    first = train_policy(model, dictionary, SPLITS, reward, max_new_tokens=1, run=run, **SMALL)
    again = train_policy(model, dictionary, SPLITS, reward, max_new_tokens=1, run=run, **SMALL)
    for name, weights in first.trained.policy.state_dict().items():
        assert torch.equal(again.trained.policy.state_dict()[name], weights)
    assert again.trained.best_validation_reward == first.trained.best_validation_reward
    decoding = DecodeConfig(max_new_tokens=4)
    wanted = first.steer(["the sea", "the sea", "an inn"], decoding=decoding)
    result = run_policy_steer(PolicySteerConfig(policy=run, prompt=("the sea", "the sea", "an inn"), max_new_tokens=4))
    assert result.arms == wanted.arms
    assert cli.main(["policy", "steer", str(run), "the sea", "--max-new-tokens", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["arms"][1]["continuations"][0]["text"] == wanted.steered[0].continuations[0].text
    for command in ("evaluate", "analyze"):
        assert cli.main(["policy", command, str(run)]) == 2
        refused = capsys.readouterr().err
        assert "task 'prompts': its prompts and its reward are in Python" in refused
        assert "policy.compare()" in refused


def test_a_finished_run_is_not_that_of_other_prompts_or_another_reward(on_disk: dict[str, Any]) -> None:
    """Swapped splits would report on prompts that trained it."""
    model, dictionary, run = on_disk["model"], on_disk["dictionary"], on_disk["run"]
    first = train_policy(model, dictionary, SPLITS, reward, max_new_tokens=1, run=run, **SMALL)
    swapped = {"train": TEXTS[10:], "validation": SPLITS["validation"][:2], "test": TEXTS[:10]}
    swapped["train"] = [text for text in swapped["train"] if text not in swapped["validation"]]
    with pytest.raises(UserError, match=r"its data had hash \w+ and now has"):
        train_policy(model, dictionary, swapped, reward, max_new_tokens=1, run=run, **SMALL)

    def opposite(prompt: str, answer: str) -> float:
        return -reward(prompt, answer)

    with pytest.raises(UserError, match=r"its reward had hash \w+ and now has"):
        train_policy(model, dictionary, SPLITS, opposite, max_new_tokens=1, run=run, **SMALL)
    again = train_policy(model, dictionary, SPLITS, reward, max_new_tokens=1, run=run, **SMALL)
    assert again.trained.best_validation_reward == first.trained.best_validation_reward


def test_a_reward_of_ones_own_has_no_best(tiny_llama: LanguageModel, sae: Standard) -> None:
    """6 for every answer does not mean that all are right."""
    learned = train_policy(tiny_llama, sae, SPLITS, lambda _prompt, _answer: 6.0, max_new_tokens=1, **SMALL)
    assert not any("already gets every validation item right" in warning for warning in learned.trained.warnings)


def test_what_does_not_fit_is_refused(on_disk: dict[str, Any], tmp_path: Path, sae: Standard) -> None:
    model, dictionary, run = on_disk["model"], on_disk["dictionary"], on_disk["run"]
    train_policy(model, dictionary, SPLITS, reward, max_new_tokens=1, run=run, **SMALL)
    with pytest.raises(UserError, match="the prompts: there is none; give at least one text behind the run"):
        run_policy_steer(PolicySteerConfig(policy=run))
    with pytest.raises(UserError, match=r"there is no run\.json"):
        run_policy_steer(PolicySteerConfig(policy=tmp_path / "nowhere", prompt=("a",)))
    sae.W_dec.data[0] += 1
    save_dictionary(sae, tmp_path / "sae")
    with pytest.raises(UserError, match=r"dictionary .*: its hash is .*; give the dictionary that the run used"):
        run_policy_steer(PolicySteerConfig(policy=run, prompt=("a",)))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompts": ["a", "b", "a"]}, "the prompts: one is given twice; give each once"),
    ({"prompts": {"train": ["a"], "test": ["a"]}}, "the prompts: one is given twice"),
    ({"prompts": {"train": ["a"], "dev": ["b"]}}, "'dev' is not one of its splits; use train, validation, test"),
    ({"prompts": []}, "task prompts: there is no item in it"),
    ({"prompts": {"train": ["a b"], "test": ["b"]}}, "split 'validation' of task prompts: nothing is in it"),
    ({"reward": lambda prompt, answer: float("nan")}, "reward nan"),
    ({"mask": "some"}, "mask: it must be one of none, current"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_mistakes_are_named(tiny_llama: LanguageModel, sae: Standard, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        train_policy(tiny_llama, sae, **{"prompts": SPLITS, "reward": reward, "max_new_tokens": 1, **SMALL, **given})
    assert message in caught.value.line


def test_prompts_are_divided_in_fifths_whatever_their_order() -> None:
    prompts = [f"prompt {i}" for i in range(24)]
    task, turned = PromptTask(prompts, reward), PromptTask(prompts[::-1], reward)
    assert task.splits == turned.splits
    assert {split: len(ids) for split, ids in task.splits.items()} == {"train": 14, "validation": 5, "test": 5}
    assert {item.prompt for item in task.items("all")} == set(prompts)
    assert {item.prompt for item in task.items("train")} != set(prompts[:14])
    asked: list[tuple[str, str]] = []
    task = PromptTask(["a"], lambda prompt, answer: asked.append((prompt, answer)) or True)
    outcome = task.parse(Item(id="0", prompt="a", answer=""), "b")
    assert (outcome.reward, outcome.correct, asked) == (1.0, None, [("a", "b")])

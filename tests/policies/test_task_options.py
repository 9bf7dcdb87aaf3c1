"""A task's options and the judge of its answers: from words to the loader, and from a run to its evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from few_harmful import LOADED, SAID, Stern
from planted_readout import planted_sae

from trimtab.control.comparison import Comparison
from trimtab.dictionaries import Standard, save_dictionary
from trimtab.errors import UserError
from trimtab.judges import Judge, make_judge
from trimtab.lm import LanguageModel, ModelConfig
from trimtab.policies.analyses.command import AnalyzeConfig, analyze_policy
from trimtab.policies.config import PolicyConfig
from trimtab.policies.evaluate import EvaluateConfig, evaluate_policy
from trimtab.policies.headroom.command import HeadroomConfig, run_headroom
from trimtab.policies.setup import Setup
from trimtab.policies.train import run_policy_train
from trimtab.policies.trained import read_policy_config
from trimtab.runs import config_dict, read_record
from trimtab.tasks import config as task_config


@pytest.fixture(autouse=True)
def forget() -> None:
    SAID.clear()
    LOADED.clear()


@pytest.fixture
def stern(monkeypatch: pytest.MonkeyPatch) -> None:
    """`endpoint:stern` is a judge that needs no endpoint."""

    def made(name: str, **options: Any) -> Judge:
        return Stern() if name == "endpoint:stern" else make_judge(name, **options)

    monkeypatch.setattr(task_config, "make_judge", made)


@pytest.fixture
def parts(tiny_llama: LanguageModel, tmp_path: Path) -> dict[str, Any]:
    """A model and an SAE in directories."""
    model = tmp_path / "model"
    tiny_llama.hf.save_pretrained(model)
    tiny_llama.tokenizer.save_pretrained(model)
    sae = planted_sae(tiny_llama, "resid_post.1")
    info = replace(sae.info, model=str(model))
    save_dictionary(Standard(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, info=info), tmp_path / "sae")
    return {"task": "few_harmful:Harmful", "model": str(model), "sae": str(tmp_path / "sae")}


def train(parts: dict[str, Any], run: Path, **settings: Any) -> None:
    small: dict[str, Any] = {
        "mask": "none", "hidden": (4,), "iterations": 1, "items_per_iteration": 2, "samples": 2, "validate_every": 1,
        "checkpoint_every": 1, "headroom_items": 0,
    }  # fmt: skip
    run_policy_train(PolicyConfig(run=run, **parts, **(small | settings)))


def evaluated(*runs: Path) -> Comparison:
    return evaluate_policy(
        EvaluateConfig(policy=runs, control=("random",), draws=1, equal_kl=False, used=1, n_random=2, trace=False)
    )


@pytest.mark.usefixtures("stern")
def test_a_policy_trained_with_a_judge_is_evaluated_with_it(parts: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(parts, run, judge="endpoint:stern", task_option=("per_split=3",))
    assert SAID
    assert read_record(run)["config"]["judge"] == "endpoint:stern"
    SAID.clear()
    LOADED.clear()
    evaluation = evaluated(run)
    assert LOADED == [("few-harmful", 3), ("few-harmless", 3)]
    assert {prompt for _, prompt in SAID} >= {"doz", "fox", "foy"} | {"daz", "fax", "fay"}
    assert evaluation.result.items == 3
    assert evaluation.result.arm("policy").reward.estimate == 1
    (companion,) = evaluation.companions
    assert companion.items == 3
    assert companion.arm("policy").reward.estimate == 0


@pytest.mark.usefixtures("stern")
def test_a_policy_trained_with_a_judge_is_analysed_with_it(parts: dict[str, Any], tmp_path: Path) -> None:
    train(parts, tmp_path / "run", judge="endpoint:stern", task_option=("per_split=3",))
    SAID.clear()
    LOADED.clear()
    analyze_policy(AnalyzeConfig(run=(tmp_path / "run",), part=("ledger",), items=2, ablated=1, contexts=1))
    assert LOADED == [("few-harmful", 3)]
    assert {prompt for _, prompt in SAID} < {"doz", "fox", "foy"}


@pytest.mark.usefixtures("stern")
def test_runs_under_different_judges_are_not_compared(parts: dict[str, Any], tmp_path: Path) -> None:
    train(parts, tmp_path / "a")
    train(parts, tmp_path / "b", judge="endpoint:stern")
    train(parts, tmp_path / "c", task_option=("per_split=3",))
    with pytest.raises(
        UserError, match=r"run .*b: its judge is endpoint:stern, not the default; evaluate it by itself"
    ):
        evaluated(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match=r"run .*c: its task option is per_split=3, not the default"):
        evaluated(tmp_path / "a", tmp_path / "c")


def test_a_run_without_the_fields_is_read_and_resumed(parts: dict[str, Any], tmp_path: Path) -> None:
    """As runs were before there were judges and options: neither their record nor their directory's name changes."""
    config = PolicyConfig(task="mmlu")
    assert not {"judge", "judge_option", "task_option"} & set(config_dict(config))
    assert PolicyConfig(task="mmlu", judge="rules").directory() != config.directory()
    run = tmp_path / "run"
    train(parts, run)
    assert "judge" not in json.loads((run / "run.json").read_text())["config"]
    assert read_policy_config(run).judge is None
    assert evaluated(run).result.arm("policy").reward.estimate == 0


def begin_training(**settings: Any) -> None:
    Setup.of(PolicyConfig(task="few_harmful:Harmful", **settings))


def begin_headroom(**settings: Any) -> None:
    run_headroom(HeadroomConfig(task="few_harmful:Harmful", items=2, **settings))


class ModelLoadedError(Exception):
    """The model was asked for."""


@pytest.mark.parametrize("begin", [begin_training, begin_headroom])
def test_options_reach_the_loader_and_mistakes_show_before_the_model(
    begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ModelLoadedError

    monkeypatch.setattr(ModelConfig, "load_model", load)
    with pytest.raises(ModelLoadedError):
        begin(task_option=("per-split=2",), judge="rules")
    assert LOADED == [("few-harmful", 2)]
    owner = "task few_harmful:Harmful takes per_split"
    for settings, message in (
        ({"task_option": ("per_splot=2",)}, f"task option 'per_splot': {owner}; did you mean per_split?"),
        ({"task_option": ("shots=2",)}, f"task option 'shots': {owner}; choose one of them"),
        ({"task_option": ("judge=rules",)}, f"task option 'judge': {owner}; choose one of them"),
        ({"task_option": ("per_split=few",)}, "task option per_split: it must be a whole number, not 'few'"),
        ({"judge": f"classifier:{tmp_path}"}, f"judge classifier:{tmp_path}: no classifier could be loaded"),
        ({"judge": "oracle"}, "judge 'oracle': there are rules, classifier:PATH and endpoint:MODEL@URL"),
        ({"judge_option": ("timeout=3",)}, "judge option 'timeout=3': no judge is named; name one with --judge"),
        ({"judge": "rules", "judge_option": ("timeout=3",)}, "judge option 'timeout': judge rules takes none; leave"),
        (
            {"judge": "classifier:x", "judge_option": ("treshold=1",)},
            "judge option 'treshold': judge classifier:x takes refusal_label, threshold, with_prompt, batch_size, "
            "device; did you mean threshold?",
        ),
    ):
        with pytest.raises(UserError) as caught:
            begin(**settings)
        assert message in caught.value.line


def test_a_judge_for_a_task_that_none_reads_is_refused() -> None:
    with pytest.raises(UserError, match="judge 'rules': no judge reads the answers of ioi; leave it out"):
        Setup.of(PolicyConfig(task="ioi", judge="rules"))


def test_an_endpoint_s_replies_stay_in_the_run_without_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    from trimtab.judges import chat_client

    asked: list[object] = []

    async def attempt(self: object, client: object, request: object) -> chat_client._Try:
        asked.append(request)
        return chat_client._Try("refusal")

    monkeypatch.setattr(chat_client.ChatClient, "_try", attempt)
    config = PolicyConfig(
        task="few", run=tmp_path / "run", judge="endpoint:m@http://127.0.0.1:9/v1", judge_option=("max_tries=2",)
    )
    for _ in range(2):
        task = replace(config, task="few_harmful:Harmful").read_task()
        assert task is not None
        judge: Any = task.judge
        assert judge.config.max_tries == 2
        assert judge.score("a prompt", "an answer").refused
    assert len(asked) == 1
    assert "a prompt" not in (tmp_path / "run/judge.jsonl").read_text()
    beside = HeadroomConfig(task="few", run=tmp_path).transcript
    assert beside == tmp_path / "judge.jsonl"


def test_a_headroom_says_under_what_it_was_measured(parts: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_headroom(
        HeadroomConfig(
            task=parts["task"], model=parts["model"], sae=(parts["sae"],), items=2, n_candidates=2, candidates="random",
            mask=("none",), dose=(1.0,), judge="rules", task_option=("per_split=2",), run=run,
        )
    )  # fmt: skip
    written = json.loads((run / "headroom.json").read_text())
    assert (written["judge"], written["task_option"]) == ("rules", ["per_split=2"])
    assert written["lines"][0]["items"] == 2

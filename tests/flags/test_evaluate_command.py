"""`trimtab flags evaluate` on runs of `flags train`: which models and examples it takes, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluation import SMALL
from toy_corpus import toy_examples

from trimtab import cli
from trimtab.errors import UserError
from trimtab.flags import Example, load_flagged
from trimtab.flags.command import FlagTrainConfig, run_flag_train
from trimtab.flags.data.checking import read_judge
from trimtab.flags.evaluation import command, evaluating
from trimtab.flags.evaluation.command import FlagEvaluateConfig, evaluated_run, read_run, run_flag_evaluate
from trimtab.flags.evaluation.options import PARTS
from trimtab.lm import LanguageModel, load_model
from trimtab.lm.capabilities import Capabilities
from trimtab.runs import read_record

KNOWN = Example(prompt="Go", response="An old chair stood by the window.")
OPTIONS = {name: tuple(value) if isinstance(value, list) else value for name, value in SMALL.items()}


@pytest.fixture(scope="module")
def trained(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model, concepts, examples, and runs of two curricula."""
    place = tmp_path_factory.mktemp("trained")
    tiny_llama.hf.save_pretrained(place / "tiny")
    tiny_llama.tokenizer.save_pretrained(place / "tiny")
    (place / "concepts.txt").write_text("sea: tides, ships and sailors\nwar\n")
    lines = [json.dumps(asdict(example)) for example in (*toy_examples(240, seed=3), KNOWN)]
    (place / "examples.jsonl").write_text("\n".join(lines))
    for curriculum in ("forced", "plain"):
        train(place, curriculum, curriculum)
        train(place, f"lora-{curriculum}", curriculum, adapt="lora", lora_rank=2)
    return place


def train(place: Path, name: str, curriculum: str, **options: Any) -> None:
    """One run of `flags train`."""
    given = {"steps": 12, "batch_size": 4, "lr": 1e-3, "max_tokens": 64, **options}
    config = FlagTrainConfig(
        model=str(place / "tiny"), concepts=place / "concepts.txt", data=(place / "examples.jsonl",),
        curriculum=curriculum, holdout=0.5, snapshots=2, dims=("4",), from_layer=1, run=place / name, **given,
    )  # fmt: skip
    run_flag_train(config)


def labelled(path: Path, *, also: str = "") -> Path:
    """Texts for a judge of both concepts."""
    words = {"sea": "the tide and the waves of the sea", "war": "the soldiers and guns of the war", "": "a chair"}
    told = ("He wrote about", "She spoke for hours of", "They remember", "Few people have seen", "We often think of")
    lines = [
        {"prompt": "Go", "response": f"{verb} {about}, {n} years ago.", "concepts": [name] if name else []}
        for name, about in words.items()
        for verb in told
        for n in ("two", "three", "ten", "eleven", "twenty")
    ]
    lines += [{"prompt": "Go", "response": also, "concepts": []}] * bool(also)
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def config_of(place: Path, *runs: str, **options: object) -> FlagEvaluateConfig:
    given = {**OPTIONS, "part": ("reading", "reliance"), "run": place / "evaluated", **options}
    return FlagEvaluateConfig(trained=tuple(place / name for name in runs), **given)


def test_runs_are_measured_from_the_original_over_their_snapshots(trained: Path) -> None:
    found = run_flag_evaluate(config_of(trained, "forced"))
    assert found.reliance is not None
    moments = dict.fromkeys((row.moment.run, row.moment.step) for row in found.reliance.costs)
    assert list(moments) == [("forced", 0), ("forced", 6), ("forced", 12)]
    tokens = [row.moment.tokens for row in found.reliance.costs if row.way == "zeroed"]
    assert 0 == tokens[0] < tokens[1] < tokens[2]
    phases = [row.moment.last_phase for row in found.reliance.costs if row.way == "zeroed"]
    assert phases == [False, False, True]  # the last of the schedule begins at step 8 of 12
    together = run_flag_evaluate(config_of(trained, "forced", "plain"))  # the second run joins the first
    assert together.runs == ("forced", "plain")
    first = [row.seconds for row in found.seconds]
    assert [row.seconds for row in together.seconds][: len(first)] == first
    assert read_record(trained / "evaluated")["status"] == "done"
    last = run_flag_evaluate(config_of(trained, "forced", snapshots=1, run=trained / "last"))
    assert last.reliance is not None
    assert {row.moment.step for row in last.reliance.costs} == {0, 12}


def test_all_moments_have_weights_of_one_precision(trained: Path, tiny_llama: LanguageModel) -> None:
    """Snapshots are kept in bfloat16, the result in float32."""
    config = config_of(trained, "forced")
    run = read_run(trained / "forced", "forced")
    kept, last = (state.load() for state in evaluated_run(run, None, tiny_llama, config).states)
    assert not all(torch.equal(w, w.bfloat16().float()) for w in load_flagged(run.kept[-1].path)[0].hf.parameters())
    for model in (kept, last):
        assert all(torch.equal(w, w.bfloat16().float()) for w in model.hf.parameters())


def test_the_command_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--part", "reading", "--items", "30", "--run", str(trained / "shown"), "--max-tokens", "64", "--json"]
    assert cli.main(["flags", "evaluate", str(trained / "forced"), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["forced"]
    assert "<h2>Reading</h2>" in (trained / "shown" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("part", "lacks"), [("reading", "padding"), ("price", "decode")])
def test_a_model_that_lacks_what_a_part_needs_is_refused_before_the_run_is_made(
    part: str, lacks: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tired(*args: Any, **options: Any) -> LanguageModel:
        model = load_model(*args, **options)
        model.assume(Capabilities(off={lacks: "it is tired"}))
        return model

    monkeypatch.setattr(command, "load_model", tired)
    refused(config_of(trained, "forced", part=(part,), run=tmp_path / "run"), "it is tired")
    assert not (tmp_path / "run").exists()


def test_own_examples_may_be_given(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text("\n".join(json.dumps(asdict(example)) for example in toy_examples(90, length=7, seed=11)))
    config = config_of(trained, "forced", data=(file,), run=tmp_path / "run", part=("reading",))
    found = run_flag_evaluate(config)
    assert 60 < found.fitted + found.reported <= 90
    assert found.notes == ()
    stale = changed(trained, "forced", tmp_path / "stale", hashes={"data": "0"})
    found = run_flag_evaluate(replace(config, trained=(stale,), run=tmp_path / "other"))
    assert found.notes[0].startswith("the examples that stale was trained on are not known: run ")
    whole = replace(config, data=(trained / "examples.jsonl",))
    refused(whole, "forced was trained on it; give others, or leave out --data")


@pytest.mark.parametrize("adapt", ["", "lora-"])
def test_control_beside_other_ways(trained: Path, tmp_path: Path, adapt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a judge of labelled text, for models whose weights were all trained and for adapters."""
    config = config_of(
        trained, f"{adapt}forced", f"{adapt}plain", part=("control",), text_length=2, compared=1, snapshots=1,
        judge_data=labelled(tmp_path / "labelled.jsonl"), run=tmp_path / "run",
    )  # fmt: skip
    found = run_flag_evaluate(config)
    forced, plain = (one.control for one in found.controls)
    assert found.notes == ()
    assert forced.missing == {"SAE feature": "no SAE was given"}
    arms = {one.arm for one in forced.arms if one.prompts == "neutral"}
    assert arms >= {"flags on", "unassigned dimensions", "mean difference", "prompting", "finetuned"}
    assert forced.prompts == 24 == forced.validation_prompts
    assert plain.missing == {"other ways of control": "a plain run has no flags to compare them with"}
    if adapt:
        return
    monkeypatch.setitem(evaluating.MEASURED, evaluating.OTHER_WAYS, 9)
    (note,) = run_flag_evaluate(config).notes  # a plain run has no other ways
    assert note.startswith("control of forced, step 12, is measured anew: ")
    alone = run_flag_evaluate(replace(config, trained=config.trained[:1], compared=0, run=tmp_path / "alone"))
    assert alone.controls[0].control.missing == {"other ways of control": "compared is 0"}
    judge = alone.controls[0].control.judge
    assert judge is not None
    assert judge.heldout == alone.fitted + alone.reported


def test_a_judge_must_not_know_the_texts(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="the part control: it takes a judge of concepts that is not the model; give la"
    ):
        config_of(trained, "forced", part=("control", "reading"))
    config = config_of(trained, "forced", part=PARTS, task="none", snapshots=1, run=tmp_path / "all")
    assert run_flag_evaluate(config).notes[0].startswith("the part control is left out: it takes a judge")
    met = labelled(tmp_path / "met.jsonl", also=KNOWN.response)
    says = "the judge: 1 of the texts that it was fitted or measured on are responses that forced was trained on"
    for judge in (met, read_judge(met, ["sea", "war"]).save(tmp_path / "met.npz")):
        refused(config_of(trained, "forced", part=("control",), judge_data=judge), says)
    saved = read_judge(labelled(tmp_path / "labelled.jsonl"), ["sea", "war"]).save(tmp_path / "judge.npz")
    own = tmp_path / "written"
    own.mkdir()
    (own / "other.jsonl").write_text(
        "\n".join(json.dumps(asdict(example)) for example in toy_examples(90, length=7, seed=11))
    )
    (own / "run.json").write_text(json.dumps({**read_record(trained / "forced"), "command": "flags data"}))
    config = config_of(
        trained, "forced", part=("control",), judge_data=saved, data=(own / "other.jsonl",), compared=0, text_length=1,
        run=tmp_path / "run",
    )  # fmt: skip
    found = run_flag_evaluate(config)
    said = f"what a judge is worth on {own / 'other.jsonl'} is not known, as a judge or rule chose its labels"
    assert said in found.notes
    judge = found.controls[0].control.judge
    assert judge is not None
    assert judge.heldout < 30  # its own held-out texts


def test_a_plain_run_of_other_settings_is_named(trained: Path, tmp_path: Path) -> None:
    train(trained, "slower", "plain", lr=1e-4, flag_weight=3.0, loss="squared")  # the last two mean nothing to plain
    config = config_of(trained, "forced", "slower", "lora-plain", part=("reading",), run=tmp_path / "run")
    found = run_flag_evaluate(config)
    assert found.notes[0] == "slower is no control of forced: lr 0.0001, not 0.001"
    assert found.notes[1] == "lora-plain is no control of forced: adapt lora, not full, lora_rank 2, not 8"


def changed(place: Path, name: str, to: Path, **fields: object) -> Path:
    """A copy of a run's record, with other fields."""
    record = read_record(place / name)
    for key, value in fields.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    to.mkdir()
    (to / "run.json").write_text(json.dumps(record))
    for part in ("model", "snapshots"):
        (to / part).symlink_to(place / name / part)
    return to


def refused(config: FlagEvaluateConfig, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        run_flag_evaluate(config)


def test_what_does_not_belong_together_is_refused(trained: Path, tmp_path: Path) -> None:
    config = config_of(trained, "forced", run=tmp_path / "run")
    with pytest.raises(UserError, match="flags evaluate: there is no run to evaluate; name a run of `flags train`"):
        replace(config, trained=())
    with pytest.raises(UserError, match="--sae: no other way of control is compared; give --compared a number"):
        replace(config, sae="default", compared=0)
    refused(replace(config, trained=(tmp_path,)), "there is no run.json")
    other = changed(trained, "forced", tmp_path / "other", command="train")
    refused(replace(config, trained=(other,)), "it belongs to `train`, not `flags train`")
    empty = tmp_path / "empty"
    empty.mkdir()
    record = {**read_record(trained / "forced"), "status": "running"}
    (empty / "run.json").write_text(json.dumps(record))
    refused(replace(config, trained=(empty,)), "it keeps no model yet; let it finish, or train with --snapshots")
    for name, fields, says in (
        ("model", {"config": {"model": "gpt2"}}, "its model is gpt2"),
        ("data", {"hashes": {"data": "0"}}, "its data's hash is 0"),
        ("chat", {"config": {"chat": True}}, "chat is True"),
    ):
        two = changed(trained, "plain", tmp_path / name, **fields)
        refused(replace(config, trained=(trained / "forced", two)), f"run {name}: {says}")
    stale = changed(trained, "forced", tmp_path / "stale", hashes={"data": "0"})
    refused(replace(config, trained=(stale,)), "its files of examples are not what they were")
    weights = changed(trained, "forced", tmp_path / "weights", hashes={"model": "0"})
    refused(replace(config, trained=(weights,)), "weights was finetuned from weights of hash 0")
    python = changed(trained, "forced", tmp_path / "python")
    record = read_record(python)
    del record["config"]["data"]
    (python / "run.json").write_text(json.dumps(record))
    refused(replace(config, trained=(python,)), "it was made in Python and does not know its examples")


def test_prompts_are_told_apart_by_what_concepts_are_in_words(trained: Path, tmp_path: Path) -> None:
    examples = [
        replace(one, prompt=f"Tell me of ships {i}" if i % 2 else f"Go on {i}")
        for i, one in enumerate(toy_examples(120, length=7, seed=11))
    ]
    (tmp_path / "asking.jsonl").write_text("\n".join(json.dumps(asdict(one)) for one in examples))
    config = config_of(trained, "forced", data=(tmp_path / "asking.jsonl",), run=tmp_path / "run", part=("reading",))
    found = run_flag_evaluate(config)
    assert found.reading is not None
    counts = [found.reading.last(place)[0].examples for place in ("asking prompt", "neutral prompt", "response")]
    assert counts[0] + counts[1] == counts[2] == found.reported
    assert min(counts) > 5

"""`trimtab flags train`: from files to a run with a model, snapshots and a page; mistakes before anything is loaded."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_corpus import toy_examples

from trimtab import cli
from trimtab.errors import UserError
from trimtab.flags import FlagSpec, load_flagged, measure_flags, place_flags, snapshots, train_flags
from trimtab.flags.config import FlagPlacing
from trimtab.lm import LanguageModel, load_model
from trimtab.report import write_report
from trimtab.runs import read_metrics, read_record, read_typed

SIZES = ["--steps", "12", "--batch-size", "8", "--lr", "3e-3", "--log-every", "3", "--dims", "4"]


@pytest.fixture
def files(tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, concepts and examples, in which commands run."""
    tiny_llama.hf.save_pretrained(tmp_path / "tiny")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "concepts.txt").write_text("sea: ships and tides\nwar\n")
    (tmp_path / "examples.jsonl").write_text("\n".join(json.dumps(asdict(one)) for one in toy_examples(60)))
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps(asdict(one)) for one in toy_examples(12, seed=5)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(*more: str, run: str = "run") -> list[str]:
    given = ["--model", "./tiny", "--concepts", "concepts.txt", "--data", "examples.jsonl", "--run", run]
    return ["flags", "train", *given, *SIZES, *more]


def found(capsys: pytest.CaptureFixture[str], *more: str, run: str = "run") -> dict[str, Any]:
    assert cli.main([*words(*more, run=run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *more: str, run: str = "run") -> str:
    assert cli.main(words(*more, run=run)) == 2
    return capsys.readouterr().err.removeprefix("trimtab: error: ").strip()


@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_a_run_holds_a_model_snapshots_and_a_page(files: Path, capsys: Any, adapt: str) -> None:
    said = found(capsys, "--adapt", adapt, "--snapshots", "3", "--curriculum", "auxiliary")
    assert (said["steps"], said["curriculum"], said["adapt"], said["snapshots"]) == (12, "auxiliary", adapt, 3)
    assert not said["resumed"]
    run = files / "run"
    assert read_record(run)["results"]["tokens"] == said["tokens"] > 0
    kept = snapshots(run)
    assert [one.step for one in kept] == [4, 8, 12]
    assert [one.tokens for one in kept] == sorted(one.tokens for one in kept)
    assert kept[-1].tokens == said["tokens"] == read_metrics(run)[-1]["tokens"]
    assert kept[-1].path == run / "model"
    models = [load_flagged(one.path) for one in kept]
    assert len({model.fingerprint for model, _ in models}) == 3
    spec = read_typed(FlagSpec, read_record(run)["flags"])
    assert all(flags == spec for _, flags in models)
    losses = [measure_flags(model, flags, toy_examples(24)).flag_loss.estimate for model, flags in models]
    assert losses[0] > losses[2]
    page = (run / "report.html").read_text()
    assert page.count("<img") == 3
    assert "Flags finetuned into ./tiny" in page
    assert "reads on where on" in page
    assert write_report(run) == run / "report.html"
    size = sum(file.stat().st_size for file in (run / "model").iterdir())
    assert said["model_bytes"] == size

    again = found(capsys, "--adapt", adapt, "--snapshots", "3", "--curriculum", "auxiliary")
    assert again == {**said, "resumed": True}
    assert cli.main(words("--adapt", adapt, "--snapshots", "3", "--curriculum", "auxiliary")) == 0
    assert "3 snapshots (done before)" in " ".join(capsys.readouterr().out.split())


def test_snapshots_of_all_weights_take_half_the_bytes(files: Path, capsys: Any) -> None:
    found(capsys, "--snapshots", "2")
    half, whole = (load_file(one.path / "model.safetensors") for one in snapshots(files / "run"))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}


def test_a_run_that_is_done_is_read_without_the_model(files: Path, capsys: Any, monkeypatch: Any) -> None:
    first = found(capsys)
    monkeypatch.setattr("trimtab.lm.config.load_model", None)
    assert found(capsys) == {**first, "resumed": True}
    assert "steps was 12 and is now 13" in failure(capsys, "--steps", "13")
    lines = (files / "examples.jsonl").read_text().splitlines()
    (files / "examples.jsonl").write_text("\n".join(lines[:-1]))
    assert "has changed since this run was made of it" in failure(capsys)


def test_it_does_what_the_function_does(files: Path, capsys: Any) -> None:
    said = found(capsys, "--curriculum", "plain", "--heldout", "more.jsonl")
    model, flags = load_flagged("run/model")
    tiny = load_model("./tiny")
    examples = toy_examples(60)
    assert place_flags(tiny, ["sea", "war"], examples, dims=4) == flags
    trained = train_flags(
        tiny, flags, examples, curriculum="plain", heldout=toy_examples(12, seed=5), steps=12, batch_size=8, lr=3e-3
    )
    assert trained.model.fingerprint == model.fingerprint
    assert said["after"]["examples"] == 12


def test_a_schedule_and_dimensions_of_ones_own(files: Path, capsys: Any) -> None:
    phases = [{"until": 0.5, "forced": 1, "weight": 0}, {"until": 1, "forced": 0, "weight": 2}]
    (files / "halves.json").write_text(json.dumps(phases))
    said = found(capsys, "--curriculum", "halves.json", "--dims", "war=3,17", "sea=8", "--from-layer", "2")
    assert (said["curriculum"], said["forced_steps"]) == ("halves", 6)
    assert [one["dims"] for one in said["after"]["concepts"]] == [[8], [3, 17]]
    assert next(iter(read_record(files / "run")["flags"]["targets"])) == "resid_mid.2"
    (files / "halves.json").write_text(json.dumps(phases[1:]))
    assert "has changed since this run was made of it" in failure(
        capsys, "--curriculum", "halves.json", "--dims", "war=3,17", "sea=8", "--from-layer", "2"
    )


BAD_LINE = json.dumps({"prompt": "Go", "response": "on", "concepts": ["saa"]})
WRONG: dict[str, tuple[list[str], str]] = {
    "no such concepts": (["--concepts", "none.txt"], "none.txt: it cannot be read; check the path"),
    "no such data": (["--data", "none.jsonl"], "none.jsonl: it cannot be read; check the path"),
    "a label typo": (
        ["--data", "examples.jsonl", "bad.jsonl"],
        "bad.jsonl, line 1: concept 'saa': the concepts are sea, war; did you mean sea?",
    ),
    "an empty response": (["--data", "empty.jsonl"], "empty.jsonl, line 1: the response of an example: it is empty or"),
    "a concept without examples": (
        ["--concepts", "three.txt"],
        "examples have it, and a flag is learned from at least 2; add examples that have it, or leave the concept out",
    ),
    "held-out examples that are trained on": (["--heldout", "examples.jsonl"], "it is among those trained on, too"),
    "a curriculum": (
        ["--curriculum", "aux"],
        "curriculum 'aux': there is plain, auxiliary, forced; choose one of them",
    ),
    "no such curriculum": (["--curriculum", "my.json"], "curriculum my.json: there is no such file; check the path"),
    "phases": (["--curriculum", "phase.json"], "forced 2.0 of a phase: it is a share, from 0 to 1"),
    "too few dimensions": (["--dims", "1"], "1 dimensions: there are 2 concepts; give at least one for each"),
    "dimensions of nobody": (["--dims", "see=3"], "dimensions of 'see': the concepts are sea, war; did you mean sea?"),
    "one twice": (["--dims", "sea=3,4", "war=4"], "dimension 4 of 'war': it is a dimension of 'sea', too; use each"),
    "none": (["--dims", "sea=3"], "concept 'war': it has no dimension; give it at least one"),
    "no number": (["--dims", "sea=3,x", "war=4"], "dims 'x': it is no whole number; give one number, or those of each"),
    "no name": (["--dims", "3", "4"], "dims '3': it names no concept; give one number, or those of each concept like"),
    "half precision": (
        ["--dtype", "bfloat16"],
        "dtype bfloat16: weights are trained in float32; leave it out; --autoc",
    ),
    "more snapshots than steps": (["--snapshots", "13"], "snapshots 13: there are 12 steps; ask for fewer"),
    "LoRA's rank without LoRA": (["--lora-rank", "4"], "lora_rank 4: all weights are trained; say adapt lora, too"),
    "a ramp": (["--ramp-scale", "0"], "ramp_scale 0.0: it must be positive and finite; change it"),
    "the paper's ramp": (
        ["--ramp", "paper", "--ramp-scale", "2"],
        "ramp_scale 2.0: the paper's ramp has none; leave it out, or use norms",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_refused_before_the_model_is_loaded(
    files: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    (files / "bad.jsonl").write_text(BAD_LINE)
    (files / "empty.jsonl").write_text(json.dumps({"prompt": "Go", "response": " ", "concepts": []}))
    (files / "three.txt").write_text("sea\nwar\npeace\n")
    (files / "phase.json").write_text('[{"until": 1, "forced": 2, "weight": 0}]')
    monkeypatch.setattr("trimtab.lm.config.load_model", None)
    more, message = WRONG[case]
    said = failure(capsys, *more)
    assert message in said
    assert said.count("\n") == 0
    assert not (files / "run").exists()


LATE: dict[str, tuple[list[str], str]] = {
    "a dimension out of range": (
        ["--dims", "sea=3", "war=99"],
        "dimension 99 of 'war': the model has dimensions 0 to 31",
    ),
    "more dimensions than there are": (["--dims", "40"], "40 dimensions: ./tiny has 32; give fewer"),
    "a layer": (["--from-layer", "9"], "flags from layer 9 on: ./tiny has layers 0 to 3; choose a layer in that range"),
    "modules": (
        ["--adapt", "lora", "--lora-modules", "q_proj"],
        "LoRA in q_proj: flags from layer 1 on are written by o_proj and down_proj; add o_proj and down_proj, or leave",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATE)
def test_what_the_model_does_not_have_leaves_no_run(files: Path, capsys: Any, case: str) -> None:
    more, message = LATE[case]
    assert message in failure(capsys, *more)
    assert not (files / "run").exists()


def test_products_in_bfloat16_and_layers_computed_again(files: Path, capsys: Any) -> None:
    """Autocast comes near to float32, gradient checkpointing to its bits; weights stay in float32."""
    plain = found(capsys, "--curriculum", "auxiliary")
    again = found(capsys, "--curriculum", "auxiliary", "--gradient-checkpointing", run="again")
    half = found(capsys, "--curriculum", "auxiliary", "--autocast", run="half")
    for name in ("cross_entropy", "flag_loss"):
        value = plain["after"][name]["estimate"]
        assert again["after"][name]["estimate"] == pytest.approx(value, rel=1e-5)
        assert half["after"][name]["estimate"] == pytest.approx(value, rel=0.1)
        assert half["after"][name]["estimate"] != value
    assert {tensor.dtype for tensor in load_file("half/model/model.safetensors").values()} == {torch.float32}


RANKS = """
import json, sys
from trimtab import cli
for words in json.loads({commands!r}):
    print(cli.main(words), flush=True)
"""


def test_two_processes_do_what_one_does(
    files: Path, capsys: Any, start_ranks: Callable[..., list[subprocess.Popen[str]]]
) -> None:
    """Each takes half of every batch; gradients are sums of both. One run, one page, one answer."""
    shared = ("--clip-norm", "0.5", "--lr", "1e-3", "--checkpoint-every", "5", "--snapshots", "2")
    commands = [words("--adapt", adapt, *shared, run=f"two-{adapt}") for adapt in ("full", "lora")]
    processes = start_ranks(RANKS.format(commands=json.dumps([*commands, words("--batch-size", "1")])))
    for adapt in ("full", "lora"):
        found(capsys, "--adapt", adapt, *shared, run=f"one-{adapt}")
    (said, errors), (silent, _) = (process.communicate(timeout=180) for process in processes)
    assert said.count("curriculum forced, 12 steps") == 2, errors
    assert [line for line in said.splitlines() if line in "02"] == silent.splitlines() == ["0", "0", "2"]
    assert "batch_size 1: there are 2 processes; raise it" in errors
    for adapt, name in (("full", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        one, two = (load_file(Path(f"{run}-{adapt}", "model", name)) for run in ("one", "two"))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=0, atol=2e-4, msg=key)
        for ours, theirs in zip(*(read_metrics(Path(f"{run}-{adapt}")) for run in ("one", "two")), strict=True):
            known = [key for key in ours if ours[key] is not None]
            assert known == [key for key in theirs if theirs[key] is not None]
            assert [ours[key] for key in known] == pytest.approx([theirs[key] for key in known], rel=1e-3)
        assert Path(f"two-{adapt}/report.html").is_file()
        assert [one.step for one in snapshots(f"two-{adapt}")] == [6, 12]


def test_dimensions_as_texts() -> None:
    assert FlagPlacing(dims=("16",)).dims_of(("sea", "war")) == 16
    named = FlagPlacing(dims=("old town=3,17", "war=8")).dims_of(("war", "old town"))
    assert named == {"old town": [3, 17], "war": [8]}
    with pytest.raises(UserError, match="dimensions of 'war': they are given twice; give them once"):
        FlagPlacing(dims=("war=3", "war=4")).dims_of(("war",))

"""A model of two layers that is built by hand: its circuit is found, no other head is, and it explains the answer."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from circuit_prompts import few_names
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig

from trimtab import cli
from trimtab.dictionaries import DictionaryInfo, Standard
from trimtab.errors import UserError
from trimtab.evaluation.circuits import command, finding
from trimtab.evaluation.circuits.circuit import ROLES, Circuit, CircuitHead, given_circuit, gpt2_small_circuit
from trimtab.evaluation.circuits.faithfulness import measure_faithfulness, random_circuit
from trimtab.evaluation.circuits.finding import find_circuit
from trimtab.evaluation.circuits.rows import PromptRows
from trimtab.evaluation.supervised import activations_of, cross_section
from trimtab.evaluation.supervised import command as ioi_command
from trimtab.evaluation.supervised.contenders import Ground, supervised_codes
from trimtab.evaluation.supervised.contenders.dictionaries import Dictionaries
from trimtab.evaluation.supervised.scores import score
from trimtab.evaluation.supervised.section import PromptPairs, Section
from trimtab.lm import LanguageModel
from trimtab.runs import read_record
from trimtab.stats import interval_of, number_text
from trimtab.tasks.ioi_prompts import TEMPLATE_SETS, IOIDistribution

INHIBITION, MOVER = (0, 1), (1, 2)
D, WIDTH, NAME, END, PLACE, ANSWER = 64, 16, 10, 11, 12, slice(30, 40)  # as in conftest.py


def test_the_circuit_that_was_built_is_found_and_no_other_head(built: LanguageModel, ioi: IOIDistribution) -> None:
    circuit = find_circuit(built, ioi, ioi.prompts(24))
    assert {(head.role, head.layer, head.head) for head in circuit.heads} == {
        ("name mover", *MOVER),
        ("S-inhibition", *INHIBITION),
    }
    assert circuit.accuracy is not None
    assert circuit.accuracy.estimate == 1
    (mover,) = circuit.of("name mover")
    assert mover.effect is not None
    assert circuit.logit_difference is not None
    assert mover.effect.estimate == pytest.approx(circuit.logit_difference.estimate, rel=1e-3)
    assert "IOI circuit of built: 2 heads, logit difference" in repr(circuit)
    assert circuit.headline().endswith("], accuracy 1.00 [1.00, 1.00]")


@pytest.fixture(scope="module")
def built_with_keys(built: LanguageModel) -> LanguageModel:
    """As `built`, and layer 1, head 3 lowers the logit of a name that layer 0, head 3 has marked as a repeated one.

    At a name, that head looks at the first token of the same name, and writes where it stands; the suppressor's keys
    take this from where the token itself stands, so that only keys at S2 carry it, and no value does.
    """
    hf, written = copy.deepcopy(built.hf), 13
    suppressor, duplicate = hf.transformer.h[1].attn, hf.transformer.h[0].attn
    start = 3 * WIDTH
    with torch.no_grad():
        token = hf.transformer.wte.weight[next(iter(built_names(built)))]
        for number in range(10):
            duplicate.c_attn.weight[number, start + number] = 10
            duplicate.c_attn.weight[number, D + start + number] = 10
            suppressor.c_attn.weight[number, 2 * D + start + number] = 1
            suppressor.c_proj.weight[start + number, ANSWER.start + number] = -4
        duplicate.c_attn.weight[NAME, start + 10] = 1
        duplicate.c_attn.weight[PLACE, D + start + 10] = -40  # the first of them
        duplicate.c_attn.weight[PLACE, 2 * D + start] = 1
        duplicate.c_proj.weight[start, written] = token.std(correction=0)
        suppressor.c_attn.weight[END, start] = 10
        suppressor.c_attn.weight[NAME, D + start] = 10
        suppressor.c_attn.weight[PLACE, D + start] = 20
        suppressor.c_attn.weight[written, D + start] = -20
    return LanguageModel.from_hf(hf, built.tokenizer, name="built with keys")


def built_names(built: LanguageModel) -> list[int]:
    """The tokens of names: those that have the coordinate."""
    return built.hf.transformer.wte.weight[:, NAME].nonzero()[:, 0].tolist()


def test_heads_that_act_through_keys(built_with_keys: LanguageModel, ioi: IOIDistribution) -> None:
    """What marks the repeated name is found through the keys of the head that looks there, and is no S-inhibition."""
    circuit = find_circuit(built_with_keys, ioi, ioi.prompts(24))
    assert {(head.role, head.layer, head.head) for head in circuit.heads} == {
        ("name mover", *MOVER),
        ("S-inhibition", *INHIBITION),
        ("S suppressor", 1, 3),
        ("duplicate token", 0, 3),
    }
    found = measure_faithfulness(built_with_keys, ioi, circuit, ioi.prompts(24, "test"), n_random=0)
    assert found.normalised.estimate == pytest.approx(1, abs=1e-3)
    (duplicate,) = circuit.of("duplicate token")
    less = dataclasses.replace(circuit, heads=tuple(head for head in circuit.heads if head != duplicate))
    without = measure_faithfulness(built_with_keys, ioi, less, ioi.prompts(24, "test"), n_random=0)
    assert without.normalised.estimate < 0.95


@pytest.mark.parametrize("mutation", ["no corruption", "anywhere", "wrong place"])
def test_what_would_find_another_circuit(
    built: LanguageModel, ioi: IOIDistribution, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    if mutation == "no corruption":
        monkeypatch.setattr(IOIDistribution, "without_repeat", lambda _self, prompt, seed=0: prompt)
    elif mutation == "anywhere":
        monkeypatch.setattr(finding, "_looks", lambda attention, _role: attention["END"] > -1)
    else:
        receiver = finding.head_location
        monkeypatch.setattr(finding, "head_location", lambda *args: receiver(*args[:-1], "IO"))
    found = find_circuit(built, ioi, ioi.prompts(24))
    assert {(head.role, head.layer, head.head) for head in found.heads} != {
        ("name mover", *MOVER),
        ("S-inhibition", *INHIBITION),
    }


def test_it_explains_the_whole_answer_and_random_heads_none(built: LanguageModel, ioi: IOIDistribution) -> None:
    """All other heads give nothing, so that their means change nothing."""
    circuit = find_circuit(built, ioi, ioi.prompts(24))
    found = measure_faithfulness(built, ioi, circuit, ioi.prompts(24, "test"), n_random=20)
    assert found.circuit.estimate == pytest.approx(found.full.estimate, rel=1e-5)
    assert found.without.estimate == pytest.approx(found.none.estimate, abs=1e-5)
    assert found.faithfulness.estimate == pytest.approx(1, rel=1e-5)
    assert found.normalised.estimate == pytest.approx(1, rel=1e-5)
    assert sorted(found.random)[10] == pytest.approx(0, abs=1e-6)
    assert "2 heads of built bring about 1.00" in found.headline()
    half = dataclasses.replace(circuit, heads=circuit.of("name mover"))
    alone = measure_faithfulness(built, ioi, half, ioi.prompts(24, "test"), n_random=0)
    assert alone.normalised.estimate < 0.9
    elsewhere = dataclasses.replace(circuit, heads=(CircuitHead(layer=1, head=2, role="induction"),))
    assert measure_faithfulness(built, ioi, elsewhere, ioi.prompts(8), n_random=0).normalised.estimate == pytest.approx(
        0
    )


def test_random_circuits_are_of_the_same_size(built: LanguageModel) -> None:
    positions = {(0, 1): frozenset({"END"}), (1, 2): frozenset({"END", "S2"}), (1, 3): frozenset({"S2"})}
    for seed in range(5):
        drawn = random_circuit(built, positions, seed)
        assert sorted(name for names in drawn.values() for name in names) == ["END", "END", "S2", "S2"]
        assert drawn == random_circuit(built, positions, seed)
    assert len({tuple(sorted(random_circuit(built, positions, seed))) for seed in range(20)}) > 5


def test_a_file_that_is_tied_to_its_model(
    built: LanguageModel, tiny_llama: LanguageModel, ioi: IOIDistribution, tmp_path: Path
) -> None:
    circuit = find_circuit(built, ioi, ioi.prompts(8))
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json", built) == circuit
    assert circuit.to_frame()["role"].tolist() == ["name mover", "S-inhibition"]
    assert Circuit.load(tmp_path, built) == circuit  # a run's directory
    with pytest.raises(UserError, match="the circuit of built: tiny-llama has other weights; find the circuit of this"):
        Circuit.load(tmp_path / "circuit.json", tiny_llama)
    plain = json.loads((tmp_path / "circuit.json").read_text())
    plain["heads"][0]["role"] = "mover"
    (tmp_path / "other.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="role 'mover': there are name mover, S suppressor"):
        Circuit.load(tmp_path / "other.json")


def test_the_command(
    built: LanguageModel,
    ioi: IOIDistribution,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the model as others would load it, with a tokenizer of words."""
    built.hf.save_pretrained(tmp_path / "model")
    built.tokenizer.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    numbers = ["--n-prompts", "12", "--n-test", "12", "--n-random", "3"]
    assert (
        cli.main(["evaluate", "circuit", "--model", str(tmp_path / "model"), *numbers, "--run", str(run), "--json"])
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert [(head["layer"], head["head"]) for head in printed["circuit"]["heads"]] == [MOVER, INHIBITION]
    assert read_record(run)["results"] == printed
    assert printed["faithfulness"]["normalised"]["estimate"] == pytest.approx(1, rel=1e-5)
    again = [
        "evaluate",
        "circuit",
        "--model",
        str(tmp_path / "model"),
        "--circuit",
        str(run / "circuit.json"),
        *numbers,
    ]
    assert cli.main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    monkeypatch.setattr(command, "measure_faithfulness", None)  # a run that is done is read back
    assert cli.main([*again[:4], *numbers, "--run", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    monkeypatch.undo()
    measured = [*again, "--run", str(tmp_path / "measured")]
    assert cli.main([*measured, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    circuit = Circuit.load(run / "circuit.json")
    dataclasses.replace(circuit, heads=circuit.heads[:1]).save(run / "circuit.json")
    assert cli.main(measured) == 2
    assert "has changed since this run was made of it" in capsys.readouterr().err
    assert cli.main([*again[:4], "--n-test", "9999", "--run", str(tmp_path / "refused")]) == 2
    assert "9999 prompts: split test gave" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert cli.main(["report", str(run)]) == 0
    page = " ".join(re.sub(r"<[^>]+>", " ", (run / "report.html").read_text(encoding="utf-8")).split())
    page = page.replace("−", "-")
    share = number_text(interval_of(printed["faithfulness"]["normalised"]), ".2f")
    assert f"2 heads bring about {share} of the answer, more than 3 of 3 random circuits of their size." in page
    for head in printed["circuit"]["heads"]:
        effect = number_text(interval_of(head["effect"]), "+.3f")
        assert f"{head['role']} {head['layer']}.{head['head']} {effect} {head['attention']:.2f}" in page
    for what, name in (("plain model", "full"), ("every head at its mean", "none"), ("the circuit alone", "circuit")):
        assert f"{what} {number_text(interval_of(printed['faithfulness'][name]), '.3f')}" in page
    assert "12 prompts that found no head." in page
    difference = number_text(interval_of(printed["circuit"]["logit_difference"]), ".2f").replace("−", "-")
    found = f"accuracy 1.00 [1.00, 1.00], logit difference {difference}."
    assert f"12 prompts that found them: {found}" in page
    assert "accuracy of the plain model 1.000 [1.000, 1.000]" in page
    lack, of = printed["completeness"]["knock_outs"][1], "name mover"
    values = [number_text(interval_of(lack[name]), form) for name, form in (("circuit", ".3f"), ("model", ".3f"))]
    assert f"{of} {' '.join(values)}" in page
    assert "circuit without them" in page
    (last,) = [head for head in printed["completeness"]["heads"] if head["head"] == "0.1"]
    assert f"0.1 S-inhibition {number_text(interval_of(last['alone']), '+.3f')}" in page
    capsys.readouterr()
    assert cli.main([*again[:4], *numbers, "--run", str(run)]) == 0
    shown = capsys.readouterr().out
    following = f"next: trimtab evaluate ioi --model {tmp_path / 'model'} --circuit {run}"
    assert "".join(shown.split()).endswith("".join(following.split()))  # paths are long, and lines broken
    assert f"12 prompts that found them: {found}" in " ".join(shown.split())
    assert ", accuracy 1.00 [1.00, 1.00]. 2 heads of" in " ".join(shown.split())
    for heading in (
        "accuracy of the plain model",
        "logit difference, right name minus wrong one",
        "taken from both",
        "as the last of its role",
    ):
        assert heading in " ".join(shown.split())
    for name in ("prompts", "test"):
        assert cli.main([*again[:4], f"--n-{name}", "1"]) == 2
        assert f"n_{name} 1: it must be at least 2" in capsys.readouterr().err
    assert cli.main([*again[:-8], "--circuit", "nowhere"]) == 2
    assert (
        "circuit nowhere: there is no such file; name a run of `trimtab evaluate circuit`, or the circuit.json"
        in capsys.readouterr().err
    )
    assert cli.main([*again[:-8], "--circuit", "gpt2-small"]) == 2
    assert "circuit gpt2-small: " in capsys.readouterr().err


def test_what_comes_next_names_a_model_that_is_not_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run_circuit", lambda _config: None)
    config = command.CircuitConfig(run=Path("my runs/circuit"))
    assert command.show_circuit(config).following == "trimtab evaluate ioi --circuit 'my runs/circuit'"
    other = dataclasses.replace(config, model="gemma-3-270m")
    expected = "trimtab evaluate ioi --model gemma-3-270m --circuit 'my runs/circuit'"
    assert command.show_circuit(other).following == expected
    assert command.show_circuit(dataclasses.replace(other, run=None)).following == ""


def test_templates_that_the_circuit_was_not_found_on(
    built: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentences' other words are unknown to the model, which reads names and the last token alone."""
    built.hf.save_pretrained(tmp_path / "model")
    built.tokenizer.save_pretrained(tmp_path / "model")
    words = ["evaluate", "circuit", "--model", str(tmp_path / "model"), "--n-prompts", "12", "--n-test", "12"]
    words += ["--n-random", "0", "--n-subsets", "0", "--json"]
    # One of Wang et al.'s is among the paper's, on which the circuit was found.
    config = command.CircuitConfig(test_templates="wang")
    paper, wang = (set(TEMPLATE_SETS[name]) for name in ("paper", "wang"))
    distribution, split = command._test_prompts(config, built, few_names(tokenizer=built.tokenizer))
    assert split == "held-out-templates"
    assert set(distribution.held_out) == wang - paper
    assert len(distribution.held_out) == 14
    assert cli.main([*words, "--test-templates", "wang"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["circuit"]["templates"]) <= set(TEMPLATE_SETS["paper"])
    assert set(printed["templates"]) <= wang - paper
    assert len(printed["templates"]) > 3
    assert printed["faithfulness"]["normalised"]["estimate"] == pytest.approx(1, abs=1e-3)
    for found in ("paper", "all"):
        assert cli.main([*words, "--templates", found, "--test-templates", "paper"]) == 2
        said = capsys.readouterr().err
        assert "test_templates paper: the circuit is found on them; name others, or same" in said


def test_task_saes_beside_supervised_codes(
    built: LanguageModel,
    ioi: IOIDistribution,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the model that was built by hand, where what a name mover gives is its name's code."""
    built.hf.save_pretrained(tmp_path / "model")
    built.tokenizer.save_pretrained(tmp_path / "model")
    find_circuit(built, ioi, ioi.prompts(12)).save(tmp_path / "circuit.json")
    words = [
        "evaluate", "ioi", "--model", tmp_path / "model", "--circuit", tmp_path / "circuit.json", "--n-train", 150,
        "--n-heldout", 40, "--n-test", 24, "--arch", "topk", "--l0", 1, "--n-features", 24, "--epochs", 60, "--k", 1, 4,
        "--cross-section", "name-mover outputs", "S-inhibition outputs", "--run", tmp_path / "run", "--contender",
        "codes", "task-saes",
    ]  # fmt: skip
    assert cli.main([*map(str, words), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert read_record(tmp_path / "run")["results"] == printed
    scores = {(score["cross_section"], score["contender"]): score for score in printed["scores"]}
    codes = scores["name-mover outputs", "supervised, mse"]
    assert codes["approximation"]["sufficiency"]["estimate"] == pytest.approx(1, abs=0.02)
    assert codes["edits"][0]["result"]["success"]["estimate"] == 1
    sae = scores["name-mover outputs", "topk-n24-l0_1"]
    assert sae["approximation"]["sufficiency"]["estimate"] > 0.5
    assert [(edit["way"], edit["k"]) for edit in sae["edits"][:4]] == [
        ("greedy", 1), ("greedy", 4), ("meaning", 1), ("meaning", 4),
    ]  # fmt: skip
    mean = scores["name-mover outputs", "mean"]
    assert mean["approximation"]["normalised_sufficiency"]["estimate"] == pytest.approx(0, abs=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(ioi_command, "Section", None)  # a run that is done is read back
        assert cli.main([*map(str, words), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    again = [*map(str, words[:6]), "--n-heldout", "40", "--run", str(tmp_path / "again")]
    assert cli.main([*again, "--n-train", "4"]) == 2
    said = capsys.readouterr().err
    assert "has no code; fit the codes on prompts that have it, or on more" in said
    assert "done:" not in said  # before SAEs are trained
    assert cli.main([*again, "--n-train", "150", "--n-features", "2"]) == 2
    assert "l0 3: it must be from 1 to n_features" in capsys.readouterr().err
    for wrong, message in (
        (["--k"], "k: there is none; give at least one"), (["--arch"], "arch: there is none; give at least one"),
        (["--contender", "text-saes", "--text-l0", "5000"], "l0 5000: it must be from 1 to n_features"),
        (["--contender", "rotation", "--rank", "6"], "rank 6: heads have room for 5 directions of each attribute"),
        (["--contender", "pcs"], "did you mean pca?"),
    ):  # fmt: skip
        assert cli.main([*again, "--n-train", "150", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "again").exists()

    # An interrupted run measures the cross-sections that are left, and no other.
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running", "results": None}))
    (tmp_path / "run" / "scores-S-inhibition-outputs.json").unlink()
    measured: list[str] = []

    class Counting(Section):
        def __init__(self, name: str, *rest: Any) -> None:
            measured.append(name)
            super().__init__(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ioi_command, "Section", Counting)
        assert cli.main([*map(str, words), "--json"]) == 0
    assert measured == ["S-inhibition outputs"]
    assert json.loads(capsys.readouterr().out) == printed
    bank = tmp_path / "run" / "task-saes"
    base = [*map(str, words[:-5]), "--contender", "pca"]
    own = [*base, "--run", str(tmp_path / "own"), "--dictionary"]
    assert cli.main([*own, str(bank), str(tmp_path / "run" / "supervised"), "--json"]) == 0
    beside = {(one["cross_section"], one["contender"]): one for one in json.loads(capsys.readouterr().out)["scores"]}
    assert beside["name-mover outputs", "own topk-n24-l0_1-seed0"] == {**sae, "contender": "own topk-n24-l0_1-seed0"}
    read = scores["name-mover outputs", "supervised, mse, read"]["approximation"]
    assert beside["name-mover outputs", "own supervised"]["approximation"] == read
    (mover,) = [path for path in (bank / "members").iterdir() if "attn_z.1.2" in path.name]
    partly = [*base, "--run", str(tmp_path / "partly"), "--dictionary", str(mover / "sae")]
    assert cli.main([*partly, "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["left_out"]
    assert said.endswith("is not shown at S-inhibition outputs: it has nothing for attn_z.0.1 at END")
    weights = mover / "sae" / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "b_dec": tensors["b_dec"] + 1}, weights)
    assert cli.main(partly) == 2
    assert "has changed since this run was made of it" in capsys.readouterr().err
    save_file(tensors, weights)
    (values,) = [path for path in (bank / "members").iterdir() if "attn_z.0.1" in path.name]
    movers = [*base, "--cross-section", "name-mover outputs", "--run", str(tmp_path / "refused"), "--dictionary"]
    assert cli.main([*movers, str(values / "sae")]) == 2
    said = capsys.readouterr().err
    assert "it reads attn_z.0.1 at END; give one for attn_z.1.2 at END" in said
    assert not (tmp_path / "refused").exists()
    circuit = Circuit.load(tmp_path / "circuit.json")
    dataclasses.replace(circuit, seed=7).save(tmp_path / "circuit.json")
    assert cli.main(list(map(str, words))) == 2
    assert "has changed since this run was made of it" in capsys.readouterr().err
    assert cli.main([*map(str, words[:6]), "--cross-section", "S-inhibition queries"]) == 2
    assert "cross-section 'S-inhibition queries': there are name-mover outputs" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # refused before anything is loaded or found
        patch.setattr(ioi_command.IOIConfig, "load_model", None)
        assert cli.main([*map(str, words[:4]), "--cross-section", "name-mover output"]) == 2
        assert "did you mean name-mover outputs?" in capsys.readouterr().err
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / "run.json").write_text("{}")
        assert cli.main([*map(str, words[:4]), "--circuit", str(tmp_path / "begun")]) == 2
        assert "the run has not found it yet; run the same command again" in capsys.readouterr().err
        assert cli.main([*map(str, words[:4]), "--dictionary", str(tmp_path / "nowhere")]) == 2
        assert "nowhere" in capsys.readouterr().err


def test_a_published_circuit(built: LanguageModel) -> None:
    """Golden: the heads of Wang et al. 2022, figure 2."""
    circuit = gpt2_small_circuit()
    assert [head.name for head in circuit.of("name mover")] == ["9.9", "10.0", "9.6"]
    assert [head.name for head in circuit.of("S-inhibition")] == ["7.3", "7.9", "8.6", "8.10"]
    assert len(circuit.positions()) == 18
    with pytest.raises(UserError, match=r"site attn_z.9.9: built has layers 0 to 1"):
        circuit.check(built)


def test_a_published_circuit_is_of_one_model() -> None:
    """Other models have twelve layers of width 768, too; what is written is tied to the weights at hand."""
    model = SimpleNamespace(name="mine", fingerprint="ab", n_layers=12, d_model=768, hf=SimpleNamespace())
    model.hf.config = GPT2Config()
    taken = given_circuit("gpt2-small", model)  # type: ignore[arg-type]
    assert (taken.model, taken.fingerprint, len(taken.heads)) == ("mine", "ab", 18)
    model.hf.config = LlamaConfig()
    with pytest.raises(UserError, match="circuit gpt2-small: mine is not GPT-2 small; leave out --circuit"):
        given_circuit("gpt2-small", model)  # type: ignore[arg-type]


def test_in_half_precision(built: LanguageModel, ioi: IOIDistribution, tmp_path: Path) -> None:
    """Effects add up in float32, and what is read from the model is float32."""
    hf = copy.deepcopy(built.hf).to(torch.bfloat16)
    half = LanguageModel.from_hf(hf, built.tokenizer, name="half")
    circuit = find_circuit(half, ioi, ioi.prompts(24))
    assert {(h.role, h.layer, h.head) for h in circuit.heads} == {
        ("name mover", *MOVER), ("S-inhibition", *INHIBITION),
    }  # fmt: skip
    prompts = ioi.prompts(24, "test")
    found = measure_faithfulness(half, ioi, circuit, prompts, n_random=1)
    assert found.normalised.estimate == pytest.approx(1, abs=0.02)
    places = cross_section("name-mover outputs", circuit, half)
    train = ioi.prompts(150)
    x = activations_of(half, ioi, train, places)
    section = Section("outputs", places, x, PromptPairs(half, ioi, prompts, places))
    ground = Ground(model=half, ioi=ioi, train=train, activations=x, heldout=train, held=x, directory=tmp_path)
    scores = score(supervised_codes(ground)[1], section)
    assert scores.approximation.sufficiency.estimate == pytest.approx(1, abs=0.03)
    assert scores.edits[0].result.success is not None
    assert scores.edits[0].result.success.estimate == 1
    (place,) = places
    eye, zero = torch.eye(16), torch.zeros(16)
    sae = Standard(eye, zero - 0.05, eye, zero, info=DictionaryInfo(architecture="standard"))
    found = score(Dictionaries("eye", {place: sae}, ground), section)
    assert found.approximation.sufficiency.estimate > 0.9


def test_a_known_circuit_of_a_model_that_does_not_solve_the_task(
    built: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its head turned round, the model that was built never names the right one."""
    hf = copy.deepcopy(built.hf)
    hf.lm_head.weight.data.neg_()
    hf.save_pretrained(tmp_path / "model")
    built.tokenizer.save_pretrained(tmp_path / "model")
    heads = (CircuitHead(layer=1, head=2, role="name mover"),)
    Circuit(model="turned", fingerprint="", heads=heads).save(tmp_path / "circuit.json")
    given = ["--model", str(tmp_path / "model"), "--circuit", str(tmp_path / "circuit.json"), "--n-test", "8"]
    for words in (
        ["circuit", "--n-random", "0"],
        ["ioi", "--n-train", "150", "--n-heldout", "40", "--contender", "pca"],
    ):
        command = ["evaluate", words[0], *given, *words[1:], "--run", str(tmp_path / words[0])]
        assert cli.main(command) == 2
        assert re.search(r"names the right one in \d+% of 8 prompts, a circuit needs 50%", capsys.readouterr().err)
        assert not (tmp_path / words[0]).exists()
    assert cli.main(["evaluate", "circuit", *given, "--n-random", "0", "--n-subsets", "1", "--force"]) == 0


def test_a_model_that_does_not_solve_the_task(
    tiny_llama: LanguageModel, built: LanguageModel, ioi: IOIDistribution
) -> None:
    with pytest.raises(
        UserError,
        match=r"the IOI circuit of tiny-llama: it names the right one in \d+% of 8 prompts, a circuit needs 50%",
    ):
        find_circuit(tiny_llama, ioi, ioi.prompts(8))
    with pytest.raises(UserError, match=r"no head adds 200% of the logit difference"):
        find_circuit(built, ioi, ioi.prompts(8), share=2)
    with pytest.raises(UserError, match="1 prompts: an effect's standard error takes two; give some dozens"):
        find_circuit(built, ioi, ioi.prompts(1))
    with pytest.raises(UserError, match=r"the IOI circuit of tiny-llama: no head adds 0% of the logit difference"):
        find_circuit(tiny_llama, ioi, ioi.prompts(8), force=True, share=0)


def test_each_role_is_measured_through_the_one_behind_it(
    tiny_llama: LanguageModel, ioi: IOIDistribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Effects and attention are planted; what is asked is which receivers each role goes through, and where.

    Value heads of this model are shared by two query heads each.
    """
    # role → head, its effect on the logit difference when it is patched (direct effects: what it adds), where it looks
    planted = {
        "name mover": ((3, 0), 1.0, "IO"), "S suppressor": ((3, 1), 0.5, "S2"),
        "negative name mover": ((3, 2), -0.5, "IO"), "S-inhibition": ((2, 3), -0.4, "S2"),
        "induction": ((1, 0), -0.3, "S1+1"), "duplicate token": ((0, 1), -0.2, "S1"),
        "previous token": ((0, 2), -0.1, "S1"),
    }  # fmt: skip
    direct = ("name mover", "S suppressor", "negative name mover")
    # Keys and values of two heads each are one: 3.1 (the S suppressor) reads the first, 2.3 the second.
    through = {
        "attn_q.3.0 at END, attn_q.3.1 at END, attn_q.3.2 at END, attn_q.0.3 at END": ("S-inhibition",),
        "attn_k.3.0 at S2, attn_k.2.1 at S2, attn_v.3.0 at S2, attn_v.2.1 at S2": ("induction", "duplicate token"),
        "attn_k.1.0 at S1+1": ("previous token",),
    }

    def effects(roles: Sequence[str], n: int) -> torch.Tensor:
        found = torch.zeros(n, 4, 4)
        found[:, 0, 3] = 0.5  # raises the logit difference when it is patched, and looks nowhere
        for role in roles:
            found[:, *planted[role][0]] = planted[role][1]
        return found

    def attention(_model: object, _batches: object, position: str) -> dict[str, torch.Tensor]:
        found = {name: torch.zeros(4, 4) for name in ("IO", "S1", "S1+1", "S2", "END")}
        for role, (place, _, looks_at) in planted.items():
            if ROLES[role].position == position:
                found[looks_at][place] = 0.6
        return found

    asked: list[str] = []

    def patched(_model: object, rows: PromptRows, _other: object, receivers: list, *_: object) -> torch.Tensor:
        receiver = ", ".join(map(str, receivers))
        asked.append(receiver)
        return effects(through[receiver], len(rows.ids))

    monkeypatch.setattr(finding, "direct_effects", lambda _model, rows, _run: effects(direct, len(rows.ids)))
    monkeypatch.setattr(finding, "_attention", attention)
    monkeypatch.setattr(finding, "path_patch", patched)
    circuit = find_circuit(tiny_llama, ioi, ioi.prompts(8), force=True, share=0)
    assert asked == list(through)
    found = {head.role: ((head.layer, head.head), head.effect.estimate) for head in circuit.heads if head.effect}
    assert len(circuit.heads) == len(found)
    assert found.pop("other direct") == ((0, 3), 0.5)
    for role, (place, effect) in found.items():
        assert place == planted[role][0]
        assert effect == pytest.approx(planted[role][1] if role in direct else -planted[role][1])
    assert list(found) == list(planted)

"""A model of two layers that is built by hand: its circuit is found, no other head is, and it explains the answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from trimtab import cli
from trimtab.errors import UserError
from trimtab.evaluation.circuits import finding
from trimtab.evaluation.circuits.circuit import Circuit, CircuitHead, gpt2_small_circuit
from trimtab.evaluation.circuits.faithfulness import measure_faithfulness, random_circuit
from trimtab.evaluation.circuits.finding import find_circuit
from trimtab.lm import LanguageModel
from trimtab.runs import read_record
from trimtab.tasks.ioi_prompts import IOIDistribution

INHIBITION, MOVER = (0, 1), (1, 2)


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
    with pytest.raises(UserError, match="the circuit of built: tiny-llama has other weights; find the circuit of this"):
        Circuit.load(tmp_path / "circuit.json", tiny_llama)
    plain = json.loads((tmp_path / "circuit.json").read_text())
    plain["heads"][0]["role"] = "mover"
    (tmp_path / "other.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="role 'mover': there are name mover, S suppressor"):
        Circuit.load(tmp_path / "other.json")


def test_the_command(
    built: LanguageModel, ioi: IOIDistribution, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert cli.main([*again[:-8], "--circuit", "gpt2-small"]) == 2
    assert "circuit gpt2-small: " in capsys.readouterr().err


def test_task_saes_beside_supervised_codes(
    built: LanguageModel, ioi: IOIDistribution, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the model that was built by hand, where what a name mover gives is its name's code."""
    built.hf.save_pretrained(tmp_path / "model")
    built.tokenizer.save_pretrained(tmp_path / "model")
    find_circuit(built, ioi, ioi.prompts(12)).save(tmp_path / "circuit.json")
    words = [
        "evaluate", "ioi", "--model", tmp_path / "model", "--circuit", tmp_path / "circuit.json", "--n-train", 150,
        "--n-test", 24, "--arch", "topk", "--l0", 1, "--n-features", 24, "--epochs", 60, "--k", 1, 4,
        "--cross-section", "name-mover outputs", "S-inhibition outputs", "--run", tmp_path / "run",
    ]  # fmt: skip
    assert cli.main([*map(str, words), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert read_record(tmp_path / "run")["results"] == printed
    scores = {(score["cross_section"], score["contender"]): score for score in printed["scores"]}
    codes = scores["name-mover outputs", "supervised, mse"]
    assert codes["approximation"]["sufficiency"]["estimate"] == pytest.approx(1, abs=0.02)
    assert codes["edits"][0]["result"]["success"]["estimate"] == 1
    sae = scores["name-mover outputs", "topk-n24-l0_1-seed0"]
    assert sae["approximation"]["sufficiency"]["estimate"] > 0.5
    assert [(edit["way"], edit["k"]) for edit in sae["edits"][:4]] == [
        ("greedy", 1), ("meaning", 1), ("greedy", 4), ("meaning", 4),
    ]  # fmt: skip
    mean = scores["name-mover outputs", "mean"]
    assert mean["approximation"]["normalised_sufficiency"]["estimate"] == pytest.approx(0, abs=1e-6)
    assert cli.main([*map(str, words[:6]), "--cross-section", "S-inhibition queries"]) == 2
    assert "cross-section 'S-inhibition queries': there are name-mover outputs" in capsys.readouterr().err


def test_a_published_circuit(built: LanguageModel) -> None:
    """Golden: the heads of Wang et al. 2022, figure 2."""
    circuit = gpt2_small_circuit()
    assert [head.name for head in circuit.of("name mover")] == ["9.9", "10.0", "9.6"]
    assert [head.name for head in circuit.of("S-inhibition")] == ["7.3", "7.9", "8.6", "8.10"]
    assert len(circuit.positions()) == 18
    with pytest.raises(UserError, match=r"site attn_z.9.9: built has layers 0 to 1"):
        circuit.check(built)


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
    with pytest.raises(UserError, match="prompts: there are none"):
        find_circuit(built, ioi, [])
    with pytest.raises(UserError, match=r"the IOI circuit of tiny-llama: no head adds 0% of the logit difference"):
        find_circuit(tiny_llama, ioi, ioi.prompts(8), force=True, share=0)

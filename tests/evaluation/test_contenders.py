"""What is held against each other: bases, frozen decoders, SAEs of text, the ends; one more is one function."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from circuit_prompts import few_names

from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import head_location
from trimtab.evaluation.supervised import activations_of
from trimtab.evaluation.supervised.contenders import KINDS, Ground, make_contenders
from trimtab.evaluation.supervised.contenders.contender import MEAN, NO_EDIT, ContenderConfig, kind
from trimtab.evaluation.supervised.contenders.dictionaries import Dictionaries
from trimtab.evaluation.supervised.contenders.rotation import Subspaces
from trimtab.evaluation.supervised.scores import score
from trimtab.evaluation.supervised.section import PromptPairs, Section
from trimtab.lm import LanguageModel, load_model


@pytest.fixture
def ground(built: LanguageModel, tmp_path: Path) -> Ground:
    """The name mover's output of the model that was built by hand."""
    ioi = few_names(tokenizer=built.tokenizer)
    places = (head_location(built, "attn_z", 1, 2, "END"),)
    train = ioi.prompts(150)
    x = activations_of(built, ioi, train, places)
    test = ioi.prompts(24, "test")
    held = activations_of(built, ioi, test, places)
    config = ContenderConfig(arch=("topk",), l0=(1.0,), n_features=(24,), epochs=60, k=(1, 2))
    return Ground(
        model=built,
        ioi=ioi,
        train=train,
        activations=x,
        heldout=test,
        held=held,
        config=config,
        directory=tmp_path / "fitted",
    )


@pytest.fixture
def section(ground: Ground) -> Section:
    places = tuple(ground.activations)
    pairs = PromptPairs(ground.model, ground.ioi, ground.ioi.prompts(24, "test"), places)
    return Section("outputs", places, ground.activations, pairs)


def test_the_ends_of_every_edit(ground: Ground, section: Section) -> None:
    nothing, everything = score(NO_EDIT, section), score(MEAN, section)
    edit = nothing.edited("IO")
    assert edit is not None
    assert edit.result.success is not None
    assert (edit.result.success.estimate, edit.result.removed.estimate, edit.result.size.estimate) == (0, 0, 0)
    assert nothing.approximation.sufficiency.estimate == pytest.approx(1)
    whole = everything.edited("IO")
    assert whole is not None
    assert whole.result.removed.estimate == 1
    (recovered,) = everything.loss_recovered.values()
    assert recovered is not None
    assert recovered.estimate == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["pca", "random"])
def test_a_basis_rebuilds_everything_with_orthonormal_rows_of_both_signs(
    ground: Ground, section: Section, name: str
) -> None:
    (basis,) = make_contenders([name], ground)
    assert isinstance(basis, Dictionaries)
    (place,) = section.locations
    sae, x = basis.saes[place], ground.activations[place]
    torch.testing.assert_close(sae(x), x, atol=1e-4, rtol=1e-4)
    rows = sae.W_dec.detach()[: x.shape[1]]
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    assert torch.equal(sae.W_dec.detach()[x.shape[1] :], -rows)
    if name == "pca":  # in order of the variance that numpy finds
        expected = torch.linalg.svdvals((x - x.mean(0)).double()).square()
        found = ((x - x.mean(0)) @ rows.T).square().sum(0).double()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_a_frozen_decoder_stays_as_it_was_drawn(ground: Ground) -> None:
    (frozen,), (learned,) = make_contenders(["frozen-decoder"], ground), make_contenders(["task-saes"], ground)
    assert isinstance(frozen, Dictionaries)
    assert isinstance(learned, Dictionaries)
    (place,) = ground.activations
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(24, ground.activations[place].shape[1], generator=generator)
    drawn /= drawn.norm(dim=1, keepdim=True)
    torch.testing.assert_close(frozen.saes[place].W_dec.detach(), drawn, atol=1e-5, rtol=0)
    assert (learned.saes[place].W_dec.detach() - drawn).norm(dim=1).max() > 0.1
    assert (frozen.saes[place].W_enc.detach().T - learned.saes[place].W_enc.detach().T).norm() > 0.1  # type: ignore[union-attr]


def test_a_contender_of_ones_own_is_one_function(
    ground: Ground, section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.evaluation.supervised.contenders.contender.KINDS", known := dict(KINDS))
    kind("nothing")(lambda _ground: [NO_EDIT])
    assert make_contenders(["nothing"], ground) == [NO_EDIT]
    assert list(known)[-1] == "nothing"
    with pytest.raises(UserError, match=r"contender 'pcaa': there is .*codes, .*; did you mean pca\?"):
        make_contenders(["pcaa"], ground)
    with pytest.raises(UserError, match="contender own: no dictionary was given; name some"):
        make_contenders(["own"], ground)


def test_a_contender_without_a_location_is_left_out(ground: Ground, section: Section) -> None:
    assert Dictionaries("none", {}, ground).lacks(section.locations) == section.locations


def test_a_learned_rotation_beside_random_subspaces(ground: Ground, section: Section) -> None:
    """Twelve names are one-hot in what the mover gives, so that most of it must be interchanged."""
    ground = dataclasses.replace(ground, config=dataclasses.replace(ground.config, rank=3, rotation_prompts=64))
    learned, start, random = make_contenders(["rotation"], ground)
    assert [one.name for one in (learned, start, random)] == [
        "rotation, 9 directions", "differences, 9 directions", "random, 9 directions",
    ]  # fmt: skip
    found, beside = score(learned, section).edited("IO"), score(random, section).edited("IO")
    assert found is not None
    assert beside is not None
    assert (found.way, found.k) == ("interchange", None)
    assert found.result.agreement.estimate > beside.result.agreement.estimate
    (place,) = section.locations
    assert isinstance(learned, Subspaces)
    assert learned.at(section) is learned.at(section)  # it is learned once
    x, true = section.prompts.activations[place], section.true["IO"][place]
    moved = learned.at(section).edit(place, x, true, "IO").x
    assert (moved - true).norm() < (x - true).norm()


def test_saes_of_text_are_of_the_locations_sites(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bank over both sites; two positions of one site share an SAE."""
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("trimtab.evaluation.supervised.contenders.text_saes.ROWS_PER_SAE", 20_000)
    model = load_model(str(tmp_path / "model"))
    places = (
        head_location(model, "attn_z", 2, 1, "END"), head_location(model, "attn_k", 3, 0, "IO"),
        head_location(model, "attn_k", 3, 0, "S1"),
    )  # fmt: skip
    ioi = few_names()
    train = ioi.prompts(40)
    x = activations_of(model, ioi, train, places)
    config = ContenderConfig(n_features=(16,), text_tokens=20_000, text_l0=2.0)
    (found,) = make_contenders(
        ["text-saes"],
        Ground(
            model=model,
            ioi=ioi,
            train=train,
            activations=x,
            heldout=train,
            held=x,
            config=config,
            directory=tmp_path / "fitted",
        ),
    )
    assert isinstance(found, Dictionaries)
    assert [found.saes[place].info.site for place in places] == ["attn_z.2.1", "attn_k.3.0", "attn_k.3.0"]
    assert found.saes[places[1]] is found.saes[places[2]]
    assert found.saes[places[0]].n_features == 16
    assert ((found.saes[places[0]].encode(x[places[0]]) > 0).sum(1) <= 2).all()

"""Planted attributes: alike where their codes are equally long, the shorter ones missed where they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from circuit_prompts import few_names
from torch import Tensor

from trimtab.errors import UserError
from trimtab.evaluation.circuits.circuit import Circuit, CircuitHead
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.supervised.codes import Factors
from trimtab.evaluation.supervised.cross_sections import activations_of
from trimtab.evaluation.supervised.found_values import chosen_f1, n_found
from trimtab.evaluation.supervised.name_codes import NameCodes, NameEdits, by_ratio, name_codes, name_locations
from trimtab.evaluation.supervised.occlusion import Occlusion, Taken, occlusion
from trimtab.evaluation.supervised.occlusion_toy import OcclusionToy, occlusion_toy
from trimtab.evaluation.supervised.task_saes import TrainingRows, train_saes
from trimtab.lm import LanguageModel
from trimtab.runs import json_safe, read_typed
from trimtab.runs.figures import svg
from trimtab.stats import Interval
from trimtab.training import TrainConfig

IOI = few_names()


@pytest.fixture(scope="module")
def toy() -> OcclusionToy:
    return occlusion_toy(
        (1.0, 4.0), l0=(2.0,), thresholds=(0.9, 0.5, 0.2), n_values=16, d=32, n_features=48, epochs=800, heldout=100,
        seeds=(0, 1),
    )  # fmt: skip


def test_equal_norms_are_found_alike_and_low_ones_are_occluded(toy: OcclusionToy) -> None:
    equal, unequal, loose = toy.at(1, 2, 0.5), toy.at(4, 2, 0.9), toy.at(4, 2, 0.2)
    assert min(equal.high.estimate, equal.low.estimate) >= 12
    assert abs(equal.high.estimate - equal.low.estimate) <= 3
    assert unequal.high.estimate >= 12
    assert unequal.low.estimate <= 2
    assert loose.low.estimate >= 4  # chosen on train rows; the best of all on these same rows would be 12 and more
    assert all(0 <= one.low.low <= one.low.high <= 16 for one in toy.found)


def test_the_toy_as_text_figure_and_json(toy: OcclusionToy) -> None:
    start = (
        "values of the high-norm and of the low-norm attribute (16 each) that have a feature with an F1 from 0.9 and "
    )
    assert toy.headline().startswith(f"{start}0.2, L0 2: norms 1 to 1: ")
    low = toy.at(4, 2, 0.9), toy.at(4, 2, 0.2)
    end = ", ".join(f"{one.high.estimate:.0f} and {one.low.estimate:.0f}" for one in low)
    assert toy.headline().endswith(f"; norms 4 to 1: {end}")
    assert len(toy.tables()["found"].rows) == 6  # type: ignore[arg-type]
    assert read_typed(OcclusionToy, json_safe(toy), "toy") == toy
    drawing = svg(toy.draw, "toy")
    assert drawing == svg(toy.draw, "toy")
    assert "low-norm, F1 ≥ 0.9" in drawing


def test_vectors_are_not_the_initial_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one seed for both, rows were sums of two initial features, and training began at the answer."""
    seen: dict[str, Tensor] = {}

    def remember(rows: dict[str, TrainingRows], *args: Any, **settings: Any) -> Any:
        seen["x"] = rows["ratio1"].train
        return train_saes(rows, *args, **settings)

    monkeypatch.setattr("trimtab.evaluation.supervised.occlusion_toy.train_saes", remember)
    occlusion_toy((1.0,), l0=(2.0,), n_values=8, d=32, n_features=16, epochs=1, heldout=20, seeds=(0,))
    start = TrainConfig(n_features=16, l0=2.0).build(32, 1).W_dec.detach()
    sums = (start[:8, None] + start[8:]).flatten(0, 1)
    cosine = torch.cosine_similarity(seen["x"][:, None], sums, dim=-1).max(1).values
    assert float(cosine.mean()) < 0.8


def test_toys_that_cannot_be() -> None:
    with pytest.raises(UserError, match="9 rows held out: there are 9"):
        occlusion_toy(n_values=3, heldout=9)
    with pytest.raises(UserError, match="ratio 0: norms are positive"):
        occlusion_toy((0.0, 1.0))
    with pytest.raises(UserError, match="seeds: there is none"):
        occlusion_toy(seeds=())


def test_features_are_chosen_on_train_rows_and_how_many_are_found() -> None:
    """Value 0 has a feature of its own, value 2 one that fires on half of its rows, value 5 none, 7 was never seen."""
    values = torch.tensor([0, 0, 2, 2, 5, 5])
    fired = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0], [0, 0], [0, 0]]).bool()
    assert chosen_f1(fired, values, fired, values).tolist() == pytest.approx([1, 2 / 3, 0])
    test_values = torch.tensor([7, 0, 0, 2, 2, 5])
    test_fired = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0], [1, 1], [1, 0]]).bool()
    # Of value 0 the other feature says the test rows better (4/5), of value 2 the first one (4/7): neither was chosen.
    assert chosen_f1(fired, values, test_fired, test_values).tolist() == pytest.approx([2 / 7, 2 / 5, 0, 0])


def test_noise_has_no_features_of_values() -> None:
    """The best of many features on the same rows would seem to say a rare value."""
    fired, test_fired = torch.rand(2, 400, 500, generator=torch.Generator().manual_seed(0)) < 0.02
    values = torch.arange(400) % 100
    assert float(chosen_f1(fired, values, fired, values).mean()) > 0.2
    assert float(chosen_f1(fired, values, test_fired, values).mean()) < 0.03

    one, other = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
    both = n_found([one, other])
    assert (both.estimate, both.n) == (1.5, 4)
    assert n_found([one]).estimate == 2
    assert n_found([one, one]).low < 2 < n_found([one, one]).high


def planted(length: float, location: Location) -> tuple[list, dict, list, dict]:
    """IO's codes so many times as long as those of S."""
    train, test = IOI.prompts(500), IOI.prompts(200, "test")
    factors = Factors.of([*train, *test])
    vectors = torch.randn(len(factors.names), 8, generator=torch.Generator().manual_seed(103))
    vectors /= vectors.norm(dim=1, keepdim=True)
    vectors[: len(factors.values[0])] *= length
    vectors[-2:] = 0  # Pos
    return train, {location: vectors[factors.rows(train)].sum(1)}, test, {location: vectors[factors.rows(test)].sum(1)}


def circuit_of(model: LanguageModel) -> Circuit:
    heads = tuple(CircuitHead(layer=3, head=head, role="name mover") for head in (0, 2))
    return Circuit(model=model.name, fingerprint="", heads=heads)


@pytest.fixture(scope="module")
def found(tiny_llama: LanguageModel) -> Occlusion:
    train, x, test, x_test = planted(5.0, head_location(tiny_llama, "attn_z", 3, 2, "END"))
    return occlusion(
        tiny_llama, IOI, circuit_of(tiny_llama), train, x, test, x_test, IOI.prompts(8, "validation"),
        alphas=(0.0, 1.0), l0=(1.0,), n_features=(32, 24), epochs=250, seeds=(0, 1),
    )  # fmt: skip


def test_short_codes_are_found_once_the_long_ones_are_gone(found: Occlusion) -> None:
    assert (found.long, found.short, found.n_long, found.n_short, found.prompts) == ("IO", "S", 10, 10, 200)
    whole, without, control = found.sweep
    assert [one.alpha for one in found.sweep] == [0, 1, 1]
    assert [one.shuffled for one in found.sweep] == [False, False, True]
    assert whole.long.estimate >= 8
    assert whole.short.estimate <= 2
    assert (without.long.estimate, without.short.estimate) == (0, pytest.approx(10, abs=1.5))
    assert control.short.estimate <= 2
    assert found.gain.low > 3
    assert found.gain_over_control.low > 3
    assert [one.n_features for one in found.sparsities] == [32, 24]
    assert max(one.chance for one in found.sweep) <= 2
    assert found.confirmed.ratio == pytest.approx(5, rel=0.1)  # centred codes are a little shorter


def test_occlusion_as_text_figure_and_json(found: Occlusion) -> None:
    start = f"at {found.location}" + " (nowhere do both matter; it came closest)" * (not found.both_causal)
    assert found.headline().startswith(f"{start}, codes of IO 5.2 times as long: ")
    assert read_typed(Occlusion, json_safe(found), "occlusion") == found
    assert set(found.tables()) == {"sweep", "sparsities", "locations", "on test prompts"}
    assert found.tables()["on test prompts"].rows == [found.confirmed]
    tables = found.tables()
    shown = [[column.title for column in tables[name].columns] for name in ("on test prompts", "locations")]
    assert shown[0] == shown[1]
    drawing = svg(found.draw, "occlusion")
    assert drawing == svg(found.draw, "occlusion")
    assert "S, control" in drawing


def test_codes_that_are_taken_out() -> None:
    """All of IO's, and no value's own where they are shuffled; test prompts lose what train prompts taught."""
    train, x, test, x_test = planted(3.0, Location(None, "END"))  # type: ignore[arg-type]
    (own,), (own_test,) = x.values(), x_test.values()
    taken = Taken.of(train, test, own, own_test, "IO", 0)
    about: dict[str, str] = {}
    whole, without = taken.rows(0.0, False, about), taken.rows(1.0, False, about)
    assert torch.equal(whole.train, own)
    io = {prompt.attributes["IO"]: i for i, prompt in enumerate(train)}
    rest = torch.stack([without.heldout[i] for i, prompt in enumerate(test) if prompt.attributes["S"] == IOI.names[0]])
    assert rest.std(0).max() < 1e-4  # what is left depends on S alone
    assert own_test.std(0).max() > 0.5
    shuffled = taken.shuffled[0]
    for name, i in io.items():
        same = [j for j, prompt in enumerate(train) if prompt.attributes["IO"] == name]
        assert torch.equal(shuffled[same], shuffled[i].expand(len(same), -1))
    lengths = [codes[list(io.values())].norm(dim=1).sort().values for codes in (taken.codes[0], shuffled)]
    torch.testing.assert_close(*lengths)
    assert not (taken.codes[0] == shuffled).all(1).any()


def test_where_names_matter_in_the_model_that_was_built(built: LanguageModel) -> None:
    """Its name mover copies IO alone; head 1.0 gives nothing."""
    ioi = few_names(tokenizer=built.tokenizer)
    places = (head_location(built, "attn_z", 1, 2, "END"), head_location(built, "attn_z", 1, 0, "END"))
    train = ioi.prompts(200)
    x = activations_of(built, ioi, train, places)
    edits = NameEdits.of(built, ioi, ioi.prompts(16, "validation"), places, 0)
    mover, nothing = (name_codes(edits, place, train, x[place], 0.02) for place in places)
    assert mover.io_effect.high < -1
    assert not mover.causal
    assert mover.io_length > 10 * mover.s_length
    assert (nothing.io_effect.estimate, nothing.io_length, nothing.ratio) == (0, 0, None)


@pytest.fixture(scope="module")
def planted_in_built(built: LanguageModel) -> Occlusion:
    """The mover's outputs hold IO, as they are, and S, which was planted: half as long, and against it. Head 1.0's hold
    S alone, and nothing comes of them."""
    ioi = few_names(tokenizer=built.tokenizer)
    nothing, mover = (head_location(built, "attn_z", 1, head, "END") for head in (0, 2))
    validation = ioi.prompts(16, "validation")
    splits = [(prompts, activations_of(built, ioi, prompts, (nothing, mover))) for prompts in (
        ioi.prompts(200), ioi.prompts(100, "test")
    )]  # fmt: skip
    of_io = {p.attributes["IO"]: x for p, x in zip(splits[0][0], splits[0][1][mover], strict=True)}
    for prompts, x in splits:
        planted = torch.stack([of_io[prompt.attributes["S"]] for prompt in prompts]) / 2
        x[mover] = x[mover] - planted
        x[nothing] = planted
    circuit = Circuit(model=built.name, fingerprint="", heads=(), share=0.02)
    return occlusion(
        built, ioi, circuit, *splits[0], *splits[1], validation, alphas=(0.0, 1.0), l0=(1.0,), n_features=(16,),
        epochs=2, seeds=(0,),
    )  # fmt: skip


def test_the_location_is_where_both_matter_in_the_model(planted_in_built: Occlusion) -> None:
    """Not the first that was given, and not the one with the largest ratio."""
    found = planted_in_built
    assert [one.location for one in found.places] == ["attn_z.1.2 at END", "attn_z.1.0 at END"]
    mover, nothing = found.places
    assert (found.location, found.long, found.short) == (mover.location, "IO", "S")
    assert mover.causal
    assert found.both_causal
    assert found.confirmed.causal
    assert mover.io_effect.high < mover.s_effect.high < -0.5
    assert mover.ratio == pytest.approx(2, rel=0.1)
    assert not nothing.causal
    assert nothing.s_effect.estimate == 0
    assert nothing.ratio is None or nothing.ratio > 10
    assert found.headline().startswith("at attn_z.1.2 at END, codes of IO ")


def test_a_location_that_test_prompts_do_not_confirm(planted_in_built: Occlusion) -> None:
    unsure = replace(planted_in_built, confirmed=replace(planted_in_built.confirmed, causal=False))
    assert unsure.headline().startswith("at attn_z.1.2 at END (on test prompts not both matter), codes of IO ")


def test_lengths_are_not_those_of_noise(tiny_llama: LanguageModel) -> None:
    """Codes of pure noise have a length of about 0, though each of them is long."""
    place = head_location(tiny_llama, "attn_z", 3, 2, "END")
    train = IOI.prompts(400)
    noise: Tensor = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) * 3
    edits = NameEdits.of(tiny_llama, IOI, IOI.prompts(4, "validation"), [place], 0)
    said = name_codes(edits, place, train, noise)
    assert max(said.io_length, said.s_length) < 1.0


def effect(low: float, high: float) -> Interval:
    return Interval(estimate=(low + high) / 2, low=low, high=high, n=8)


def test_locations_where_both_matter_come_first_by_ratio() -> None:
    def place(name: str, io: float, causal: bool, s_effect: Interval) -> NameCodes:
        one = effect(0.5, 1.0)
        return NameCodes(
            location=name, io_length=io, s_length=1.0, io_effect=one, s_effect=s_effect, causal=causal
        )  # fmt: skip

    sure, unsure, no = effect(0.5, 1.0), effect(-0.01, 0.5), effect(-0.3, 0.4)
    places = [
        place("c", 9, False, no), place("b", 9, False, unsure), place("a", 3, True, sure), place("A", 1 / 5, True, sure)
    ]  # fmt: skip
    assert [one.location for one in sorted(places, key=by_ratio, reverse=True)] == ["A", "a", "b", "c"]


def test_what_occlusion_refuses(tiny_llama: LanguageModel) -> None:
    train, x, test, x_test = planted(3.0, head_location(tiny_llama, "attn_z", 3, 2, "END"))
    rest = (IOI, circuit_of(tiny_llama), train)
    with pytest.raises(UserError, match=r"alphas 0, 0.5: they go from 0 to 1"):
        occlusion(tiny_llama, *rest, x, test, x_test, test[:4], alphas=(0.0, 0.5))
    with pytest.raises(UserError, match="locations: there is none"):
        occlusion(tiny_llama, *rest, {}, test, {}, test[:4])
    assert str(name_locations(circuit_of(tiny_llama), tiny_llama)[0]) == "attn_z.3.0 at END"
    with pytest.raises(UserError, match="it has no head of any cross-section"):
        name_locations(Circuit(model="tiny-llama", fingerprint="", heads=()), tiny_llama)

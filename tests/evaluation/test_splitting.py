"""Overlaps in closed form, unions by hand, recurrence of the same SAE and of another, features that were planted."""

from __future__ import annotations

import itertools

import pytest
import torch
from circuit_prompts import few_names

from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.supervised.splitting import Splitting, splitting
from trimtab.evaluation.supervised.value_features import (
    chance_overlap,
    clusters,
    of_value,
    overlap,
    recurrence,
    union_order,
)
from trimtab.lm import LanguageModel
from trimtab.runs import json_safe, read_typed
from trimtab.runs.figures import svg

IOI = few_names()


def test_overlaps_in_closed_form() -> None:
    fired = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert overlap(fired, fired)[0].tolist() == pytest.approx([1, 1, 0, 1 / 3])  # itself, identical, disjoint, shared
    assert overlap(fired[3:], fired[3:]).tolist() == [[0] * 4] * 4
    p, q = torch.tensor([0.2, 1.0]).double(), torch.tensor([0.5, 0.0, 1.0]).double()
    assert chance_overlap(p, q).flatten().tolist() == pytest.approx([0.1 / 0.6, 0, 0.2, 0.5, 0, 1])
    generator = torch.Generator().manual_seed(0)
    many = torch.rand(200_000, 2, generator=generator) < torch.tensor([0.2, 0.5])
    assert float(overlap(many[:, :1], many[:, 1:])) == pytest.approx(0.1 / 0.6, abs=0.005)


def test_features_of_a_value_are_precise_and_not_rare() -> None:
    has = torch.arange(100) < 50
    fired = torch.zeros(100, 4).bool()
    fired[:30, 0] = True  # of the value
    fired[:19, 1] = True  # seldom
    fired[:36, 2] = fired[96:, 2] = True  # 36 of 40
    fired[:35, 3] = fired[95:, 3] = True  # 35 of 40
    assert of_value(fired, has).tolist() == [True, False, True, False]


def test_unions_are_the_best_ones() -> None:
    """Against all sets of two, where the best feature is in the best set; and no feature is added that does harm."""
    has = torch.arange(12) < 6
    fired = torch.zeros(12, 4).bool()
    fired[:3, 0] = fired[3:5, 1] = True
    fired[2:6, 2] = fired[6:9, 2] = True
    fired[8:, 3] = True

    def f1(of: tuple[int, ...]) -> float:
        said = fired[:, list(of)].any(1)
        return float(2 * (said & has).sum() / (said.sum() + has.sum()))

    order = union_order(fired, has, 4)
    assert order == [0, 1]
    assert f1(tuple(order)) == max(f1(pair) for pair in itertools.combinations(range(4), 2))
    assert union_order(fired, has, 1) == [0]


def test_clusters_of_similar_rows() -> None:
    rows = torch.tensor([[1.0, 0, 0], [2.0, 0.2, 0], [0, 0, 3.0], [0, 0.1, 1.0], [0, -1.0, 0]])
    found = clusters(rows).tolist()
    assert len(set(found)) == 3
    assert found[0] == found[1] != found[2] == found[3]
    assert clusters(rows[:1]).tolist() == [0]
    assert len(clusters(rows[:0])) == 0


def test_the_same_sae_recurs_and_random_rows_do_as_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, others = torch.randn(2, 300, 16, generator=generator)
    fired, fired_others = torch.rand(2, 4000, 300, generator=generator) < 0.2
    same = recurrence(rows[:40], rows, fired[:, :40], fired)
    assert same.cosine.tolist() == pytest.approx([1] * 40, abs=1e-5)
    assert same.overlap.tolist() == pytest.approx([1] * 40)
    assert float(same.exchanged.mean()) == pytest.approx(0.04 / 0.36, abs=0.005)
    other = recurrence(rows[:40], others, fired[:, :40], fired_others)
    assert float(other.cosine.mean()) == pytest.approx(float(other.chance.mean()), abs=0.03)
    assert float(other.cosine.mean()) < 0.9
    assert float(other.overlap.mean()) == pytest.approx(0.04 / 0.36, abs=0.005)
    assert float(other.exchanged.mean()) == pytest.approx(0.04 / 0.36, abs=0.005)


def planted(location: Location, n: int, split: str) -> tuple[list, dict]:
    """A direction for each pair of Pos and one of three objects."""
    prompts = IOI.prompts(n, split)
    directions = torch.randn(6, 8, generator=torch.Generator().manual_seed(101))
    number = [2 * IOI.objects.index(p.object or IOI.objects[0]) + (p.attributes["Pos"] == "ABB") for p in prompts]
    strength = 1 + torch.rand(n, 1, generator=torch.Generator().manual_seed(n))
    return prompts, {location: directions[number] * strength}


@pytest.fixture(scope="module")
def found(tiny_llama: LanguageModel) -> Splitting:
    place = head_location(tiny_llama, "attn_z", 2, 1, "END")
    return splitting(
        tiny_llama, *planted(place, 400, "train"), *planted(place, 150, "test"), l0=1.0, n_features=12, epochs=400,
        ks=(1, 4),
    )  # fmt: skip


def test_planted_parts_of_pos_are_found(found: Splitting) -> None:
    (place,) = found.locations
    assert 2.5 <= place.features.estimate <= 4
    assert place.by_chance == 0
    assert place.overlap is not None
    assert place.chance is not None
    assert place.difference is not None
    assert place.overlap < 0.05 < place.chance
    assert place.difference.high < 0
    assert place.active == pytest.approx(1, abs=0.1)
    assert place.cosine is not None
    assert place.random_cosine is not None
    assert place.cosine.estimate > 0.9 > place.random_cosine
    assert place.recurring is not None
    assert place.recurring.estimate > 0.8
    one, four = found.unions
    assert one.f1.estimate < 0.9
    assert four.f1.estimate > 0.97


def test_a_feature_counts_once_however_many_saes_it_is_held_against(tiny_llama: LanguageModel) -> None:
    """Over three seeds there are no more features than there are, though each has two others to be held against."""
    place = head_location(tiny_llama, "attn_z", 2, 1, "END")
    train, test = planted(place, 400, "train"), planted(place, 150, "test")
    said = splitting(tiny_llama, *train, *test, l0=1.0, n_features=12, epochs=100, seeds=(0, 1, 2), ks=(1,))
    (only,) = said.locations
    for interval in (only.cosine, only.recurring, only.recurring_difference):
        assert interval is not None
        assert (
            6 < interval.n <= round(3 * 2 * only.features.estimate)
        )  # a value's only feature has none to be exchanged


def test_splitting_as_text_figure_and_json(found: Splitting) -> None:
    assert "features of a value of Pos at attn_z.2.1 at END, which overlap by 0.0" in found.headline()
    assert read_typed(Splitting, json_safe(found), "splitting") == found
    assert svg(found.draw, "unions") == svg(found.draw, "unions")
    tables = found.tables()
    assert set(tables) == {"features of Pos", "over seeds", "F1 of unions"}
    frame = found.to_frame("F1 of unions")
    assert [float(frame[name].iloc[0]) for name in ("f1_of_1", "f1_of_4")] == [one.f1.estimate for one in found.unions]


def test_with_one_seed_nothing_is_said_of_others(tiny_llama: LanguageModel) -> None:
    place = head_location(tiny_llama, "attn_z", 2, 1, "END")
    train, test = planted(place, 100, "train"), planted(place, 60, "test")
    said = splitting(tiny_llama, *train, *test, l0=1.0, n_features=12, epochs=2, seeds=(0,), ks=(2,))
    (only,) = said.locations
    assert (only.cosine, only.recurring, only.exchanged) == (None, None, None)
    assert read_typed(Splitting, json_safe(said), "splitting").unions == said.unions
    with pytest.raises(UserError, match="k = 0: a union has at least one feature"):
        splitting(tiny_llama, *train, *test, ks=(0,))
    with pytest.raises(UserError, match="locations: there is none"):
        splitting(tiny_llama, train[0], {}, test[0], {})
    one = [prompt for prompt in test[0] if prompt.attributes["Pos"] == "ABB"]
    with pytest.raises(UserError, match="test prompts: none is BAB"):
        splitting(tiny_llama, *train, one, test[1])

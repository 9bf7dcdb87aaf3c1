"""F1 by its definition, the best union of names by trying all, the causal check on axes."""

from __future__ import annotations

import itertools

import pytest
import torch
from circuit_prompts import few_names

from trimtab.dictionaries import DictionaryInfo, Standard
from trimtab.errors import UserError
from trimtab.evaluation.supervised.interpretability import (
    Predicates,
    best_meanings,
    f1_scores,
    interpretable,
    kept_and_removed,
    value_scores,
)

IOI = few_names()


def test_predicates_are_what_attributes_say() -> None:
    prompts = IOI.prompts(60)
    found = Predicates.of(prompts)
    truth = dict(zip(found.names, found.truth.T.tolist(), strict=True))
    own = [prompt.attributes for prompt in prompts]
    name = own[0]["IO"]
    assert truth[f"IO={name}"] == [attributes["IO"] == name for attributes in own]
    assert truth["Pos=ABB"] == [attributes["Pos"] == "ABB" for attributes in own]
    assert truth[f"IO={name}, Pos=ABB"] == [a["IO"] == name and a["Pos"] == "ABB" for a in own]
    assert truth[f"named {name}"] == [name in (attributes["IO"], attributes["S"]) for attributes in own]
    assert truth["S gender=F"] == [attributes.get("S gender") == "F" for attributes in own]
    assert not found.truth.all(0).any()
    assert found.truth.any(0).all()


def test_f1_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    fires, truth = torch.rand(30, 4, generator=generator) > 0.5, torch.rand(30, 3, generator=generator) > 0.7
    fires[:, 3] = False
    found = f1_scores(fires, truth)
    for feature, predicate in itertools.product(range(3), range(3)):
        hits = int((fires[:, feature] & truth[:, predicate]).sum())
        precision, recall = hits / int(fires[:, feature].sum()), hits / int(truth[:, predicate].sum())
        expected = 2 * precision * recall / (precision + recall) if hits else 0
        assert float(found[feature, predicate]) == pytest.approx(expected)
    assert not found[3].any()


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_best_union_of_names(most: int) -> None:
    """By trying every set of at most so many names of a kind."""
    prompts = IOI.prompts(80)
    predicates = Predicates.of(prompts)
    fires = torch.rand(80, 12, generator=torch.Generator().manual_seed(most)) > 0.6
    fires[:, 0] = torch.tensor([prompt.attributes["IO"] in IOI.names[:most] for prompt in prompts])
    found = best_meanings(fires, predicates, most)
    groups = {group: [i for i, own in enumerate(predicates.groups) if own == group] for group in predicates.groups}
    for feature in range(12):
        best = 0.0
        for group, members in groups.items():
            for size in range(1, (most if group.startswith(("IO", "S")) and "gender" not in group else 1) + 1):
                for some in itertools.combinations(members, size):
                    truth = predicates.truth[:, list(some)].any(1)
                    best = max(best, float(f1_scores(fires[:, feature : feature + 1], truth[:, None])))
        assert found[feature].f1 == pytest.approx(best)
        truth = torch.stack([predicates.truth[:, predicates.names.index(name)] for name in found[feature].predicates])
        assert float(f1_scores(fires[:, feature : feature + 1], truth.any(0)[:, None])) == pytest.approx(best)
    assert found[0].f1 == 1
    assert set(found[0].predicates) == {f"IO={name}" for name in IOI.names[:most]}


def test_a_feature_that_never_fires_says_nothing() -> None:
    predicates = Predicates.of(IOI.prompts(20))
    assert best_meanings(torch.zeros(20, 1, dtype=torch.bool), predicates) == [(0.0, ())]


def test_a_feature_that_always_fires_says_nothing_of_all_prompts() -> None:
    """All names of a kind, or both values of Pos or of a gender, are no statement about a prompt."""
    predicates = Predicates.of(IOI.prompts(100))
    for most in (3, 10, 50):
        (found,) = best_meanings(torch.ones(100, 1, dtype=torch.bool), predicates, most)
        assert len(found.predicates) == (1 if most == 3 else 9)
        share = predicates.truth[:, [predicates.names.index(name) for name in found.predicates]].any(1).float().mean()
        assert found.f1 == pytest.approx(float(2 * share / (1 + share)))
        assert found.f1 < (0.8 if most == 3 else 0.99)


def test_kept_and_removed_are_parts_of_the_reconstruction() -> None:
    eye = torch.eye(3)
    dictionary = Standard(
        eye, torch.zeros(3), eye, torch.tensor([0.0, 0.0, 1.0]), info=DictionaryInfo(architecture="standard")
    )
    x = torch.tensor([[2.0, 3.0, 5.0], [-1.0, 3.0, 0.5]])
    kept, removed = kept_and_removed(dictionary, x, torch.tensor([True, False, True]))
    assert kept.tolist() == dictionary.decode(dictionary.encode(x) * torch.tensor([1.0, 0.0, 1.0])).tolist()
    assert removed[0].tolist() == [0.0, 3.0, 5.0 - float(dictionary.encode(x)[0, 2])]


def test_scores_of_the_value_at_hand() -> None:
    prompts = IOI.prompts(30)
    predicates = Predicates.of(prompts)
    fires = torch.rand(30, 5, generator=torch.Generator().manual_seed(3)) > 0.5
    f1 = f1_scores(fires, predicates.truth)
    found = value_scores(f1, predicates, "S", prompts[:4])
    for row, prompt in zip(found, prompts, strict=False):
        assert torch.equal(row, f1[:, predicates.names.index(f"S={prompt.attributes['S']}")])
    with pytest.raises(UserError, match=r"value S=\w+: no predicate is about it; take predicates of prompts"):
        value_scores(f1, Predicates.of(prompts[:2]), "S", prompts)


def test_what_features_say_is_chosen_on_some_prompts_and_measured_on_others() -> None:
    """One says Pos on both, one on those that chose it alone; one fires always, which has an F1 of 2/3 for Pos."""
    train, other = IOI.prompts(200), IOI.prompts(100, "validation")
    predicates = Predicates.of(train)
    abb, abb_other = (torch.tensor([p.attributes["Pos"] == "ABB" for p in of]) for of in (train, other))
    always = torch.ones(200, dtype=torch.bool)
    meanings = best_meanings(torch.stack([abb, abb, always], 1), predicates)
    assert [meaning.predicates for meaning in meanings[:2]] == [("Pos=ABB",), ("Pos=ABB",)]
    assert meanings[2].f1 >= 0.6
    fires = torch.stack([abb_other, ~abb_other, torch.ones(100, dtype=torch.bool)], 1)
    assert interpretable(fires, meanings, predicates, predicates.hold(other)).tolist() == [True, False, False]

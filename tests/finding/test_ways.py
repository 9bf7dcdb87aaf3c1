"""Candidates of causal search and of every other way, against what each says that it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from planted_wishes import HELD_FEATURE, N_FEATURES, SITE, SITES, UP_FEATURE, texts_wish
from planted_wishes import Ground as Planted

from trimtab.finding import FindOptions, choosing, shortlist, ways
from trimtab.finding.choosing import choose
from trimtab.finding.examples import divide
from trimtab.finding.ground import Ground
from trimtab.finding.neutral import read_neutral_prompts
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.selection import DeltaConfidence, OutputScore, rank_by


@pytest.fixture
def searched(ground: Planted) -> Ground:
    options = FindOptions(examples=(8, 8, 8), n_neutral=(3, 3), max_new_tokens=6, budget="KL=0.5", tried=3)
    splits = divide(texts_wish(40).examples(ground.model), options.examples)
    splits["screening"] = splits["choice"].take(range(4))
    prompts = read_neutral_prompts(None)
    return Ground(
        model=ground.model, saes=ground.saes, splits=splits, options=options,
        neutral_prompts={"choice": prompts["validation"][:3], "report": prompts["held_out"][:3]},
    )  # fmt: skip


def rows(edits: list[SteeringEdit]) -> list[tuple[Any, int, float]]:
    return [(*edit.parts[0][:2], np.sign(edit.parts[0].dose)) for edit in edits]


def test_certainty_is_the_effect_over_its_error(searched: Ground) -> None:
    """From one gradient for each example by itself."""
    from trimtab.finding import first_order

    examples = searched.splits["candidates"]
    one_by_one = [first_order(searched.model, searched.saes, examples.take([i])) for i in range(len(examples))]
    for site, found in searched.first_order.items():
        add = torch.stack([one[site].add for one in one_by_one])
        error = add.std(0) / len(add) ** 0.5
        assert torch.allclose(found.error, error, rtol=1e-3, atol=1e-6)
        assert torch.allclose(found.certainty, add.mean(0) / (error + error.median()), rtol=1e-3, atol=1e-4)


def test_the_shortlist(searched: Ground) -> None:
    listed = shortlist.shortlist(searched)
    single = {edit.parts[0][:2]: why for edit, why in listed.items() if len(edit.parts) == 1 and edit.parts[0].dose}
    removed = [edit.parts[0] for edit, why in listed.items() if why == "removal"]
    assert next(iter(listed)).parts == (Part(SITE, UP_FEATURE, -1.0),)
    assert {site for site, _ in single} == set(SITES)  # the best of each
    assert removed[0][:2] == (SITE, HELD_FEATURE)
    certain = {
        (site, i): abs(float(one.certainty[i])) for site, one in searched.first_order.items() for i in range(N_FEATURES)
    }
    best = sorted(certain, key=lambda at: -certain[at])
    assert {at for at, why in single.items() if why == "gradient"} >= set(best[: searched.options.shortlist])
    for (site, i), why in single.items():
        if why == "reads":
            auc, add = float(searched.first_order[site].auc[i]), float(searched.first_order[site].add[i])
            assert abs(auc - 0.5) >= shortlist.READS
            assert (auc - 0.5) * add > 0
    (four, *_) = [edit for edit in listed if len(edit.parts) == 4]
    assert {part[:2] for part in four.parts} == set(best[:4])
    assert four.dose == pytest.approx(1.0)
    weights = [part.dose / float(searched.first_order[part.site].add[part.row]) for part in four.parts]
    assert weights == pytest.approx([weights[0]] * 4)


def test_random_features_have_the_gradient_s_sign(searched: Ground) -> None:
    draws = shortlist.random_features(searched)
    edits = [edit for draw in draws for edit in draw]
    assert [len(draw) for draw in draws] == [3] * shortlist.DRAWS
    assert len(set(edits)) == len(edits)
    for site, row, sign in rows(edits):
        assert sign == np.sign(float(searched.first_order[site].add[row]))


def reading(searched: Ground) -> list[tuple[Any, int, float]]:
    every = [(site, i, float(one.reads[i])) for site, one in searched.first_order.items() for i in range(N_FEATURES)]
    return [(site, i, np.sign(v)) for site, i, v in sorted(every, key=lambda each: -abs(each[2])) if v]


def test_activation_difference(searched: Ground) -> None:
    assert rows(ways.by_activation_difference(searched)) == reading(searched)[:3]


@pytest.mark.parametrize(("name", "criterion"), [("delta-confidence", DeltaConfidence), ("output-score", OutputScore)])
def test_criteria_choose_among_what_reads(
    searched: Ground, name: str, criterion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "READERS", 10)
    among = reading(searched)[:10]
    scores = {}
    for site, sae in searched.saes.items():
        (table,) = rank_by(searched.model, sae, [criterion(dose=0.4, unit="relative")], site=site)
        scores.update({(site, int(i)): abs(float(v)) for i, v in zip(table.feature, table.score, strict=True)})
    expected = sorted(among, key=lambda at: -scores[at[:2]])[:3]
    assert rows(ways.by_criterion(searched, name)) == expected


def test_criteria_are_not_exchanged(searched: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: each is asked for the other."""
    right = {name: rows(ways.by_criterion(searched, name)) for name in ways.CRITERIA}
    exchanged = dict(zip(ways.CRITERIA, reversed(ways.CRITERIA.values()), strict=True))
    monkeypatch.setattr(ways, "CRITERIA", exchanged)
    assert {name: rows(ways.by_criterion(searched, name)) for name in exchanged} != right


def test_mean_difference_is_that_of_the_answers(searched: Ground) -> None:
    from trimtab.lm import TokenBatch, edited

    edits = ways.mean_difference(searched)
    assert [edit.parts[0].site for edit in edits] == list(SITES)
    means: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for example in searched.splits["candidates"].examples:
        for one, wanted in zip(example.answered, (True, False), strict=True):
            seen: list[torch.Tensor] = []
            ids = torch.tensor([[*one.prompt, *one.answer]])
            with torch.no_grad(), edited(searched.model, {SITE: seen.append}):
                searched.model.forward(TokenBatch.full(ids))
            means[wanted].append(seen[0][0, len(one.prompt) :].mean(0))
    difference = torch.stack(means[True]).mean(0) - torch.stack(means[False]).mean(0)
    row = searched.tables[SITE].rows[edits[1].parts[0].row]
    assert not searched.is_feature(edits[1].parts[0])
    assert torch.cosine_similarity(row, difference, dim=0) > 0.999


def test_a_learned_vector_does_better_than_the_gradient_s(searched: Ground) -> None:
    start, learned = (edit.at_dose(0.2) for edit in ways.learned_vector(searched))
    effects = searched.effects("candidates", [start, learned]).mean(1)
    assert effects[1] > effects[0] > 0


def test_every_way_s_best_is_chosen_within_the_budget(searched: Ground) -> None:
    """Against each candidate by itself at fine doses."""
    candidates = {
        "a": [SteeringEdit((Part(SITE, i, 1.0),)) for i in (0, 1, UP_FEATURE)],
        "b": [SteeringEdit((Part(SITE, UP_FEATURE, -1.0),)), SteeringEdit((Part(SITES[2], 5, 1.0),))],
    }
    found = choose(searched, candidates)
    assert found["b"].edit.parts[0][:2] == (SITE, UP_FEATURE)
    assert found["b"].edit.parts[0].dose < 0
    assert [found[name].tried for name in "ab"] == [3, 2]
    for one in found.values():
        assert one.kl <= 0.5
        assert one.kl == pytest.approx(float(searched.kl("choice", [one.edit]).mean()))
        assert one.effects.tolist() == searched.effects("choice", [one.edit])[0].tolist()
    fine = [candidates["b"][0].at_dose(dose) for dose in np.geomspace(0.02, 0.4, 30)]
    kls, effects = searched.kl("choice", fine).mean(1), searched.effects("choice", fine).mean(1)
    assert float(found["b"].effects.mean()) > 0.85 * float(effects[kls <= 0.5].max())


def budget_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(choosing, "_lowered", lambda _ground, edits: [edit.at_dose(0.4) for edit in edits])
    patch.setattr(choosing, "_within", _all_within)


def _all_within(ground: Ground, edits: Any) -> dict[SteeringEdit, tuple[float, float]]:
    means = ground.effects("choice", list(edits)).mean(1).tolist() if edits else []
    return {edit: (mean, 0.0) for edit, mean in zip(edits, means, strict=True)}


def screened_by_price(patch: pytest.MonkeyPatch) -> None:
    """The least of the screened candidates are left."""
    real = Ground.effects
    patch.setattr(
        Ground, "effects", lambda self, split, edits: (-1 if split == "screening" else 1) * real(self, split, edits)
    )


@pytest.mark.parametrize("mutation", [budget_forgotten, screened_by_price])
def test_a_mistake_in_the_choice_shows(
    searched: Ground, mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [SteeringEdit((Part(SITE, UP_FEATURE, -1.0),)), *(SteeringEdit((Part(SITE, i, 1.0),)) for i in range(4))]
    right = choose(searched, {"a": edits})["a"]
    mutation(monkeypatch)
    wrong = choose(searched, {"a": edits})["a"]
    assert wrong.edit != right.edit

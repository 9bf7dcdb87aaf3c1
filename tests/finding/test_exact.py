"""Exact scores against whole forward passes, and what is planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from planted_wishes import (
    HELD_FEATURE,
    N_FEATURES,
    SITE,
    SITES,
    UP_FEATURE,
    Ground,
    contrast_wish,
    texts_wish,
    words_wish,
)  # fmt: skip

from trimtab.finding import passes, steering_edit
from trimtab.finding.examples import Examples
from trimtab.finding.scoring import scorer
from trimtab.finding.steering_edit import Part, SteeringEdit
from trimtab.lm import Site
from trimtab.steering import DirectionTable

KINDS = {"texts": texts_wish, "contrast": lambda n: contrast_wish(n, ("YY", "N")), "words": words_wish}
EDITS = [
    SteeringEdit((Part(SITE, UP_FEATURE, -0.7),)),
    SteeringEdit((Part(SITE, 2, 0.4), Part(SITE, 9, -0.2))),
    SteeringEdit((Part(SITES[0], 1, 0.5), Part(SITES[2], 4, 0.3))),
    SteeringEdit((Part(SITE, HELD_FEATURE, 0.0),), "ablate"),
]


def tables(ground: Ground) -> dict[Site, DirectionTable]:
    return {site: DirectionTable.of(sae) for site, sae in ground.saes.items()}


def slow_effects(ground: Ground, examples: Examples, edit: SteeringEdit) -> torch.Tensor:
    """By whole forward passes of one row, without any cache: before and after."""
    model, saes = ground

    def log_prob(one: Any, edited: bool) -> torch.Tensor:
        handles = []
        for site in edit.sites if edited else ():

            def change(_module: Any, _args: Any, output: Any, site: Site = site) -> Any:
                x = output[0] if isinstance(output, tuple) else output
                x, mine = x.clone(), x[:, len(one.prompt) - 1 :]
                delta = torch.zeros_like(mine)
                for part in edit.parts:
                    if part.site == site and edit.operation == "ablate":
                        code = saes[site].encode(mine)[..., part.row, None]
                        delta = delta - code * saes[site].W_dec[part.row]
                    elif part.site == site:
                        delta = delta + part.dose * mine.norm(dim=-1, keepdim=True) * saes[site].directions[part.row]
                x[:, len(one.prompt) - 1 :] = mine + delta
                return (x, *output[1:]) if isinstance(output, tuple) else x

            handles.append(model.hf.model.layers[site.layer].register_forward_hook(change))
        ids = torch.tensor([[*one.prompt, *one.answer]])
        with torch.no_grad():
            logits = model.hf(ids).logits[0].double()
        for handle in handles:
            handle.remove()
        places = torch.arange(len(one.prompt) - 1, ids.shape[1] - 1)
        return logits.log_softmax(-1)[places, ids[0, places + 1]].sum()

    before, after = (torch.stack([log_prob(one, edited) for one in examples.answered]) for edited in (False, True))
    return examples.scores(after) - examples.scores(before)


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_those_of_whole_forward_passes(ground: Ground, kind: str) -> None:
    examples = KINDS[kind](5).examples(ground.model)
    found = scorer(ground.model, examples, SITES).effects(tables(ground), EDITS)
    for edit, effects in zip(EDITS, found, strict=True):
        assert (effects - slow_effects(ground, examples, edit)).abs().max() < 1e-4
    assert found.abs().max() > 0.05


def positions_from_the_first(patch: pytest.MonkeyPatch) -> None:
    """Edits begin one token late."""
    real = steering_edit.RowColumns
    patch.setattr(steering_edit, "RowColumns", lambda n, r, lengths, *rest: real(n, r, lengths + 1, *rest))


def doses_swapped(patch: pytest.MonkeyPatch) -> None:
    """Edits that go through the model together get one another's."""
    real = passes.source_of
    patch.setattr(passes, "source_of", lambda tables, edits: real(tables, edits[::-1]))


def answers_read_one_early(patch: pytest.MonkeyPatch) -> None:
    real = passes.answer_log_probs
    from trimtab.finding import scoring

    patch.setattr(scoring, "answer_log_probs", lambda logits, answers: real(logits.roll(1, 1), answers))


def lower_layers_of_another(patch: pytest.MonkeyPatch) -> None:
    """The input of the edited layer is another answer's."""
    real = passes.EditedPasses._logits

    def other(self: Any, tables: Any, edits: Any, number: int, layer: int) -> Any:
        mine, n = self._below[number], len(self.answered[number].answer)
        theirs = [b for i, b in self._below.items() if i != number and len(self.answered[i].answer) == n]
        self._below[number] = theirs[0] if theirs else mine
        found = real(self, tables, edits, number, layer)
        self._below[number] = mine
        return found

    patch.setattr(passes.EditedPasses, "_logits", other)


@pytest.mark.parametrize(
    "mutation", [positions_from_the_first, doses_swapped, answers_read_one_early, lower_layers_of_another]
)
def test_a_mistake_in_the_passes_shows(
    ground: Ground, mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    pair = [SteeringEdit((Part(SITE, UP_FEATURE, dose),)) for dose in (-0.7, 0.3)]
    examples = texts_wish(4).examples(ground.model)
    found = scorer(ground.model, examples, SITES).effects(tables(ground), pair)
    expected = torch.stack([slow_effects(ground, examples, edit) for edit in pair])
    assert (found - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_feature_is_first_by_exact_score(ground: Ground, kind: str) -> None:
    examples = KINDS[kind](8).examples(ground.model)
    edits = [SteeringEdit((Part(site, i, d),)) for site in SITES for i in range(N_FEATURES) for d in (0.4, -0.4)]
    found = scorer(ground.model, examples, SITES).effects(tables(ground), edits)
    assert edits[int(found.mean(1).argmax())].parts == (Part(SITE, UP_FEATURE, -0.4),)


def test_the_dose_of_several_directions_is_that_of_their_sum(ground: Ground) -> None:
    at = tables(ground)
    parts = [Part(SITE, 2, 0.3), Part(SITE, 9, -0.2), Part(SITES[0], 1, 0.5)]
    edit = SteeringEdit.joint(parts, at).at_dose(0.7)
    sums = [sum(p.dose * at[site].rows[p.row] for p in edit.parts if p.site == site) for site in edit.sites]
    assert torch.stack([torch.as_tensor(each).norm() for each in sums]).norm() == pytest.approx(0.7, rel=1e-5)
    assert edit.scaled(2).dose == pytest.approx(1.4)
    assert [p.dose / q.dose for p, q in zip(edit.parts, parts, strict=True)] == pytest.approx(
        [edit.parts[0].dose / 0.3] * 3
    )

"""The mask `found`: features of a saved steering, of a run of `find`, or of the task's own training items."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_choice import PUSHING, SITE, Letters, letters_setup

from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.finding import Contrast, find
from trimtab.lm import LanguageModel
from trimtab.policies import found_features
from trimtab.policies.config import PolicyConfig
from trimtab.policies.headroom.command import HeadroomConfig
from trimtab.policies.setup import Setup
from trimtab.runs import Run
from trimtab.steering import StaticSource, Steering, VectorSource
from trimtab.tasks import Item, Outcome


def allowed(setup: Any) -> list[int]:
    """What the policy's mask allows, wherever it is asked."""
    found = setup.fresh_mask().allowed(None, torch.zeros(1, dtype=torch.long), None)
    return found[0].nonzero()[:, 0].tolist()


class FirstLetter(Letters):
    """One letter, and it counts."""

    max_new_tokens = 1

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        hit = text[:1] == item.answer
        return Outcome(reward=float(hit), correct=hit, answer=text)


def of_own_items(model: LanguageModel, sae: Standard, dose: float) -> Setup:
    config = PolicyConfig(task="letters", mask="found", mask_features=8, dose=dose, options_only=True, hidden=())
    return Setup.with_parts(config, model, sae, FirstLetter.load())


def check_own_items(model: LanguageModel, sae: Standard) -> None:
    """N is right, and eight features push towards Y: subtracted, they are the best there are."""
    setup = of_own_items(model, sae, -0.7)
    assert allowed(setup) == list(PUSHING)
    assert set(setup.mask_features) == set(PUSHING)


def test_the_task_s_own_items_say_which(choice: LanguageModel, choice_dictionary: Standard) -> None:
    check_own_items(choice, choice_dictionary)
    assert not set(allowed(of_own_items(choice, choice_dictionary, 0.7))) & set(PUSHING)


def test_a_mutation_is_noticed(
    choice: LanguageModel, choice_dictionary: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dose's sign forgotten."""
    real = found_features.first_order

    def without_sign(*given: Any, **more: Any) -> Any:
        return {site: replace(one, add=one.add.abs()) for site, one in real(*given, **more).items()}

    monkeypatch.setattr(found_features, "first_order", without_sign)
    with pytest.raises((AssertionError, UserError)):
        check_own_items(choice, choice_dictionary)


def test_a_saved_steering_says_which(choice: LanguageModel, choice_dictionary: Standard, tmp_path: Path) -> None:
    source = StaticSource(choice_dictionary, [3, 9, 5, 20], [0.2, 0.4, 0.9, -0.5])
    Steering.of(choice, source).save(tmp_path / "s")
    setup = letters_setup(choice, choice_dictionary, mask="found", found=tmp_path / "s", mask_features=2)
    assert setup.mask_features == (5, 9)
    assert allowed(setup) == [5, 9]
    down = letters_setup(choice, choice_dictionary, mask="found", found=tmp_path / "s", dose=-0.5)
    assert down.mask_features == (20,)


def letters_wish(answers: tuple[str, str], n: int = 24) -> Contrast:
    """One letter rather than the other, behind strings that are all different."""
    rows = [
        {"prompt": f"{i:05b}".replace("0", "a").replace("1", "b"), "wanted": answers[0], "unwanted": answers[1]}
        for i in range(n)
    ]
    return Contrast(rows=tuple(rows))


SMALL: dict[str, Any] = {
    "examples": (8, 6, 8), "n_neutral": (2, 2), "max_new_tokens": 4, "way": (), "set_size": 1, "budget": "none",
}  # fmt: skip


def test_a_run_of_find_says_which(choice: LanguageModel, choice_dictionary: Standard, tmp_path: Path) -> None:
    found = find(choice, choice_dictionary, letters_wish(("Y", "N")), run=tmp_path / "find", **SMALL)
    assert found.yes
    (ranked,) = found.ranked
    up = [i for i, value in zip(ranked.feature, ranked.certainty, strict=True) if value > 0]
    down = [i for i, value in zip(ranked.feature, ranked.certainty, strict=True) if value < 0]
    assert set(up[: len(PUSHING)]) == set(PUSHING)
    setup = letters_setup(choice, choice_dictionary, mask="found", found=tmp_path / "find", mask_features=3)
    assert setup.mask_features == tuple(up[:3])
    other = letters_setup(choice, choice_dictionary, mask="found", found=tmp_path / "find", mask_features=3, dose=-0.5)
    assert other.mask_features == tuple(down[:3])


def test_a_run_whose_answer_is_no_is_refused(
    choice: LanguageModel, choice_dictionary: Standard, tmp_path: Path
) -> None:
    rows = [
        {**row, "wanted": row["unwanted"], "unwanted": row["wanted"]} if i % 2 else row
        for i, row in enumerate(letters_wish(("c", "d"), 24).rows)
    ]
    assert not find(choice, choice_dictionary, Contrast(rows=tuple(rows)), run=tmp_path / "no", **SMALL).yes
    with pytest.raises(UserError, match="its answer is no: no feature is shown to serve the wish"):
        letters_setup(choice, choice_dictionary, mask="found", found=tmp_path / "no")


def test_bad_input_is_named(choice: LanguageModel, choice_dictionary: Standard, tmp_path: Path) -> None:
    def message(**settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            letters_setup(choice, choice_dictionary, mask="found", **settings)
        return caught.value.line

    assert "there is no steering.json; give a directory" in message(found=tmp_path / "nowhere")
    Steering.of(choice, VectorSource(torch.ones(32), SITE, 0.4)).save(tmp_path / "vector")
    assert "it has no feature of this SAE at resid_post.3; give its SAE (--sae)" in message(found=tmp_path / "vector")
    Steering.of(choice, StaticSource(choice_dictionary, 3, operation="ablate")).save(tmp_path / "removed")
    assert "its operation is ablate; a policy adds features" in message(found=tmp_path / "removed")
    Steering.of(choice, StaticSource(choice_dictionary, 3, 0.4)).save(tmp_path / "up")
    assert "helps with a negative dose; give another --found" in message(found=tmp_path / "up", dose=-0.4)
    with Run.open(tmp_path / "other", "rank", {}) as run:
        run.finish({})
    assert "it is no finished run of find" in message(found=tmp_path / "other")
    other = Standard(*(getattr(choice_dictionary, name) + 1 for name in Standard.shapes))
    find(choice, {SITE: other}, letters_wish(("Y", "N")), run=tmp_path / "old", **SMALL)
    assert "it did not search this SAE at resid_post.3" in message(found=tmp_path / "old")
    with pytest.raises(UserError, match="--found x: the mask is accumulated; give --mask found, too"):
        PolicyConfig(task="ioi", found=Path("x"))
    with pytest.raises(UserError, match="mask found: headroom is measured before anything is found"):
        HeadroomConfig(task="ioi", mask=("none", "found"))

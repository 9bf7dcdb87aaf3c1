"""Each of these mistakes in measuring control makes a check fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_control

from trimtab.flags import TrainedFlags, switches
from trimtab.flags.evaluation import control, control_comparison, control_judging, control_rates
from trimtab.lm import LanguageModel
from trimtab.steering import divergence

Patch = pytest.MonkeyPatch
Models = dict[str, TrainedFlags]


def off_leaves_free(patch: Patch) -> None:
    real = control.conditions_of

    def other(*given: Any) -> Any:
        return [
            type(one)(one.kind, one.concept, one.state, {k: v or None for k, v in one.switches.items()}, one.prompts)
            for one in real(*given)
        ]

    patch.setattr(control, "conditions_of", other)


def control_writes_into_flags(patch: Patch) -> None:
    patch.setattr(control, "unassigned_draws", lambda flags, *_: [flags])


def rows_in_reverse(patch: Patch) -> None:
    real = switches.SwitchedRows.__init__
    patch.setattr(switches.SwitchedRows, "__init__", lambda self, flags, rows: real(self, flags, list(rows)[::-1]))


def columns_of_the_judge_as_they_stand(patch: Patch) -> None:
    real = control_judging.TextReader.__init__

    def other(self: Any, judge: Any, concepts: Any) -> None:
        real(self, judge, concepts)
        self._columns = list(range(len(concepts)))

    patch.setattr(control_judging.TextReader, "__init__", other)


def judge_is_shown_prompts(patch: Patch) -> None:
    real = control_judging.TextReader.has
    patch.setattr(control_judging.TextReader, "has", lambda self, texts: real(self, [f"Go{text}" for text in texts]))


def texts_are_units(patch: Patch) -> None:
    def of(cls: Any, has: Any, fluent: Any) -> Any:
        return cls((has & fluent).reshape(-1).astype(float), fluent.reshape(-1).astype(float))

    patch.setattr(control_rates.Counts, "of", classmethod(of))


def gibberish_counts(patch: Patch) -> None:
    real = control_rates.Counts.of.__func__  # type: ignore[attr-defined]
    patch.setattr(
        control_rates.Counts, "of", classmethod(lambda cls, has, fluent: real(cls, has, np.ones_like(fluent)))
    )


def divergence_from_the_same_model(patch: Patch) -> None:
    real = divergence.DivergenceRecorder.__init__

    def other(self: Any, model: Any, source: Any, **options: Any) -> None:
        real(self, model, source, **{**options, "to": model})

    patch.setattr(divergence.DivergenceRecorder, "__init__", other)


def rows_of_the_next_concept(patch: Patch) -> None:
    real = control_comparison.ComparedConcept
    patch.setattr(control_comparison, "ComparedConcept", lambda column, *given: real(1 - column, *given))


def alone(model: LanguageModel, models: Models) -> None:
    test_control.check_switchboard(test_control.control_of(model, models, original=None))


FEW = {"dose": (0.5,), "strength": (1.0,), "equal_kl": False, "plain": None, "samples": 1, "max_new_tokens": 4}


def beside(model: LanguageModel, models: Models) -> None:
    test_control.check_elsewhere(test_control.control_of(model, models, **FEW))


MUTATIONS: dict[str, tuple[Callable[[Patch], None], Callable[[LanguageModel, Models], Any]]] = {
    "off leaves the flag free": (off_leaves_free, alone),
    "rows under each other's switches": (rows_in_reverse, alone),
    "the judge's columns in its own order": (columns_of_the_judge_as_they_stand, alone),
    "another concept's column in what is compared": (
        rows_of_the_next_concept,
        lambda model, models: test_control.test_one_quantity_has_one_number(
            test_control.control_of(model, models, **FEW)
        ),
    ),
    "the control writes into the flags": (control_writes_into_flags, beside),
    "the judge is shown prompts": (
        judge_is_shown_prompts,
        lambda model, models: test_control.check_judge_sees_texts(model, models["forced"]),
    ),
    "texts as units": (texts_are_units, lambda _model, _models: test_control.check_prompts_are_resampled()),
    "gibberish counts": (
        gibberish_counts,
        lambda _model, _models: test_control.test_rates_count_fluent_texts_alone(),
    ),
    "divergence from the flagged model": (
        divergence_from_the_same_model,
        lambda model, models: test_control.check_divergence(model, models["forced"]),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name: str, tiny_llama: LanguageModel, finetuned: Models) -> None:
    mutate, check = MUTATIONS[name]
    check(tiny_llama, finetuned)
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        with pytest.raises(AssertionError):
            check(tiny_llama, finetuned)

"""Mistakes of an evaluation that would go unnoticed otherwise: each makes a check of this directory fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_evaluation_parts as parts
import torch

from trimtab.flags.evaluation import effects, erosion, harvest, measured, price, reading, reliance, texts
from trimtab.lm import LanguageModel

Patch = pytest.MonkeyPatch
Check = Callable[[LanguageModel, Any], Any]


def prompt_read_one_later(patch: Patch) -> None:
    real = harvest.last_prompt_place
    patch.setattr(harvest, "last_prompt_place", lambda batch: real(batch) + 1)


def response_read_with_the_prompt(patch: Patch) -> None:
    real = harvest.pooled
    patch.setattr(harvest, "pooled", lambda x, batch: real(x, batch._replace(answer=batch.tokens.real)))


def flags_stay_in_what_is_left(patch: Patch) -> None:
    real = erosion.subsets

    def kept(*given: Any) -> Any:
        found = real(*given)
        return {**found, erosion.WITHOUT: found[erosion.WHOLE]}

    patch.setattr(erosion, "subsets", kept)


def held_against_itself(patch: Patch) -> None:
    patch.setattr(measured, "plain_series", lambda series, _all: series)


def labels_exchanged(patch: Patch) -> None:
    real = erosion.fit_probes
    patch.setattr(erosion, "fit_probes", lambda x, labels, *rest: real(x, labels[:, ::-1], *rest))


def flags_kept_in_directions(patch: Patch) -> None:
    def whole(flags: Any, residual: Any, labels: Any) -> Any:
        x = residual[1].double()
        found = torch.stack([x[on].mean(0) - x[~on].mean(0) for on in torch.from_numpy(labels.T)])
        return (found / found.norm(dim=1, keepdim=True)).float()

    patch.setattr(parts, "concept_directions", whole)


def pushed_one_later(patch: Patch) -> None:
    real = effects._push
    patch.setattr(effects, "_push", lambda batch, *rest: real(batch._replace(answer=batch.answer.roll(1, 1)), *rest))


def flipped_is_right(patch: Patch) -> None:
    real = reliance._changes

    def exchanged(flags: Any, *rest: Any) -> Any:
        batch = rest[-1]
        return real(flags, *rest[:-1], batch._replace(labels=1 - batch.labels))

    patch.setattr(reliance, "_changes", exchanged)


def a_site_left_alone(patch: Patch) -> None:
    real = reliance._taps
    patch.setattr(reliance, "_taps", lambda changes: real(dict(list(changes.items())[:-1])))


def moved_twice_as_much(patch: Patch) -> None:
    real = reliance.Coordinates
    patch.setattr(reliance, "Coordinates", lambda dims, values: real(dims, values * 2 if values.ndim == 3 else values))


def divergence_the_other_way(patch: Patch) -> None:
    real = price.kl_divergence
    patch.setattr(price, "kl_divergence", lambda p, q: real(q, p))


def text_of_the_original(patch: Patch) -> None:
    patch.setattr(price, "final_rows", lambda model, batch, real=price.final_rows: real(patched["original"], batch))


def prompts_on_both_sides(patch: Patch) -> None:
    real = texts.split_ids

    def both(ids: Any, *rest: Any) -> Any:
        every = list(ids)
        return {**real(every, *rest), "fitted": every}

    patch.setattr(texts, "split_ids", both)


def sites_not_divided_by_targets(patch: Patch) -> None:
    def bare(spec: Any, held: Any) -> Any:
        owner = torch.nn.functional.one_hot(torch.tensor(spec.concept_of), len(spec.concepts)).float()
        return held @ (owner / owner.sum(0))

    patch.setattr(reading, "strengths", bare)


def grows_per_token(patch: Patch) -> None:
    patch.setattr(reliance, "tenfolds", lambda tokens: reliance.np.asarray(tokens) / 1e5)


patched: dict[str, Any] = {}
planted_reliance = parts.test_reliance_is_its_closed_form_and_nothing_where_nothing_is_read
MUTATIONS: dict[str, tuple[Callable[[Patch], None], Check]] = {
    "the last prompt token read one later": (
        prompt_read_one_later,
        lambda model, _: parts.test_the_last_prompt_token_sees_nothing_of_the_response(model),
    ),
    "the prompt in the response's mean": (
        response_read_with_the_prompt,
        lambda model, _: parts.test_activations_are_those_of_single_forward_passes(model),
    ),
    "targets forgotten in readings": (
        sites_not_divided_by_targets,
        lambda model, more: parts.test_reading_at_a_site_is_that_of_the_loss(model, more["flags"]),
    ),
    "flags left in what is probed without them": (
        flags_stay_in_what_is_left,
        lambda model, _: parts.test_probes_find_a_concept_exactly_where_it_is_planted(model.tokenizer, False),
    ),
    "labels of another concept": (
        labels_exchanged,
        lambda model, _: parts.test_probes_find_a_concept_exactly_where_it_is_planted(model.tokenizer, True),
    ),
    "held against itself instead of plain": (
        held_against_itself,
        lambda model, _: parts.test_erosion_is_held_against_the_plain_run_of_equal_seed_and_steps(model.tokenizer),
    ),
    "flags' dimensions in a concept's direction": (
        flags_kept_in_directions,
        lambda model, _: parts.test_a_second_encoding_has_an_effect_where_it_is_read(model.tokenizer, 4.0),
    ),
    "pushed at the tokens written": (
        pushed_one_later,
        lambda model, _: parts.test_effects_are_those_of_a_slow_reference(model),
    ),
    "flipped and right exchanged": (flipped_is_right, lambda model, _: planted_reliance(model.tokenizer)),
    "a site left alone": (
        a_site_left_alone,
        lambda model, more: parts.test_other_dimensions_are_moved_by_as_much(model, more["flags"], more["patch"]),
    ),
    "moved by more than flags are": (
        moved_twice_as_much,
        lambda model, more: parts.test_other_dimensions_are_moved_by_as_much(model, more["flags"], more["patch"]),
    ),
    "growth per token": (
        grows_per_token,
        lambda model, _: parts.test_growth_is_the_straight_line_over_tenfolds(model.tokenizer),
    ),
    "KL the other way": (
        divergence_the_other_way,
        lambda model, more: parts.test_the_price_is_that_of_plain_forward_passes(model, more["finetuned"]),
    ),
    "the original's own text": (
        text_of_the_original,
        lambda model, more: parts.test_the_price_is_that_of_plain_forward_passes(model, more["finetuned"]),
    ),
    "prompts on both sides": (prompts_on_both_sides, lambda model, _: parts.test_no_prompt_is_on_both_sides(model)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name: str, tiny_llama: LanguageModel, flags: Any, finetuned: Any) -> None:
    mutate, check = MUTATIONS[name]
    patched["original"] = tiny_llama
    with pytest.MonkeyPatch.context() as own:
        more = {"flags": flags, "finetuned": finetuned, "patch": own}
        check(tiny_llama, more)
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        with pytest.raises(AssertionError):
            check(tiny_llama, {**more, "patch": patch})

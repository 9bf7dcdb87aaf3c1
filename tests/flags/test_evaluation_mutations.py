"""Mistakes of an evaluation that would go unnoticed otherwise: each makes a check of this directory fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_evaluation_parts as parts
import torch

from trimtab.flags.dividing import example_id
from trimtab.flags.evaluation import effects, erosion, harvest, price, reading, reliance, texts
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
    real = parts.probed

    def kept(*given: Any) -> Any:
        return [
            (dims, draw, list(range(32)) if dims == parts.WITHOUT else columns, of)
            for dims, draw, columns, of in real(*given)
        ]

    patch.setattr(parts, "probed", kept)


def labels_not_shuffled(patch: Patch) -> None:
    real = parts.probed
    patch.setattr(parts, "probed", lambda *given: [(*one[:3], given[2]) for one in real(*given)])


def held_against_itself(patch: Patch) -> None:
    for module in (erosion, reliance):
        real = module.compared

        def own(*given: Any, real: Any = real) -> Any:
            return (row._replace(plain=row.plain and row.value) for row in real(*given))

        patch.setattr(module, "compared", own)


def plain_left_out(patch: Patch) -> None:
    patch.setattr(parts, "reliance_result", lambda series, *rest: reliance.reliance_result(without(series), *rest))


def without(series: Any) -> Any:
    """Beside the original instead of the plain run."""
    return [one._replace(plain=dict.fromkeys(one.plain, one.parts[0])) for one in series]


def all_phases_in_one_line(patch: Patch) -> None:
    real = reliance.compared

    def every(*given: Any) -> Any:
        return (row._replace(moment=replace(row.moment, last_phase=True)) for row in real(*given))

    patch.setattr(reliance, "compared", every)


def labels_exchanged(patch: Patch) -> None:
    real = erosion.fit_probes
    patch.setattr(erosion, "fit_probes", lambda x, labels, *rest: real(x, labels[:, ::-1], *rest))


def all_layers_in_the_mean(patch: Patch) -> None:
    real = parts.erosion_result
    patch.setattr(parts, "erosion_result", lambda *given: real(*given[:-1], 0))


def flags_above_are_free(patch: Patch) -> None:
    patch.setattr(effects, "Coordinates", lambda dims, values: lambda x: None)


def one_draw_for_all(patch: Patch) -> None:
    real = reliance._moved
    patch.setattr(
        reliance, "_moved", lambda clean, change, pool, drawn, x: real(clean, change, pool, 0 * drawn + drawn[:1], x)
    )


def prompts_read_together(patch: Patch) -> None:
    patch.setattr(reading, "names_one", lambda prompt, words: False)


def controls_of_any_variance(patch: Patch) -> None:
    real = parts.matched_dims
    patch.setattr(parts, "matched_dims", lambda flags, _variance: real(flags, parts.ALIKE))


def documents_on_both_sides(patch: Patch) -> None:
    patch.setattr(texts, "units_of", lambda examples: ("document", [example_id(one) for one in examples]))


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
    real = reliance._values
    patch.setattr(reliance, "_values", lambda flags, mean, on, others: real(flags, mean, 1 - on, others))


def no_other_concepts(patch: Patch) -> None:
    real = reliance._values
    patch.setattr(reliance, "_values", lambda flags, mean, on, others: real(flags, mean, on, on))


def swapped_against_the_untouched(patch: Patch) -> None:
    patch.setattr(reliance, "AGAINST", {**reliance.AGAINST, "swapped": "none"})


def a_site_left_alone(patch: Patch) -> None:
    real = reliance.edited
    patch.setattr(reliance, "edited", lambda model, edits: real(model, dict(list(edits.items())[:-1])))


def moved_twice_as_much(patch: Patch) -> None:
    real = reliance._moved
    patch.setattr(reliance, "_moved", lambda clean, change, *rest: real(clean, 2 * change, *rest))


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
    real = reading.read_strengths
    patch.setattr(
        reading,
        "read_strengths",
        lambda spec, held: real(replace(spec, targets=dict.fromkeys(spec.targets, 1.0)), held),
    )


def grows_per_token(patch: Patch) -> None:
    patch.setattr(reliance.np, "log10", lambda tokens: np.asarray(tokens) / 1e5)


patched: dict[str, Any] = {}
planted_reliance = parts.test_reliance_is_its_closed_form_and_nothing_where_nothing_is_read


def verdict_beside_plain() -> None:
    parts.test_the_verdict_is_beyond_plain_and_needs_forced_reliance(*parts.VERDICTS[1])


MUTATIONS: dict[str, tuple[Callable[[Patch], None], Check]] = {
    "the last prompt token read one later": (
        prompt_read_one_later,
        lambda model, _: parts.test_the_last_prompt_token_sees_nothing_of_the_response(model),
    ),
    "the prompt in the response's mean": (
        response_read_with_the_prompt,
        lambda model, _: parts.test_forward_passes_are_those_of_single_examples(model),
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
    "labels of the control not shuffled": (
        labels_not_shuffled,
        lambda _model, _: parts.test_labels_are_shuffled_for_a_control_and_for_nothing_else(),
    ),
    "layers before the flags in the mean": (
        all_layers_in_the_mean,
        lambda model, _: parts.test_the_mean_is_over_layers_with_flags(model.tokenizer),
    ),
    "probes held against themselves instead of plain": (
        held_against_itself,
        lambda model, _: parts.test_erosion_is_held_against_the_plain_run(model.tokenizer),
    ),
    "what plain loses left in": (plain_left_out, lambda _model, _: verdict_beside_plain()),
    "all phases in one line": (
        all_phases_in_one_line,
        lambda _model, _: parts.test_lines_go_through_moments_of_the_last_phase_beyond_plain(),
    ),
    "flags above the layer left free": (
        flags_above_are_free,
        lambda model, _: parts.test_effects_are_those_of_a_slow_reference(model),
    ),
    "one draw of dimensions for all examples": (
        one_draw_for_all,
        lambda model, more: parts.test_other_dimensions_are_moved_by_as_much(model, more["flags"], more["patch"]),
    ),
    "asking prompts among neutral ones": (
        prompts_read_together,
        lambda model, _: parts.test_prompts_that_name_a_concept_are_read_apart(model),
    ),
    "controls of any variance": (
        controls_of_any_variance,
        lambda _model, more: parts.test_unassigned_dimensions_are_no_flags(more["flags"]),
    ),
    "documents on both sides": (
        documents_on_both_sides,
        lambda model, _: parts.test_no_document_is_on_both_sides(model),
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
    "flags swapped with themselves": (no_other_concepts, lambda model, _: planted_reliance(model.tokenizer)),
    "swapped flags against the untouched model": (
        swapped_against_the_untouched,
        lambda model, _: planted_reliance(model.tokenizer),
    ),
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
        lambda _model, _: parts.test_ends_of_runs_of_different_lengths_make_a_line(),
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

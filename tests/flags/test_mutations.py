"""What would go unnoticed otherwise: each of these mistakes makes a check of this directory fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import test_adapters
import test_curricula
import test_loss
import test_placing
import test_switches
import test_training

from trimtab.flags import Curriculum, FlagSpec, adapters, finetuning, loss, placing, switches
from trimtab.flags.loss import FlagReading
from trimtab.lm import LanguageModel

Patch = pytest.MonkeyPatch


def mask_shifted(patch: Patch) -> None:
    real = test_loss.batch_of

    def shifted(*given: Any) -> Any:
        batch = real(*given)
        return batch._replace(answer=batch.answer.roll(-1, dims=1))

    patch.setattr(test_loss, "batch_of", shifted)


def next_layers(spec: FlagSpec) -> dict[str, float]:
    """Targets as they would be if each site had those of the layer behind it."""
    values = list(spec.targets.values())
    return dict(zip(spec.targets, [*values[2:], *values[-2:]], strict=True))


def ramp_off_in_the_loss(patch: Patch) -> None:
    real = FlagReading.__init__

    def other(self: FlagReading, spec: FlagSpec, *given: Any, **options: Any) -> None:
        fields = {"concepts": spec.concepts, "dims": spec.dims, "d_model": spec.d_model}
        real(self, FlagSpec(**fields, targets=next_layers(spec)), *given, **options)

    patch.setattr(FlagReading, "__init__", other)


def ramp_off_in_places(patch: Patch) -> None:
    real = placing.FlagSpec
    patch.setattr(placing, "FlagSpec", lambda **given: real(**{**given, "targets": next_layers(real(**given))}))


def site_missed(patch: Patch, module: Any, name: str) -> None:
    real = getattr(module, name)
    patch.setattr(module, name, lambda model, edits: real(model, dict(list(edits.items())[:-1])))


def prompt_counts(patch: Patch) -> None:
    real = test_loss.batch_of

    def all_of_it(*given: Any) -> Any:
        batch = real(*given)
        return batch._replace(answer=batch.tokens.real)

    patch.setattr(test_loss, "batch_of", all_of_it)


def removed_before_the_gradients(patch: Patch) -> None:
    real = test_loss.step_loss

    @contextmanager
    def early(*given: Any, **options: Any) -> Iterator[Any]:
        with real(*given, **options) as step:
            pass
        yield step

    patch.setattr(test_loss, "step_loss", early)


def not_divided_by_all_tokens(patch: Patch) -> None:
    real = test_loss.step_loss
    patch.setattr(test_loss, "step_loss", lambda *given, **options: real(*given, **{**options, "tokens": None}))


def attention_writes_all(patch: Patch) -> None:
    patch.setattr(adapters, "_writer", lambda model, site, *_: model.layout.layers[site.layer].attention.out)


def off_is_on(patch: Patch) -> None:
    real = loss.forcing
    patch.setattr(test_loss, "forcing", lambda model, spec, labels: real(model, spec, 1 - labels))


def highest_variance(patch: Patch) -> None:
    patch.setattr(placing, "lowest_variance", lambda found, n: found.variance.mean(0).argsort()[-n:].tolist())


def always_forced(patch: Patch) -> None:
    patch.setattr(Curriculum, "forces", lambda self, step, steps, seed: True)


Check = Callable[[LanguageModel], Any]
MUTATIONS: dict[str, tuple[Callable[[Patch], None], Check]] = {
    "the mask shifted by one": (
        mask_shifted,
        lambda model: test_loss.test_the_loss_is_its_closed_form_over_the_responses_tokens(model, "l1"),
    ),
    "the prompt in the mask": (
        prompt_counts,
        lambda model: test_loss.test_the_loss_is_its_closed_form_over_the_responses_tokens(model, "l1"),
    ),
    "the mask of the cross-entropy": (
        mask_shifted,
        test_loss.test_the_cross_entropy_is_that_of_the_responses_tokens,
    ),
    "the ramp off by a layer in the loss": (
        ramp_off_in_the_loss,
        lambda model: test_loss.test_the_loss_is_its_closed_form_over_the_responses_tokens(model, "normalised_l1"),
    ),
    "the ramp off by a layer in places": (ramp_off_in_places, test_placing.test_the_papers_ramp),
    "a site missed in the loss": (
        lambda patch: site_missed(patch, loss, "edited"),
        test_loss.test_strength_is_the_mean_of_what_is_held_over_the_target,
    ),
    "a site missed in forcing": (
        lambda patch: site_missed(patch, loss, "edited"),
        test_loss.test_forcing_writes_the_coordinates_bit_for_bit_at_every_site,
    ),
    "a site missed by switches": (
        lambda patch: site_missed(patch, switches, "hooked"),
        test_switches.test_values_are_there_bit_for_bit_at_every_site_and_position,
    ),
    "flags not written again where layers are computed again": (
        removed_before_the_gradients,
        lambda model: test_loss.test_layers_computed_again_give_the_same_loss_and_gradients(model, forced=True),
    ),
    "parts of a batch that weigh alike": (
        not_divided_by_all_tokens,
        test_loss.test_a_part_of_a_batch_weighs_as_its_tokens_do,
    ),
    "LoRA without what the MLP writes by": (
        attention_writes_all,
        test_adapters.test_modules_pass_where_they_write_at_every_site,
    ),
    "on and off exchanged": (off_is_on, test_loss.test_forcing_writes_the_coordinates_bit_for_bit_at_every_site),
    "dimensions of the highest variance": (
        highest_variance,
        test_placing.test_dimensions_are_those_of_the_lowest_variance,
    ),
    "what writes flags learns no faster": (
        lambda patch: patch.setattr(finetuning, "writing_rows", lambda *_: []),
        lambda model: test_training.test_the_first_step_is_that_of_plain_torch(
            model, placing.place_flags(model, ["sea", "war"], ["the tide and the army"] * 4, dims=4, from_layer=0), 4.0
        ),
    ),
    "every step forced": (
        always_forced,
        lambda _model: test_curricula.test_steps_are_forced_as_often_as_the_schedule_says(),
    ),
}

ITSELF: dict[str, type[Exception]] = {
    "a site missed in the loss": KeyError,
    "flags not written again where layers are computed again": RuntimeError,
}
"""What the mutated code raises before a check fails: no value of the site, another computation than before."""


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name: str, tiny_llama: LanguageModel) -> None:
    mutate, check = MUTATIONS[name]
    check(tiny_llama)
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        with pytest.raises(ITSELF.get(name, AssertionError)):
            check(tiny_llama)

"""Mutations of the decoder: with each, the check that guards against it must fail.

A mutation is one plausible mistake, patched in. The checks are those that `test_semantics.py` runs unmutated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from source_kinds import HEAD, KINDS, LATER, SITE, random
from steering_checks import (
    LENGTHS,
    check_batch_independence,
    check_cached_equals_cache_free,
    check_default_positions,
    check_doses_logged,
    check_draws_are_keyed,
    check_empty_edit,
    check_fork,
    check_nothing_after_stop,
    check_reconstruction_error_kept,
    check_replay,
    decode_and_look,
    prompts_of,
    run_decode,
)
from tiny_dictionary import make_dictionary

from trimtab.dictionaries import Standard
from trimtab.lm import (
    DecodeConfig,
    DecodeStream,
    LanguageModel,
    PositionRule,
    TokenBatch,
    capture,
    decode_stream,
    editing,
    edits,
    taps,
)
from trimtab.lm.cache import GrowingCache, GrowingLayer
from trimtab.lm.editing import SourceRunner
from trimtab.steering import (
    DirectionTable,
    PatchSource,
    RandomFeatureSource,
    ReplaySource,
    StaticSource,
    VectorSource,
    composed_sources,
    operations,
)

Patch = pytest.MonkeyPatch
NOT_ONCE = "did not see each position once"


class Mutation(NamedTuple):
    """A mistake, the check that must notice it, what the check then says (part of the message), and a layout.

    Mutations without a layout of their own take turns with the three.
    """

    apply: Callable[[Patch, LanguageModel, Standard], None]
    check: Callable[[LanguageModel, Standard], object]
    error: type[Exception] = AssertionError
    match: str | None = None
    layout: str = ""


def edit_one_position_early(patch: Patch, *_: object) -> None:
    original = SourceRunner.aim

    def aim(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        original(self, *args, **kwargs)
        self._time = (self._time - 1).clamp_min(0)

    patch.setattr(SourceRunner, "aim", aim)


def start_after_the_prompt(patch: Patch, *_: object) -> None:
    patch.setattr(PositionRule, "selects", lambda self, position, prompt_length: position >= prompt_length)


def count_padding_as_positions(patch: Patch, *_: object) -> None:
    def positions(self: TokenBatch) -> torch.Tensor:
        return torch.arange(self.ids.shape[1]).expand_as(self.ids)

    patch.setattr(TokenBatch, "position_ids", property(positions))


def skip_every_third_edit(patch: Patch, *_: object) -> None:
    original, calls = taps.apply_rows, [0]

    def apply_rows(x, change):  # type: ignore[no-untyped-def]
        calls[0] += 1
        return x if calls[0] % 3 == 0 else original(x, change)

    patch.setattr(taps, "apply_rows", apply_rows)


def forget_the_hooks(patch: Patch, *_: object) -> None:
    patch.setattr(SourceRunner, "edits", lambda self: {})


def edit_the_prefill_twice(patch: Patch, *_: object) -> None:
    original = taps.apply_rows

    def apply_rows(x, change):  # type: ignore[no-untyped-def]
        once = original(x, change)
        return original(once, change) if x.shape[1] > 1 else once

    patch.setattr(taps, "apply_rows", apply_rows)


def register_hooks_twice(patch: Patch, *_: object) -> None:
    original = taps.tap
    patch.setattr(taps, "tap", lambda model, site, fn: original(model, site, fn) + original(model, site, fn))


def edit_a_copy_for_the_cache(patch: Patch, *_: object) -> None:
    """The next layers read the edited stream for this token's logits only: its keys and values stay unedited."""
    original = GrowingCache.update

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        keys, values = original(self, key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == 2:
            self.layers[layer_idx].keys[:, :, -1:] *= 0.5
        return keys, values

    patch.setattr(GrowingCache, "update", update)


def draw_from_a_shared_generator(patch: Patch, *_: object) -> None:
    patch.setattr(decode_stream, "uniform", lambda seed, sample, *_: torch.rand(len(sample), dtype=torch.float64))


def draw_actions_from_a_shared_generator(patch: Patch, *_: object) -> None:
    patch.setattr(editing, "uniform", lambda seed, sample, *_: torch.rand(len(sample), dtype=torch.float64))


def key_draws_by_place_in_the_batch(patch: Patch, *_: object) -> None:
    original = decode_stream.uniform
    patch.setattr(
        decode_stream, "uniform", lambda seed, sample, *rest: original(seed, torch.arange(len(sample)), *rest)
    )


def leave_out_position_ids(patch: Patch, *_: object) -> None:
    original = LanguageModel.forward_arguments

    def forward_arguments(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return {**original(self, *args, **kwargs), "position_ids": None}

    patch.setattr(LanguageModel, "forward_arguments", forward_arguments)


def mask_from_pad_tokens(patch: Patch, model: LanguageModel, _: object) -> None:
    patch.setattr(TokenBatch, "attention_mask", property(lambda self: (self.ids != model.pad_id).long()))


def leave_out_the_mask(patch: Patch, *_: object) -> None:
    original = LanguageModel.forward_arguments

    def forward_arguments(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return {**original(self, *args, **kwargs), "attention_mask": None}

    patch.setattr(LanguageModel, "forward_arguments", forward_arguments)


def go_on_editing_after_the_stop(patch: Patch, *_: object) -> None:
    """A finished row stays in the batch and is edited, while its tokens are cut off afterwards."""
    original, leave = DecodeStream._reason_to_end, DecodeStream._leave

    def never_before_the_end(self, row):  # type: ignore[no-untyped-def]
        return "" if row.tokens_left else original(self, row)

    def cut(self, ended):  # type: ignore[no-untyped-def]
        for row in ended:
            stops = [i for i, token in enumerate(row.token_ids) if token in self.model.eos_ids]
            row.token_ids = row.token_ids[: stops[0] + 1] if stops else row.token_ids
        return leave(self, ended)

    patch.setattr(DecodeStream, "_reason_to_end", never_before_the_end)
    patch.setattr(DecodeStream, "_leave", cut)


def keep_the_wrong_rows(patch: Patch, *_: object) -> None:
    original = GrowingCache.select
    patch.setattr(GrowingCache, "select", lambda self, rows: original(self, (rows - 1).clamp_min(0)))


def lose_the_reconstruction_error(patch: Patch, _: LanguageModel, sae: Standard) -> None:
    original = SourceRunner._at

    def at(self, index, site):  # type: ignore[no-untyped-def]
        fn = original(self, index, site)

        def replaced(x):  # type: ignore[no-untyped-def]
            change = fn(x)
            if change is None:
                return None
            rows = x[change.batch, change.time]
            return change._replace(delta=change.delta + sae(rows) - rows)

        return replaced

    patch.setattr(SourceRunner, "_at", at)


def round_what_is_hooked(patch: Patch, *_: object) -> None:
    original = taps.apply_rows
    patch.setattr(taps, "apply_rows", lambda x, change: original(x, change) * (1 + 1e-6))


def apply_less_than_is_logged(patch: Patch, *_: object) -> None:
    original = edits.edit_delta
    patch.setattr(edits, "edit_delta", lambda directions, edit: 0.9 * original(directions, edit))


def log_the_coefficient_as_the_request(patch: Patch, *_: object) -> None:
    original = SourceRunner._log

    def log(self, site, x, edit, change):  # type: ignore[no-untyped-def]
        original(self, site, x, edit._replace(requested=None), change)

    patch.setattr(SourceRunner, "_log", log)


def replay_rounded_coefficients(patch: Patch, *_: object) -> None:
    original = ReplaySource.choose

    def choose(self, request):  # type: ignore[no-untyped-def]
        edit = original(self, request)
        return edit and edit._replace(coefficient=edit.coefficient.half().float())

    patch.setattr(ReplaySource, "choose", choose)


def replay_nothing(patch: Patch, *_: object) -> None:
    patch.setattr(ReplaySource, "choose", lambda self, request: None)


def interleave_copies_wrongly(patch: Patch, *_: object) -> None:
    original = GrowingLayer.unfold

    def unfold(self: GrowingLayer, copies: int, own: int, reserve: int) -> None:
        original(self, copies, own, reserve)
        self.select(torch.arange(self.keys.shape[0]).unflatten(0, (-1, copies)).T.flatten())  # type: ignore[union-attr]

    patch.setattr(GrowingLayer, "unfold", unfold)


def replace_by_adding_the_difference(patch: Patch, *_: object) -> None:
    def of(self, x):  # type: ignore[no-untyped-def]
        given = x if self.base is None else torch.where(self.base.isnan(), x, self.base)
        return x + (given - x + self.delta)

    patch.setattr(taps.RowDelta, "of", of)


def set_directions_one_by_one(patch: Patch, *_: object) -> None:
    patch.setattr(operations.Slots, "projecting", lambda self, change: change)


def edit_the_first_site_only(patch: Patch, *_: object) -> None:
    original = SourceRunner.edits
    patch.setattr(SourceRunner, "edits", lambda self: dict(list(original(self).items())[:1]))


def log_the_sites_in_another_order(patch: Patch, *_: object) -> None:
    original = SourceRunner._log
    patch.setattr(SourceRunner, "_log", lambda self, site, *rest: original(self, len(self.sites) - 1 - site, *rest))


def give_every_site_the_first_one_s_features(patch: Patch, *_: object) -> None:
    original = StaticSource.pick
    patch.setattr(StaticSource, "pick", lambda self, request: original(self, request._replace(site=self.sites[0])))


def edit_the_neighbouring_head(patch: Patch, *_: object) -> None:
    original = SourceRunner.edits

    def moved(self):  # type: ignore[no-untyped-def]
        return {s if s.head is None else s._replace(head=s.head ^ 1): fn for s, fn in original(self).items()}

    patch.setattr(SourceRunner, "edits", moved)


def patch_from_one_position_early(patch: Patch, *_: object) -> None:
    original = PatchSource.replacement
    patch.setattr(
        PatchSource,
        "replacement",
        lambda self, request: original(self, request._replace(position=(request.position - 1).clamp_min(0))),
    )


def replay_without_targets(patch: Patch, *_: object) -> None:
    original = edits.EditLog.edit
    patch.setattr(edits.EditLog, "edit", lambda self: original(self)._replace(target=None))


def replay_another_activation(patch: Patch, *_: object) -> None:
    original = edits.EditLog._replacement

    def replacement(self):  # type: ignore[no-untyped-def]
        found = original(self)
        return found if found is None else found.roll(1, 0)

    patch.setattr(edits.EditLog, "_replacement", replacement)


def fork_without_what_was_replaced(patch: Patch, *_: object) -> None:
    original = composed_sources._in_turn

    def in_turn(parts, rows):  # type: ignore[no-untyped-def]
        edit = original(parts, rows)
        return edit and edit._replace(replacement=None)

    patch.setattr(composed_sources, "_in_turn", in_turn)


def of_kind(kind: str, check: Callable[..., object], *more: object) -> Callable[[LanguageModel, Standard], object]:
    """A check of one kind of source, named after both."""

    def checked(model: LanguageModel, sae: Standard) -> object:
        return check(model, KINDS[kind](model, sae), prompts_of(LENGTHS), *more)

    checked.__name__ = f"{check.__name__}, {kind}"
    return checked


def bits_of_a_patch(model: LanguageModel, _: Standard) -> None:
    values = 1e-3 * random(1, 14, 32)
    _, seen = decode_and_look(model, PatchSource({SITE: values}, positions="prompt"), prompts_of((14,))[0])
    assert torch.equal(next(iter(seen.values())).after[:14], values[0])


def bits_of_axes(model: LanguageModel, _: Standard) -> None:
    axes, wanted = DirectionTable.axes(32, [3, 8]), [1.1e-3, 0.7]
    source = StaticSource(axes, [0, 1], wanted, SITE, operation="overwrite", unit="absolute", positions="all")
    _, seen = decode_and_look(model, source, prompts_of((14,))[0])
    after = next(iter(seen.values())).after
    assert torch.equal(after[:, [3, 8]], torch.tensor(wanted).expand(len(after), -1))


def projections(model: LanguageModel, _: Standard) -> None:
    """Of vectors at angles, at two sites: each becomes its own dose."""
    vectors = {SITE: random(3, 32) + 0.5, LATER: random(3, 32) - 0.5}
    doses = {SITE: [3.0, -1.0, 2.0], LATER: [4.0, 5.0, -6.0]}
    source = VectorSource(vectors, doses=doses, operation="clamp", unit="absolute")
    decoded, seen = decode_and_look(model, source, prompts_of((14,))[0])
    for site, given in vectors.items():
        after = seen[model.site(site)].after[decoded.edits.position.unique()]
        units = given / given.norm(dim=-1, keepdim=True)
        wanted = torch.tensor(doses[site]).expand(len(after), -1)
        torch.testing.assert_close(after @ units.T, wanted, atol=1e-2, rtol=1e-3)


def patched_fork(model: LanguageModel, sae: Standard) -> object:
    return check_fork(model, sae, prompts_of((5, 18)), past_source=KINDS["patched everywhere"](model, sae))


def patched_positions(model: LanguageModel, sae: Standard) -> object:
    """A row's own text patched into it changes nothing."""
    prompts, config = prompts_of((9, 14)), DecodeConfig(max_new_tokens=3, stop_at_eos=False)
    batch = TokenBatch.pad(prompts, model.pad_id, model.device)
    source = PatchSource(capture(model, batch, [SITE, HEAD]), positions="prompt", lengths=batch.lengths)
    assert run_decode(model, prompts, config, source).token_logp == run_decode(model, prompts, config).token_logp


def cached(model: LanguageModel, sae: Standard) -> object:
    return check_cached_equals_cache_free(model, StaticSource(sae, 3, 0.7), prompts_of(LENGTHS))


def cached_with_stops(model: LanguageModel, sae: Standard) -> object:
    config = DecodeConfig(max_new_tokens=12, temperature=1.0, stop=tuple("aeiou0123456789"))
    return check_cached_equals_cache_free(model, StaticSource(sae, 3, 0.7), prompts_of(LENGTHS), config)


def cached_with_pad_tokens(model: LanguageModel, sae: Standard) -> object:
    return check_cached_equals_cache_free(model, StaticSource(sae, 3, 0.7), prompts_of(LENGTHS, pad_id=model.pad_id))


def default_positions(model: LanguageModel, sae: Standard) -> object:
    return check_default_positions(model, StaticSource(sae, 3, 0.6), prompts_of(LENGTHS))


def nothing_after_stop(model: LanguageModel, sae: Standard) -> object:
    return check_nothing_after_stop(model, StaticSource(sae, 3, 0.6), prompts_of(LENGTHS[:4]))


def error_kept(model: LanguageModel, sae: Standard) -> object:
    source = StaticSource(sae, 3, 4.0, operation="clamp", unit="absolute", positions="all")
    return check_reconstruction_error_kept(model, sae, source, 3, prompts_of((14,))[0])


def empty_edit(model: LanguageModel, sae: Standard) -> object:
    return check_empty_edit(model, StaticSource(sae, -1, 0.5, positions="all"), prompts_of(LENGTHS))


def independent(model: LanguageModel, sae: Standard) -> object:
    return check_batch_independence(model, lambda: RandomFeatureSource(sae, 0.6), prompts_of(LENGTHS))


def keyed(model: LanguageModel, sae: Standard) -> object:
    return check_draws_are_keyed(model, prompts_of(LENGTHS))


def doses(model: LanguageModel, sae: Standard) -> object:
    return check_doses_logged(model, StaticSource(sae, 3, 0.4), 0.4, prompts_of(LENGTHS))


def replay(model: LanguageModel, sae: Standard) -> object:
    return check_replay(model, StaticSource(sae, 3, 0.5), prompts_of(LENGTHS))


def fork(model: LanguageModel, sae: Standard) -> object:
    return check_fork(model, sae, prompts_of((5, 18)))


DIFFERENT = "not close"
MUTATIONS = [
    Mutation(edit_one_position_early, cached, match=DIFFERENT),
    Mutation(start_after_the_prompt, default_positions),
    Mutation(count_padding_as_positions, default_positions, RuntimeError, NOT_ONCE),
    Mutation(skip_every_third_edit, cached, match=DIFFERENT),
    Mutation(forget_the_hooks, cached, RuntimeError, NOT_ONCE),
    Mutation(edit_the_prefill_twice, cached, match=DIFFERENT),
    Mutation(register_hooks_twice, cached, RuntimeError, NOT_ONCE),
    Mutation(edit_a_copy_for_the_cache, cached, match=DIFFERENT),
    Mutation(leave_out_position_ids, cached, match=DIFFERENT, layout="tiny_gpt2"),  # the others are relative
    Mutation(leave_out_position_ids, independent, match=DIFFERENT, layout="tiny_gpt2"),
    Mutation(mask_from_pad_tokens, cached_with_pad_tokens, match=DIFFERENT),
    Mutation(leave_out_the_mask, cached, match=DIFFERENT),
    Mutation(keep_the_wrong_rows, cached_with_stops, match=DIFFERENT),
    Mutation(go_on_editing_after_the_stop, nothing_after_stop, RuntimeError, NOT_ONCE),
    Mutation(lose_the_reconstruction_error, error_kept, match=DIFFERENT),
    Mutation(round_what_is_hooked, empty_edit),
    Mutation(draw_from_a_shared_generator, keyed),
    Mutation(draw_from_a_shared_generator, independent),
    Mutation(key_draws_by_place_in_the_batch, keyed, match="place in the batch"),
    Mutation(draw_actions_from_a_shared_generator, independent, match=DIFFERENT),
    Mutation(apply_less_than_is_logged, doses),
    Mutation(apply_less_than_is_logged, cached, match=DIFFERENT),
    Mutation(log_the_coefficient_as_the_request, doses),
    Mutation(replay_rounded_coefficients, replay),
    Mutation(replay_nothing, replay),
    Mutation(replay_nothing, fork),
    Mutation(interleave_copies_wrongly, fork, match=DIFFERENT),
    Mutation(replace_by_adding_the_difference, bits_of_a_patch),
    Mutation(replace_by_adding_the_difference, bits_of_axes),
    Mutation(set_directions_one_by_one, projections, match=DIFFERENT),
    Mutation(give_every_site_the_first_one_s_features, projections),
    Mutation(edit_the_first_site_only, of_kind("two sites", check_cached_equals_cache_free), RuntimeError, NOT_ONCE),
    Mutation(log_the_sites_in_another_order, of_kind("patched head", check_replay), Exception),
    Mutation(
        log_the_sites_in_another_order, of_kind("random at two sites", check_cached_equals_cache_free), match=DIFFERENT
    ),
    Mutation(edit_the_neighbouring_head, of_kind("patched head", check_cached_equals_cache_free), match=DIFFERENT),
    Mutation(patch_from_one_position_early, patched_positions),
    Mutation(replay_without_targets, of_kind("axes", check_replay)),
    Mutation(replay_another_activation, of_kind("patched head", check_replay)),
    Mutation(fork_without_what_was_replaced, patched_fork),
]
LAYOUTS = ("tiny_llama", "tiny_gemma3", "tiny_gpt2")
CASES = [m if m.layout else m._replace(layout=LAYOUTS[i % 3]) for i, m in enumerate(MUTATIONS)]


@pytest.mark.parametrize("mutation", CASES, ids=[f"{m.apply.__name__}-{m.check.__name__}-{m.layout}" for m in CASES])
def test_the_check_fails(mutation: Mutation, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    model = request.getfixturevalue(mutation.layout)
    sae = make_dictionary(model)
    mutation.apply(monkeypatch, model, sae)
    with pytest.raises(mutation.error, match=mutation.match):
        mutation.check(model, sae)


@pytest.mark.parametrize("check", sorted({m.check for m in MUTATIONS}, key=lambda c: c.__name__))
def test_the_check_passes_unmutated(
    check: Callable[[LanguageModel, Standard], object], tiny_gemma3: LanguageModel
) -> None:
    check(tiny_gemma3, make_dictionary(tiny_gemma3))

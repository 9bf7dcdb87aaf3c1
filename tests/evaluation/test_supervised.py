"""Approximation and control where the answer is known: identity and mean, sums, exhaustive search, whole passes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from circuit_prompts import Hooks, few_names, logits
from torch import Tensor

from trimtab.dictionaries import DictionaryInfo, Standard
from trimtab.errors import UserError
from trimtab.evaluation.circuits.circuit import Circuit, CircuitHead
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.circuits.rows import rows_of
from trimtab.evaluation.supervised import control
from trimtab.evaluation.supervised.approximation import approximation, loss_recovered
from trimtab.evaluation.supervised.codes import Codes, Factors
from trimtab.evaluation.supervised.control import (
    EditedRows,
    EditSuccess,
    Point,
    edit_by_meaning,
    edit_greedy,
    edit_success,
    edit_supervised,
    edits_greedy,
    frontier,
    weights,
)
from trimtab.evaluation.supervised.cross_sections import Answers, PatchedPrompts, activations_of, cross_section
from trimtab.lm import LanguageModel, Site

IOI = few_names()


def locations_of(model: LanguageModel) -> tuple[Location, ...]:
    """Of several kinds and layers, two of them at one site."""
    return (
        head_location(model, "attn_z", 2, 1, "S2"), head_location(model, "attn_v", 2, 3, "S2"),
        head_location(model, "attn_k", 3, 0, "IO"), head_location(model, "attn_k", 3, 0, "S1"),
        head_location(model, "attn_z", 3, 2, "END"),
    )  # fmt: skip


def test_all_locations_are_patched_at_once_as_in_whole_passes(any_tiny: LanguageModel) -> None:
    """Each row's own positions, in one forward pass of the plain model with hooks; the order of prompts is kept."""
    prompts, places = IOI.prompts(6), locations_of(any_tiny)
    found = PatchedPrompts(any_tiny, IOI, prompts, places, batch_size=4)
    generator = torch.Generator().manual_seed(0)
    values = {place: torch.randn(x.shape, generator=generator) for place, x in found.activations.items()}
    answers = found.answers(values)
    for number, prompt in enumerate(prompts):
        (rows,) = rows_of([IOI.tokenise(prompt)], any_tiny)
        with Hooks(any_tiny) as hooks:
            plain = logits(any_tiny, rows.ids)[0, -1]
            for place, value in values.items():
                size = value.shape[1]
                if place.site.kind == "attn_z":
                    hooks.write_z_head(place, rows, size, value[number])
                else:
                    hooks.write_head(place, rows, size, value[number])
            patched = logits(any_tiny, rows.ids)[0, -1]
        for said, expected in ((found.plain, plain), (answers, patched)):
            right, wrong = rows.answers[0]
            torch.testing.assert_close(said.difference[number], expected[right] - expected[wrong], atol=1e-4, rtol=1e-4)
            assert int(said.token[number]) == int(expected.argmax())
        assert (plain - patched).abs().max() > 1e-2


def test_own_activations_change_nothing(tiny_llama: LanguageModel) -> None:
    prompts, places = IOI.prompts(5), locations_of(tiny_llama)
    found = PatchedPrompts(tiny_llama, IOI, prompts, places)
    read = activations_of(tiny_llama, IOI, prompts, places, batch_size=2)
    for place, x in found.activations.items():
        torch.testing.assert_close(read[place], x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.answers(read).difference, found.plain.difference, atol=1e-4, rtol=1e-4)


def test_the_activation_itself_is_sufficient_and_the_mean_is_not(built: LanguageModel) -> None:
    """At the heads that were built, without which there is no answer."""
    ioi = few_names(tokenizer=built.tokenizer)
    places = (head_location(built, "attn_z", 0, 1, "END"), head_location(built, "attn_z", 1, 2, "END"))
    found = PatchedPrompts(built, ioi, ioi.prompts(24), places)
    x = found.activations
    means = {place: value.mean(0) for place, value in x.items()}
    identity = approximation(found, means, x)
    for value in (identity.sufficiency, identity.normalised_sufficiency, identity.necessity):
        assert value is not None
        assert value.estimate == pytest.approx(1, abs=1e-3)
    nothing = approximation(found, means, {place: means[place].expand_as(value) for place, value in x.items()})
    for value in (nothing.normalised_sufficiency, nothing.necessity, nothing.normalised_necessity):
        assert value is not None
        assert value.estimate == pytest.approx(0, abs=1e-3)
    assert nothing.clean.estimate == pytest.approx(float(found.plain.difference.mean()), abs=1e-5)


def test_a_cross_section_that_is_not_needed_has_no_normalised_shares(built: LanguageModel) -> None:
    """Head 1.0 of the model that was built gives nothing, so that its mean changes no answer."""
    ioi = few_names(tokenizer=built.tokenizer)
    found = PatchedPrompts(built, ioi, ioi.prompts(8), (head_location(built, "attn_z", 1, 0, "END"),))
    means = {place: value.mean(0) for place, value in found.activations.items()}
    said = approximation(found, means, found.activations)
    assert said.sufficiency.estimate == pytest.approx(1)
    assert (said.normalised_sufficiency, said.necessity, said.normalised_necessity) == (None, None, None)


def test_a_supervised_edit_gives_the_counterfactual_where_activations_add_up() -> None:
    prompts = IOI.prompts(40)
    changed = [IOI.draw_counterfactual(prompt, "IO") for prompt in prompts]
    factors = Factors.of([*prompts, *changed])
    vectors = torch.randn(len(factors.names), 6, generator=torch.Generator().manual_seed(0))
    old, new = factors.rows(prompts), factors.rows(changed)
    codes = Codes(torch.ones(6), vectors)
    edited = edit_supervised(codes.reconstruct(old), codes, old, new)
    torch.testing.assert_close(edited.x, codes.reconstruct(new))
    torch.testing.assert_close(edit_supervised(edited.x, codes, new, new).x, edited.x)
    assert not edit_supervised(edited.x, codes, new, new).removed.any()


def test_removed_weights_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(1)
    f, rows = torch.rand(7, 9, generator=generator), torch.randn(9, 4, generator=generator)
    torch.testing.assert_close(weights(f, rows).sum(1), torch.ones(7))
    whole = f @ rows
    expected = (f[2, 5] * rows[5]) @ whole[2] / (whole[2] @ whole[2])
    torch.testing.assert_close(weights(f, rows)[2, 5], expected)


def small_dictionary(seed: int = 0) -> Standard:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Standard(draw(5, 9), draw(9) / 2, draw(9, 5), draw(5), info=DictionaryInfo(architecture="standard"))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_exhaustive_search(k: int, seed: int) -> None:
    dictionary, generator = small_dictionary(seed), torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, 12, 5, generator=generator)
    found = edit_greedy(dictionary, x, target, k)
    change = dictionary.encode(target) - dictionary.encode(x)
    for prompt in range(12):
        ways = [chosen for size in range(k + 1) for chosen in itertools.combinations(range(9), size)]
        results = [
            x[prompt] + sum((change[prompt, i] * dictionary.W_dec[i] for i in way), torch.zeros(5)) for way in ways
        ]
        best = min(float((result - target[prompt]).norm()) for result in results)
        assert float((found.x[prompt] - target[prompt]).norm()) == pytest.approx(best, abs=1e-4)


def test_one_after_the_other_is_worse_than_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the search by pairs is for: without it some prompts end further away."""
    dictionary, generator = small_dictionary(), torch.Generator().manual_seed(5)
    x, target = torch.randn(2, 200, 5, generator=generator)
    exact = (edit_greedy(dictionary, x, target, 2).x - target).norm(dim=1)
    monkeypatch.setattr(control, "_best_pairs", lambda _change, _rows, _gain, single: single)
    assert ((edit_greedy(dictionary, x, target, 2).x - target).norm(dim=1) > exact + 1e-3).any()


def test_more_features_come_nearer() -> None:
    dictionary, generator = small_dictionary(), torch.Generator().manual_seed(3)
    x, target = torch.randn(2, 20, 5, generator=generator)
    distance = [float((edit_greedy(dictionary, x, target, k).x - target).norm(dim=1).mean()) for k in (1, 2, 4, 9)]
    assert distance == sorted(distance, reverse=True)
    assert torch.equal(edit_greedy(dictionary, x, x, 4).x, x)
    several = edits_greedy(dictionary, x, target, (1, 2, 4, 9))
    for k, rows in several.items():
        alone = edit_greedy(dictionary, x, target, k)
        assert torch.equal(rows.x, alone.x)
        assert torch.equal(rows.removed, alone.removed)
    with pytest.raises(UserError, match="k = 0: at least one feature must be changed"):
        edit_greedy(dictionary, x, target, 0)


def test_an_edit_by_meaning_takes_out_what_says_the_old_value_and_puts_in_what_says_the_new() -> None:
    """Axes as features, so that codes are coordinates."""
    eye = torch.eye(4)
    dictionary = Standard(eye, torch.zeros(4), eye, torch.zeros(4), info=DictionaryInfo(architecture="standard"))
    x, target = torch.tensor([[3.0, 1.0, 0.0, 2.0]]), torch.tensor([[0.0, 1.0, 5.0, 2.0]])
    old, new = torch.tensor([[0.9, 0.1, 1.0, 0.2]]), torch.tensor([[1.0, 0.3, 0.8, 0.2]])
    one = edit_by_meaning(dictionary, x, target, old, new, 1)
    assert one.x.tolist() == [[0.0, 1.0, 5.0, 2.0]]  # feature 2 says the old value best, but is not active there
    assert float(one.removed) == pytest.approx(9 / 14)
    two = edit_by_meaning(dictionary, x, target, old, new, 2)
    assert two.x.tolist() == [[0.0, 2.0, 5.0, 0.0]]
    assert float(edit_by_meaning(dictionary, x, target, old, new, 99).removed) == pytest.approx(1)


def test_success_is_counted_where_the_true_patch_changes_the_answer() -> None:
    """Fifteen prompts; the true patch changes the first twelve, the edit does what it does on the first nine."""
    nothing, first = torch.zeros(15), torch.arange(15)
    plain, patched, edited = (
        Answers(difference, token, nothing)
        for difference, token in (
            (first + 4.0, torch.ones(15)),
            (first + 0.0, torch.where(first < 12, 2, 1)),
            (first + 1.0, torch.where(first < 9, 2, 7)),
        )
    )
    ones = torch.ones(15, 3)
    place = Location(Site("attn_z", 0, 0), "END")

    def success(patched: Answers, edited: Answers, x: Tensor, removed: Tensor) -> EditSuccess:
        prompts = SimpleNamespace(plain=plain, activations={place: ones}, answers=lambda _values: edited)
        return edit_success(prompts, patched, {place: EditedRows(x, removed)})  # type: ignore[arg-type]

    found = success(patched, edited, ones + (first / 7)[:, None], first / 14)
    assert found.success is not None
    assert (found.success.estimate, found.counted) == (pytest.approx(9 / 12), 12)
    assert found.agreement.estimate == pytest.approx(9 / 15)
    assert (found.removed.estimate, found.size.estimate) == (pytest.approx(0.5), pytest.approx(1))
    assert found.effect is not None
    assert found.effect.estimate == pytest.approx(3 / 4)
    none = success(patched, plain, ones, nothing)
    assert none.effect is not None
    assert none.effect.estimate == 0
    assert success(plain, edited, ones, nothing).effect is None  # a patch that moves nothing has no effect to share
    assert none.success is not None
    assert (none.success.estimate, none.agreement.estimate) == (0, pytest.approx(3 / 15))
    few = success(plain._replace(token=torch.where(first < 9, 2, 1)), edited, ones, nothing)
    assert (few.success, few.counted) == (None, 9)


def test_the_frontier_holds_what_nothing_cheaper_is_as_good_as() -> None:
    points = [
        Point(0, 0.5, 0.5),
        Point(1, 0.2, 0.6),
        Point(2, 0.9, 0.9),
        Point(3, 0.2, 0.1),
        Point(4, 1, 0.9),
    ]
    assert [point.number for point in frontier(points)] == [1, 2]
    assert frontier([]) == []


def test_loss_recovered_is_1_for_the_activation_and_0_for_the_mean(built: LanguageModel) -> None:
    """Location by location, beside the loss of whole passes; a head that gives nothing has none."""
    ioi = few_names(tokenizer=built.tokenizer)
    mover, idle = head_location(built, "attn_z", 1, 2, "END"), head_location(built, "attn_z", 1, 0, "END")
    found = PatchedPrompts(built, ioi, ioi.prompts(24), (mover, idle))
    for number, prompt in enumerate(ioi.prompts(24)):
        (rows,) = rows_of([ioi.tokenise(prompt)], built)
        expected = -logits(built, rows.ids)[0, -1].log_softmax(-1)[rows.answers[0, 0]]
        assert float(found.plain.loss[number]) == pytest.approx(float(expected), abs=1e-4)
    means = {place: value.mean(0).expand_as(value) for place, value in found.activations.items()}
    half = {place: (means[place] + value) / 2 for place, value in found.activations.items()}
    at_mean = {place: found.answers({place: value}) for place, value in means.items()}
    whole, part = (loss_recovered(found, x, at_mean) for x in (found.activations, half))
    assert whole[str(mover)].estimate == pytest.approx(1)  # type: ignore[union-attr]
    assert 0 < part[str(mover)].estimate < 1  # type: ignore[union-attr]
    assert whole[str(idle)] is None


def test_cross_sections_of_a_circuit(tiny_llama: LanguageModel) -> None:
    heads = [("name mover", 3, 0), ("name mover", 3, 1), ("S-inhibition", 2, 3), ("induction", 1, 2)]
    circuit = Circuit(
        model="tiny", fingerprint="", heads=tuple(CircuitHead(role=r, layer=layer, head=h) for r, layer, h in heads)
    )
    assert [str(place) for place in cross_section("name-mover queries and keys", circuit, tiny_llama)] == [
        "attn_q.3.0 at END", "attn_q.3.1 at END", "attn_k.3.0 at IO", "attn_k.3.0 at S1",
    ]  # fmt: skip
    assert cross_section("S-inhibition values", circuit, tiny_llama) == (Location(Site("attn_v", 2, 1), "S2"),)
    assert cross_section("induction and duplicate-token outputs", circuit, tiny_llama)[0].site == Site("attn_z", 1, 2)
    with pytest.raises(UserError, match="cross-section 'values': there are name-mover outputs, direct outputs"):
        cross_section("values", circuit, tiny_llama)
    with pytest.raises(UserError, match="the circuit has no head of role induction or duplicate token"):
        cross_section(
            "induction and duplicate-token outputs",
            Circuit(model="", fingerprint="", heads=circuit.heads[:3]),
            tiny_llama,
        )

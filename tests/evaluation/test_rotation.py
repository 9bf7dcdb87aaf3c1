"""Subspaces for interchanges: true patching with all directions, axes that are known, gradients by differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from circuit_prompts import few_names
from torch import Tensor

from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.supervised.cross_sections import PatchedPrompts, activations_of
from trimtab.evaluation.supervised.rotation import (
    Rotation,
    difference_rotation,
    learn_rotation,
    random_rotation,
)
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture, edited
from trimtab.tasks.ioi_prompts import ATTRIBUTES, IOIDistribution

IOI = few_names()


def locations_of(model: LanguageModel) -> tuple[Location, ...]:
    """Of several kinds and layers."""
    return (
        head_location(model, "attn_z", 2, 1, "S2"), head_location(model, "attn_v", 2, 3, "S2"),
        head_location(model, "attn_k", 3, 0, "IO"), head_location(model, "attn_z", 3, 2, "END"),
    )  # fmt: skip


def patched(
    model: LanguageModel, places: Sequence[Location], ioi: IOIDistribution = IOI, n: int = 12
) -> tuple[PatchedPrompts, dict[str, dict[Location, Tensor]], dict[Location, Tensor]]:
    prompts = PatchedPrompts(model, ioi, ioi.prompts(n), places, batch_size=8)
    changed = {
        a: activations_of(model, ioi, [ioi.draw_counterfactual(p, a) for p in prompts.prompts], places)
        for a in ATTRIBUTES
    }
    return prompts, changed, {place: x.mean(0) for place, x in prompts.activations.items()}


@torch.no_grad()
def divergence(
    prompts: PatchedPrompts, changed: dict[str, dict[Location, Tensor]], rotation: Rotation
) -> dict[str, Tensor]:
    """Per attribute KL(counterfactual patching ‖ interchange) of next-token distributions, in nats, by prompt."""
    found: dict[str, Tensor] = {}
    for attribute, true in changed.items():
        edits = {p: rotation.edit(p, x, true[p], attribute).x for p, x in prompts.activations.items()}
        both = [
            torch.cat([prompts.logits(batch, values) for batch in range(len(prompts.batches))]).log_softmax(-1)
            for values in (true, edits)
        ]
        found[attribute] = (both[0].exp() * (both[0] - both[1])).sum(-1)
    return found


def test_with_all_directions_it_is_true_patching(any_tiny: LanguageModel) -> None:
    prompts, changed, means = patched(any_tiny, locations_of(any_tiny))
    width = len(next(iter(means.values())))
    whole = Rotation(means, {p: torch.eye(width) for p in means}, {p: ("IO",) * width for p in means})
    less = whole._replace(owners={place: ("IO",) * (width - 1) + ("S",) for place in means})
    true = prompts.answers(changed["IO"])
    for rotation, equal in ((whole, True), (less, False)):
        edits = {p: rotation.edit(p, x, changed["IO"][p], "IO") for p, x in prompts.activations.items()}
        found = prompts.answers({place: edit.x for place, edit in edits.items()})
        assert torch.allclose(found.difference, true.difference, atol=1e-4) == equal
    assert divergence(prompts, {"IO": changed["IO"]}, whole)["IO"].max() < 1e-5
    assert not torch.allclose(prompts.plain.difference, true.difference, atol=1e-3)


def test_training_lowers_the_divergence(any_tiny: LanguageModel) -> None:
    """Bases stay orthonormal; the same seed gives the same; nothing of the model has changed."""
    prompts, changed, means = patched(any_tiny, locations_of(any_tiny))
    weights = any_tiny.fingerprint
    done: list[int] = []
    learned = learn_rotation(prompts, changed, means, rank=1, steps=60, lr=0.05, progress=done.append)
    assert len(done) == len(learned.losses) == 60
    assert len(prompts.batches) == 2
    before, after = (
        sum(float(one.sum()) for one in divergence(prompts, changed, rotation).values())
        for rotation in (learned.start, learned.rotation)
    )
    assert after < 0.95 * before
    for place, basis in learned.rotation.bases.items():
        torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
        assert not basis.requires_grad
        assert basis.shape == learned.start.bases[place].shape
    with torch.no_grad():  # wherever it is called
        again = learn_rotation(prompts, changed, means, rank=1, steps=60, lr=0.05)
    other = learn_rotation(prompts, changed, means, rank=1, steps=60, lr=0.05, seed=1)
    assert again.losses == learned.losses
    assert other.losses != learned.losses
    assert any_tiny.fingerprint == weights
    assert all(p.grad is None and not p.requires_grad for p in any_tiny.hf.parameters())
    assert learn_rotation(prompts, changed, means, rank=1, steps=0).losses == ()


def test_gradients_are_those_of_differences(any_tiny: LanguageModel) -> None:
    """Of a logit behind a patch, by every location's values; none where nobody asks for them."""
    prompts, changed, _ = patched(any_tiny, locations_of(any_tiny), n=3)
    values = {place: x.clone().requires_grad_() for place, x in changed["IO"].items()}
    generator = torch.Generator().manual_seed(0)
    towards = torch.randn(any_tiny.vocab_size, generator=generator)

    def said(of: dict[Location, Tensor]) -> Tensor:
        return torch.stack([(prompts.logits(b, of) @ towards).sum() for b in range(len(prompts.batches))]).sum()

    said(values).backward()
    for place, value in values.items():
        assert value.grad is not None
        step = torch.randn(value.shape, generator=generator)
        with torch.no_grad():
            ends = [said({**changed["IO"], place: value + sign * 3e-3 * step}) for sign in (1, -1)]
        expected = float(ends[0] - ends[1]) / 6e-3
        assert float((value.grad * step).sum()) == pytest.approx(expected, rel=0.02, abs=0.02)
    assert not prompts.answers(values).difference.requires_grad
    for batch, numbers in enumerate(prompts.batches):
        with torch.no_grad():
            plain = prompts.logits(batch, values)
        torch.testing.assert_close(prompts.logits(batch, values).detach(), plain)
        torch.testing.assert_close(plain.argmax(-1).cpu(), prompts.answers(values).token[numbers])


def test_capture_lets_gradients_through_only_if_asked(tiny_llama: LanguageModel) -> None:
    value, last, place = torch.ones(1, 32, requires_grad=True), Site("resid_post", 3), torch.zeros(1, dtype=torch.long)
    with edited(tiny_llama, {Site("resid_post", 1): lambda _x: RowDelta(place, place, value)}):
        batch = TokenBatch.full(torch.tensor([[5, 6]]))
        assert not capture(tiny_llama, batch, [last])[last].requires_grad
        assert capture(tiny_llama, batch, [last], gradients=True)[last].requires_grad
        with torch.no_grad():
            assert not capture(tiny_llama, batch, [last], gradients=True)[last].requires_grad


def sines(found: Tensor, axes: Tensor) -> Tensor:
    """Sines of the principal angles between a subspace and that of some axes."""
    return (found - axes @ axes.T @ found).svd().S


def test_planted_axes_are_found() -> None:
    """IO shifts two axes, S two others and one of IO's, Pos one; each gets its own, the strongest first."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    place: Any = "place"
    x = torch.randn(200, 16, generator=generator)
    shifts = {"IO": {0: 3.0, 1: 2.0}, "S": {2: 4.0, 3: 2.5, 0: 0.5}, "Pos": {4: 1.0}}
    changed = {
        attribute: {place: x + sum(
            size * torch.randn(200, 1, generator=generator) * axes[:, axis] for axis, size in along.items()
        )}
        for attribute, along in shifts.items()
    }  # fmt: skip
    found = difference_rotation({place: x.mean(0)}, {place: x}, changed, rank=2)
    assert sines(axes[:, :2], found.block(place, "IO")).max() < 0.02
    assert sines(axes[:, 2:4], found.block(place, "S")).max() < 0.15  # a little of IO's axis, as planted
    assert sines(axes[:, 4:5], found.block(place, "Pos")).max() < 0.02
    assert found.owners[place][:5] == ("S", "IO", "S", "IO", "Pos")
    assert sines(axes[:, :2], random_rotation(found).block(place, "IO")).max() > 0.5
    few = difference_rotation({place: x.mean(0)}, {place: x}, changed, rank=1)
    assert few.owners[place] == ("S", "IO", "Pos")  # one each at least


def test_directions_go_to_who_needs_them() -> None:
    """Ten of IO, two of S and one of Pos, of unlike strengths; then what is left."""
    generator = torch.Generator().manual_seed(0)
    x, place = torch.randn(300, 16, generator=generator), "place"
    sizes = {"IO": [9.0 - 0.5 * i for i in range(10)], "S": [6.3, 5.2], "Pos": [0.5]}
    changed: dict[str, Any] = {}
    start = 0
    for attribute, own in sizes.items():
        delta = torch.zeros(300, 16)
        delta[:, start : start + len(own)] = torch.randn(300, len(own), generator=generator) * torch.tensor(own)
        changed[attribute], start = {place: x + delta}, start + len(own)
    found = difference_rotation({place: x.mean(0)}, {place: x}, changed, rank=4)  # type: ignore[arg-type, dict-item]
    assert [found.owners[place].count(attribute) for attribute in ATTRIBUTES] == [9, 2, 1]  # type: ignore[index]
    assert sines(found.block(place, "IO"), torch.eye(16)[:, :10]).max() < 0.02  # type: ignore[arg-type]


def test_the_names_axes_of_the_model_built_by_hand(ioi: IOIDistribution, built: LanguageModel) -> None:
    """The mover's output has a coordinate for each name, and holds IO alone."""
    place = head_location(built, "attn_z", 1, 2, "END")
    prompts, changed, means = patched(built, [place], ioi, n=60)
    learned = learn_rotation(prompts, changed, means, rank=3, steps=30)
    names = torch.eye(16)[:, :10]
    assert sines(learned.start.block(place, "IO"), names).max() < 0.02
    trained = sines(learned.rotation.block(place, "IO"), names)
    assert trained.max() < 0.35
    before, after = (
        divergence(prompts, changed, rotation)["IO"].mean() for rotation in (learned.start, learned.rotation)
    )
    assert after < before
    assert divergence(prompts, changed, random_rotation(learned.start))["IO"].mean() > 2 * before


def test_weights_sum_to_one_and_what_is_rebuilt(tiny_llama: LanguageModel) -> None:
    prompts, changed, means = patched(tiny_llama, locations_of(tiny_llama))
    rotation = difference_rotation(means, prompts.activations, changed, rank=2)
    for place, x in prompts.activations.items():
        edits = {a: rotation.edit(place, x, changed[a][place], a) for a in ATTRIBUTES}
        torch.testing.assert_close(torch.stack([edit.removed for edit in edits.values()]).sum(0), torch.ones(len(x)))
        rebuilt = rotation.reconstruct(place, x)
        parts = sum((x - means[place]) @ rotation.block(place, a) @ rotation.block(place, a).T for a in ATTRIBUTES)
        torch.testing.assert_close(rebuilt, means[place] + parts, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rotation.reconstruct(place, rebuilt), rebuilt, atol=1e-5, rtol=1e-5)
        block = rotation.block(place, "S")
        torch.testing.assert_close(edits["S"].x @ block, changed["S"][place] @ block, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(edits["S"].x - edits["S"].x @ block @ block.T, x - x @ block @ block.T)


def test_random_subspaces_are_orthonormal_and_differ(tiny_llama: LanguageModel) -> None:
    prompts, changed, means = patched(tiny_llama, locations_of(tiny_llama))
    like = difference_rotation(means, prompts.activations, changed, rank=2)
    first, second = random_rotation(like), random_rotation(like, seed=1)
    assert first.owners == like.owners
    bases = list(first.bases.values())
    for basis in bases:
        torch.testing.assert_close(basis.T @ basis, torch.eye(6), atol=1e-6, rtol=0)
    assert not torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], next(iter(second.bases.values())))
    assert all(torch.equal(a, b) for a, b in zip(bases, random_rotation(like).bases.values(), strict=True))


def test_what_is_refused(tiny_llama: LanguageModel) -> None:
    prompts, changed, means = patched(tiny_llama, locations_of(tiny_llama), n=4)
    with pytest.raises(
        UserError, match=r"rank 3: 3 times as many directions must fit into width 8 at attn_z.2.1 at S2"
    ):
        learn_rotation(prompts, changed, means, rank=3)
    with pytest.raises(UserError, match=r"rank 0: .* at attn_z.2.1 at S2; choose 1 to 2"):
        difference_rotation(means, prompts.activations, changed, 0)
    with pytest.raises(UserError, match="attribute S: there are no counterfactuals in it; give some for IO, S and Pos"):
        learn_rotation(prompts, {"IO": changed["IO"]}, means, rank=1)
    with pytest.raises(UserError, match="steps must be at least 0 and lr above 0"):
        learn_rotation(prompts, changed, means, rank=1, lr=0)
    with pytest.raises(UserError, match="attribute 'gender': the rotation has subspaces of IO, S, Pos"):
        difference_rotation(means, prompts.activations, changed, 1).block(prompts.locations[0], "gender")

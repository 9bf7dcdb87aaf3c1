"""Ground-truth metrics on dictionaries whose scores can be worked out by hand."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.activations import LabelledRows, PlantedFeatures
from trimtab.dictionaries import Standard
from trimtab.dictionaries.sparse import ActivePairs
from trimtab.evaluation.ground_truth_absorption import Absorption, AbsorptionAccumulator
from trimtab.evaluation.ground_truth_metrics import FiringAccumulator, match_features, recovery
from trimtab.evaluation.ground_truth_scores import BLOCK_ROWS, GroundTruthScores, score

M, D, ROWS = 6, 8, 3_000
PARENT = np.array([-1, -1, -1, -1, 0, 0])
"""Features 4 and 5 are children of 0."""


def true_directions() -> Tensor:
    return torch.eye(D)[:M]


def true_codes(seed: int = 0) -> Tensor:
    """Every feature fires on a third of the rows; 4 and 5 only with 0, never both."""
    draw = torch.Generator().manual_seed(seed)
    fires = torch.rand(ROWS, M, generator=draw) < 1 / 3
    chosen = torch.rand(ROWS, generator=draw)
    fires[:, 4] = fires[:, 0] & (chosen < 0.4)
    fires[:, 5] = fires[:, 0] & (chosen > 0.6)
    return fires * (0.5 + torch.rand(ROWS, M, generator=draw))


def planted(directions: Tensor) -> PlantedFeatures:
    nothing = np.zeros(M)
    return PlantedFeatures(directions, nothing, nothing, nothing, PARENT, nothing, torch.zeros(D), 0.0)


def labelled(a: Tensor, directions: Tensor) -> LabelledRows:
    row, feature = a.nonzero(as_tuple=True)
    start = torch.searchsorted(row, torch.arange(len(a) + 1))
    return LabelledRows(a @ directions, ActivePairs(a[row, feature], feature, start), M)


def scores(learned: Tensor, f: Tensor, a: Tensor | None = None) -> GroundTruthScores:
    """Of unit or other decoder rows with given codes; the truth is the first unit vectors."""
    a = true_codes() if a is None else a
    dictionary = Standard(learned.T.contiguous(), torch.zeros(len(learned)), learned, torch.zeros(D))
    blocks = iter([*f.split(BLOCK_ROWS), *f.split(BLOCK_ROWS)])
    return score(
        dictionary,
        labelled(a, true_directions()),
        planted(true_directions()),
        threshold=0.8,
        codes=lambda block: next(blocks),
    )


def test_the_truth_scores_one():
    found = scores(true_directions(), true_codes())
    for name in (
        "f1",
        "precision",
        "recall",
        "recovered",
        "true_to_learned",
        "learned_to_true",
        "matched_cosine",
        "magnitude_correlation",
        "magnitude_ratio",
        "splitting",
        "explained_variance",
    ):
        assert getattr(found, name) == pytest.approx(1, abs=1e-6), name
    for name in ("absorption", "missed_with_child", "missed_alone", "dead_share"):
        assert getattr(found, name) == 0, name
    assert found.l0 == pytest.approx(float((true_codes() > 0).sum(1).float().mean()))


def test_order_and_norms_of_rows_do_not_matter():
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    norms = torch.tensor([2.0, 0.5, 1, 3, 1, 0.1])
    found = scores(true_directions()[order] * norms[:, None], true_codes()[:, order] / norms)
    truth = scores(true_directions(), true_codes())
    assert found == pytest.approx(truth, abs=1e-5)


def test_every_feature_split_in_two_gives_two():
    a = true_codes()
    first = torch.rand(ROWS, M, generator=torch.Generator().manual_seed(1)) < 0.5
    found = scores(true_directions().repeat(2, 1), torch.cat([a * first, a * ~first], dim=1))
    assert found.splitting == 2
    assert found.recovered == 1
    assert found.precision == 1
    assert found.recall == pytest.approx(0.5, abs=0.05)


def test_one_of_six_split_in_three():
    a = true_codes()
    learned = torch.cat([true_directions(), true_directions()[2:3].repeat(2, 1)])
    assert scores(learned, torch.cat([a, a[:, 2:3], a[:, 2:3]], dim=1)).splitting == pytest.approx(8 / 6)


def test_a_feature_that_never_fires_has_recovered_nothing():
    f = true_codes()
    f[:, 3] = 0
    found = scores(true_directions(), f)
    assert found.recovered == pytest.approx(5 / 6)
    assert found.dead_share == pytest.approx(1 / 6)
    assert found.f1 == pytest.approx(5 / 6)
    assert found.magnitude_ratio == pytest.approx(1)


def absorbing(share: float) -> tuple[Tensor, Tensor, Tensor]:
    """A dictionary in which child 4's latent also stands for the parent, on a share of the rows where both fire."""
    a = true_codes()
    learned, f = true_directions().clone(), a.clone()
    learned[4] = torch.nn.functional.normalize(torch.eye(D)[4] + torch.eye(D)[0], dim=0)
    both = (a[:, 4] > 0).nonzero()[:, 0]
    taken = both[: round(share * len(both))]
    f[taken, 0] = 0
    f[taken, 4] = a[taken, 4] * math.sqrt(2)
    return learned, f, a


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_absorption_is_the_share_of_rows_that_a_child_has_taken_over(share: float):
    learned, f, a = absorbing(share)
    both = (a[:, 4] > 0).nonzero()[:, 0]
    taken = both[: round(share * len(both))]
    # the child's latent weighs child and parent alike: it carries a_4 of the parent's a_0
    expected = float((a[taken, 4] >= 0.5 * a[taken, 0]).sum()) / len(both)
    found = scores(learned, f, a)
    assert found.absorption == pytest.approx(expected / 2, abs=1e-6)  # the other child absorbs nothing
    assert found.missed_with_child == pytest.approx(len(taken) / len(both) / 2, abs=1e-6)
    assert found.missed_alone == 0
    shrunk = scores(learned, f / 4, a)
    assert shrunk.absorption == found.absorption
    assert shrunk.magnitude_ratio == pytest.approx(found.magnitude_ratio / 4)


def test_a_silent_parent_is_not_absorbed_by_a_child_that_points_elsewhere():
    a = true_codes()
    f = a.clone()
    f[a[:, 4] > 0, 0] = 0
    found = scores(true_directions(), f, a)
    assert found.absorption == 0
    assert found.missed_with_child == pytest.approx(0.5)


def test_a_parent_without_a_latent_of_its_own_is_absorbed_altogether():
    """Its children's latents stand for both; where it fires alone, nothing does."""
    a = true_codes()
    a[:, 4:] = (a[:, 4:] > 0) * a[:, :1]  # children as strong as their parent: their latents carry all of it
    learned = true_directions().clone()
    learned[4:] = torch.nn.functional.normalize(learned[4:] + learned[0], dim=1)
    f = a.clone()
    f[:, 4:] *= math.sqrt(2)
    f[:, 0] = 0
    found = scores(learned, f, a)
    assert found.absorption == 1
    assert found.missed_with_child == 1
    assert found.missed_alone == 1
    assert found.recovered == pytest.approx(3 / 6)


def absorption(learned: Tensor, true: Tensor, parent: list[int], f: Tensor, a: Tensor) -> Absorption:
    matching = match_features(learned, true)
    accumulator = AbsorptionAccumulator(learned, true, np.array(parent), matching, 0.8)
    accumulator.update(f, a)
    return accumulator.result()


def test_without_families_there_is_no_absorption():
    one = torch.ones(1, 1)
    assert all(math.isnan(value) for value in absorption(one, one, [-1], one, one))


def test_weight_of_the_parent_leaves_out_what_overlaps_by_nature():
    """A clean latent of a child whose true direction leans on its parent's carries nothing of the parent."""
    parent, child = torch.tensor([1.0, 0, 0]), torch.tensor([0.6, 0.8, 0])
    true = torch.stack([parent, child])
    f, a = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    assert absorption(true, true, [-1, 0], f, a).rate == 0
    mixed = torch.stack([parent, (child + parent) / (child + parent).norm()])
    assert absorption(mixed, true, [-1, 0], f, a).rate == 1
    assert absorption(mixed, true, [-1, 0], f, torch.tensor([[1.0, 0.4]])).rate == 0
    assert absorption(mixed, true, [-1, 0], 0 * f, a).rate == 0


def test_firing_scores_equal_a_count_by_hand():
    a = torch.tensor([[1.0], [2.0], [3.0], [0.0], [0.0], [0.0]])
    f = torch.tensor([[0.0], [1.0], [2.0], [5.0], [0.0], [0.0]])
    accumulator = FiringAccumulator(1)
    accumulator.update(f[:2], a[:2])
    accumulator.update(f[2:], a[2:])
    found = accumulator.result()
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    assert found.magnitude_correlation == pytest.approx(np.corrcoef([0, 1, 2], [1, 2, 3])[0, 1])
    assert found.magnitude_ratio == pytest.approx(3 / 5)


def test_matching_is_the_best_of_all_permutations():
    draw = torch.Generator().manual_seed(4)
    learned, true = (torch.nn.functional.normalize(torch.randn(n, 4, generator=draw), dim=1) for n in (6, 5))
    matching = match_features(learned, true)
    cosine = (true @ learned.T).numpy()
    best = max(sum(cosine[i, j] for i, j in enumerate(choice)) for choice in permutations(range(6), 5))
    assert matching.cosine.sum() == pytest.approx(best, rel=1e-6)
    assert len(set(matching.learned)) == 5
    few = match_features(learned[:3], true)
    assert (few.learned == -1).sum() == 2
    assert (few.cosine[few.learned == -1] == 0).all()


def test_recovery_of_known_angles():
    true = torch.eye(3)[:2]
    angle = math.radians(30)
    learned = torch.tensor([[math.cos(angle), 0, math.sin(angle)], [0, 0.6, 0.8]])
    found = recovery(learned, true, match_features(learned, true), 0.8)
    assert found.true_to_learned == pytest.approx((math.cos(angle) + 0.6) / 2)
    assert found.learned_to_true == pytest.approx((math.cos(angle) + 0.6) / 2)
    assert found.recovered == 0.5
    assert found.splitting == 1


def test_the_opposite_direction_is_not_the_feature():
    true, learned = torch.eye(3)[:2], torch.tensor([[-0.6, 0, 0.8], [0, 1, 0]])
    found = recovery(learned, true, match_features(learned, true), 0.5)
    assert (found.true_to_learned, found.learned_to_true, found.recovered, found.splitting) == (0.5, 0.5, 0.5, 1)


@pytest.mark.parametrize(
    "metric", ["f1", "true_to_learned", "recovered", "magnitude_correlation", "explained_variance"]
)
def test_scores_fall_as_the_dictionary_is_corrupted(metric: str):
    """Rows turned towards noise, and codes replaced by those of other rows."""
    a, draw = true_codes(), torch.Generator().manual_seed(5)
    noise = torch.nn.functional.normalize(torch.randn(M, D, generator=draw), dim=1)
    found = []
    for part in (0.0, 0.5, 1.0):
        learned = torch.nn.functional.normalize((1 - part) * true_directions() + part * noise, dim=1)
        wrong = torch.rand(ROWS, generator=draw) < part
        f = torch.where(wrong[:, None], a[torch.randperm(ROWS, generator=draw)], a)
        found.append(getattr(scores(learned, f, a), metric))
    assert found[0] > found[1] > found[2]


def test_nothing_fires():
    with pytest.raises(ValueError, match="no feature of the dictionary fired"):
        scores(true_directions(), torch.zeros(ROWS, M))

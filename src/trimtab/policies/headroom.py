"""Headroom: what an edit could gain, before any policy is trained.

Where the answer is one token, every feature is tried on every item, at the last prompt token, through the item's cached
prefix. Where it is longer, some features are tried, each held over the whole answer (`headroom_by_decoding`). The table
of rewards, items × features, gives the lines that a policy stands between:

- the ceiling: items that *some* allowed feature solves, beside the ceiling of as many random directions of equal norm,
  item by item (with thousands of tries something flips by chance);
- the best static feature: chosen on some items, scored on others;
- the most active feature of each item;
- a readout: a regression from the activation to the table, fitted on some items, that picks each other item's feature:
  the best that one step could learn from this state.

If the best static feature reaches the ceiling there is nothing to learn, and if nothing flips there is nothing to gain.
With some features tried, the ceiling is a lower bound on that over all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from trimtab.control.masks import FeatureMask
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeStart, LanguageModel, Site
from trimtab.policies.headroom_candidates import Candidates
from trimtab.selection.distribution import EditedDistributions
from trimtab.selection.scorer import LastTokenScorer
from trimtab.stats import Interval, best_of_some, bootstrap_mean
from trimtab.steering import coefficients

FOLDS = 5
RIDGE = tuple(10.0**k for k in range(-2, 5))
"""Penalties of the readout that are tried, as multiples of the mean eigenvalue."""


Scheme = Literal["last prompt token", "every answer token"]
"""Where the edit is: once, before a one-token answer, or wherever a token of the answer is chosen."""


class HeadroomTable(NamedTuple):
    """What an edit would earn, for P items and n features tried."""

    reward: Float[NDArray[np.float32], "P n"]
    """With each feature."""
    random: Float[NDArray[np.float32], "P r"]
    """With each of as many random directions of equal norm."""
    unsteered: Float[NDArray[np.float32], " P"]
    x: Float[NDArray[np.float32], "P d"]
    """Activations at the last prompt token, before the edit."""
    strength: Float[NDArray[np.float32], "P n"]
    """f_i(x)·‖W_dec[i]‖: how active each feature is."""
    allowed: Bool[NDArray[np.bool_], "P n"] | None
    """What the mask allows at the last prompt token."""
    candidates: Candidates | None = None
    """The columns, where not every feature was tried; None for all in order."""
    scheme: Scheme = "last prompt token"

    @property
    def open(self) -> Bool[NDArray[np.bool_], "P n"]:
        """What is allowed: everything, where no mask says otherwise."""
        return np.ones(self.reward.shape, dtype=bool) if self.allowed is None else self.allowed

    @property
    def random_counts(self) -> Int[NDArray[np.integer], " P"]:
        """Random directions that stand against each item's allowed features: as many, unless fewer were tried."""
        return np.minimum(self.open.sum(1), self.random.shape[1])

    def under(self, candidates: Candidates) -> HeadroomTable:
        """The same for some of the features that were tried, and as many random directions."""
        assert self.candidates is not None
        column = {feature: k for k, feature in enumerate(self.candidates.features)}
        columns = [column[feature] for feature in candidates.features]
        return self._replace(
            reward=self.reward[:, columns],
            random=self.random[:, : len(columns)],
            strength=self.strength[:, columns],
            allowed=None if self.allowed is None else self.allowed[:, columns],
            candidates=candidates,
        )


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """Mean rewards over items, with 95% intervals bootstrapped over items."""

    site: str
    dose: float
    unit: str
    mask: str
    items: int
    features: int
    """How many were tried."""
    of_features: int
    """How many the dictionary has."""
    candidates: str
    """How those tried were chosen: `all`, `top-confidence` or `random`."""
    scheme: Scheme
    allowed_per_item: float
    """How many of those tried the mask allows at the last prompt token, on average."""
    random_per_item: float
    """How many random directions stand against them, on average: as many, unless fewer were tried."""
    unsteered: Interval
    ceiling: Interval
    """The best allowed feature of each item among those tried, or no edit."""
    random_ceiling: Interval
    """The best of as many random directions as the mask allows features of the item, or no edit."""
    static: Interval
    """The best single feature, cross-fitted."""
    most_active: Interval
    """Each item's most active allowed feature."""
    readout: Interval
    """The feature that a cross-fitted regression from the activation picks, no edit among the choices."""
    flipped_by_static: Interval
    """Share of items whose reward the static feature changes at all."""

    @property
    def over_static(self) -> float:
        """What a policy could gain over the best static feature, at most and as far as features were tried."""
        return self.ceiling.estimate - max(self.static.estimate, self.unsteered.estimate)

    @property
    def ceiling_is_lower_bound(self) -> bool:
        """Whether a feature that was not tried may do better."""
        return self.features < self.of_features

    def warnings(self) -> tuple[str, ...]:
        """What speaks against training a policy here."""
        found = []
        if self.unsteered.estimate >= 1:
            found.append("no headroom: the unsteered model already gets every item right")
        elif self.ceiling.estimate <= self.unsteered.estimate:
            if self.ceiling_is_lower_bound:
                which = f"none of the {self.features:,} features tried, of {self.of_features:,},"
                found.append(f"no headroom seen: {which} makes any wrong item right at this dose")
            else:
                found.append("no headroom: no feature at this dose makes any wrong item right")
        elif self.over_static <= 0:
            seen = f" of the {self.features:,} features tried" if self.ceiling_is_lower_bound else ""
            found.append(f"nothing to learn: the best static feature reaches the ceiling{seen}")
        return tuple(found)


def headroom_table(
    model: LanguageModel,
    dictionary: Dictionary,
    prompts: TaskPrompts,
    *,
    site: Site | str,
    dose: float,
    unit: str = "relative",
    mask: FeatureMask | None = None,
    seed: int = 0,
    batch_size: int = 1024,
    progress: Callable[[float], None] | None = None,
) -> HeadroomTable:
    """Try every feature, and as many random directions, at every item's last prompt token.

    Args:
        model: the model.
        dictionary: whose features are tried.
        prompts: items of a task whose answer is the next token.
        site: where.
        dose: of each edit, in `unit`.
        unit: `relative`, `absolute` or `max_activation`. Random directions take the features' mean length.
        mask: what is allowed, for the report.
        seed: of the random directions.
        batch_size: edits that go through the layers together.
        progress: called with the part of an item that is done, whenever some edits of it are.

    Raises:
        UserError: the task's answers are longer than a token, or the model's layers cannot be called one by one.
    """
    if prompts.max_new_tokens != 1:
        raise UserError(
            f"headroom of {prompts.task.name}",
            f"its answers take up to {prompts.max_new_tokens} tokens, and only the next one can be scored in one step",
            "set max_new_tokens to 1 where the first token decides, or use headroom_by_decoding",
        )
    n, where = dictionary.n_features, model.site(site)
    noise = random_directions(dictionary, seed).to(model.device)
    features = torch.arange(n, device=model.device)
    stats = dictionary.feature_stats
    most = None if stats is None else torch.as_tensor(stats.max_activation, device=model.device)
    parts: dict[str, list[NDArray[np.float32]]] = {
        name: [] for name in ("reward", "random", "unsteered", "x", "strength")
    }

    def tell(edits: int) -> None:
        if progress is not None:
            progress(edits / (2 * n))

    for i, ids in enumerate(prompts.ids):
        scorer = LastTokenScorer(model, where, ids, batch_size=batch_size)
        x = scorer.continuation.x
        doses = torch.full((n, 1), dose, device=model.device)
        c = coefficients(unit, doses, x.expand(n, -1), None if most is None else most[:, None])[:, 0]
        judge = _TokenJudge(model, prompts, i)
        for name, rows, length in (
            ("reward", dictionary.directions, c),
            ("random", noise, c.abs().mean().expand(n)),
        ):
            chosen = scorer.score(rows, length, {"token": judge.choose}, progress=tell)["token"]
            parts[name].append(judge.rewards(chosen))
        base = judge.choose(EditedDistributions(scorer.base.logits[None], features[:1], scorer.base))
        parts["unsteered"].append(judge.rewards(base)[0])
        parts["x"].append(x.float().cpu().numpy())
        parts["strength"].append((dictionary.encode(x[None])[0] * dictionary.decoder_norms).cpu().numpy())
    found = {name: np.stack(values).astype(np.float32) for name, values in parts.items()}
    return HeadroomTable(
        reward=found["reward"],
        random=found["random"],
        unsteered=found["unsteered"],
        x=found["x"],
        strength=found["strength"],
        allowed=None if mask is None else allowed_at_first(model, prompts, mask, found["x"]),
    )


def random_directions(dictionary: Dictionary, seed: int) -> Float[Tensor, "n d"]:
    """As many unit directions as the dictionary has features, uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(dictionary.n_features, dictionary.d_in, generator=generator)
    return noise / noise.norm(dim=1, keepdim=True)


class _TokenJudge:
    """From next-token logits to the reward of the token that greedy decoding would choose."""

    def __init__(self, model: LanguageModel, prompts: TaskPrompts, item: int) -> None:
        self.model, self.prompts = model, prompts.take([item])
        allowed = self.prompts.allowed
        self._options = None if allowed is None else torch.tensor(sorted(allowed[0]), device=model.device)
        self._known: dict[int, float] = {}

    def choose(self, block: EditedDistributions) -> Tensor:
        if self._options is None:
            return block.logits.argmax(-1)
        return self._options[block.logits[:, self._options].argmax(-1)]

    def rewards(self, tokens: Tensor) -> NDArray[np.float32]:
        found = tokens.tolist()
        for token in set(found) - set(self._known):
            text = self.model.decode_ids([token])
            (outcome,) = self.prompts.task.score(self.prompts.items, [text], self.prompts.permutation)
            self._known[token] = outcome.reward
        return np.array([self._known[token] for token in found], dtype=np.float32)


def allowed_at_first(
    model: LanguageModel, prompts: TaskPrompts, mask: FeatureMask, x: NDArray[np.float32]
) -> Bool[NDArray[np.bool_], "P n"]:
    """What a mask allows at the first decision of each item."""
    rows = torch.arange(len(prompts), device=model.device)
    mask.start(DecodeStart([list(p) for p in prompts.ids], rows, 1, model.device))
    allowed = mask.allowed(torch.from_numpy(x).to(model.device), rows, torch.zeros_like(rows))
    return allowed.cpu().numpy()


def headroom(table: HeadroomTable, *, site: str, dose: float, unit: str, mask: str, seed: int = 0) -> Headroom:
    """The lines of a headroom table.

    Args:
        table: as `headroom_table` or `headroom_by_decoding` gives it.
        site, dose, unit, mask: what it was made with, for the report.
        seed: of folds and bootstrap.
    """
    items, n = table.reward.shape
    allowed, randoms = table.open, table.random_counts
    tried = np.maximum(np.where(allowed, table.reward, -np.inf).max(1), table.unsteered)
    random = table.unsteered + best_of_some(np.maximum(table.random - table.unsteered[:, None], 0), randoms)
    strength = np.where(allowed, table.strength, -1.0)
    active = strength.argmax(1)
    active_reward = np.where(strength.max(1) > 0, table.reward[np.arange(items), active], table.unsteered)
    static = cross_fit(items, lambda fit, test: _best_static(table, allowed, fit, test), seed)
    readout = cross_fit(items, lambda fit, test: _readout(table, allowed, fit, test), seed)

    def mean(values: NDArray[np.floating]) -> Interval:
        return bootstrap_mean(np.asarray(values, dtype=np.float64), seed=seed)

    return Headroom(
        site=site,
        dose=dose,
        unit=unit,
        mask=mask,
        items=items,
        features=n,
        of_features=n if table.candidates is None else table.candidates.of,
        candidates="all" if table.candidates is None else table.candidates.rule,
        scheme=table.scheme,
        allowed_per_item=float(allowed.sum(1).mean()),
        random_per_item=float(randoms.mean()),
        unsteered=mean(table.unsteered),
        ceiling=mean(tried),
        random_ceiling=mean(random),
        static=mean(static),
        most_active=mean(active_reward),
        readout=mean(readout),
        flipped_by_static=mean((static != table.unsteered).astype(float)),
    )


Fit = Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.float64]]


def cross_fit(items: int, reward: Fit, seed: int, folds: int = FOLDS) -> Float[NDArray[np.float64], " P"]:
    """Rewards of items, each chosen for by the items of the other folds.

    Args:
        items: how many.
        reward: from the indices of items that may be looked at, and of those to score, to the latter's rewards.
        seed: of the division into folds.
        folds: how many; every item is a fold of its own where there are fewer items.
    """
    order = np.random.default_rng([seed, 7]).permutation(items)
    found = np.zeros(items)
    for test in np.array_split(order, min(folds, items)):
        fit = np.setdiff1d(order, test)
        found[test] = reward(fit, test)
    return found


def _best_static(
    table: HeadroomTable, allowed: NDArray[np.bool_], fit: NDArray[np.intp], test: NDArray[np.intp]
) -> NDArray[np.float64]:
    """The feature with the largest mean reward; where the mask forbids it, nothing is edited."""
    earned = np.where(allowed, table.reward, table.unsteered[:, None])
    best = int(earned[fit].mean(0).argmax())
    return earned[test, best].astype(np.float64)


def _readout(
    table: HeadroomTable, allowed: NDArray[np.bool_], fit: NDArray[np.intp], test: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Ridge regression from activations to what each feature adds; the largest predicted gain is taken, if above 0.

    The penalty is chosen inside the fitted items, by the reward that the choice would have earned.
    """
    gain = np.where(allowed, table.reward - table.unsteered[:, None], 0.0).astype(np.float64)
    if len(fit) == 1:  # nothing to choose a penalty by
        return _picked(table, allowed, gain, fit, test, RIDGE[-1])
    inner = np.array_split(fit, min(4, len(fit)))
    earned = {
        ridge: sum(float(_picked(table, allowed, gain, np.setdiff1d(fit, part), part, ridge).sum()) for part in inner)
        for ridge in RIDGE
    }
    best = max(RIDGE, key=lambda ridge: (earned[ridge], ridge))
    return _picked(table, allowed, gain, fit, test, best)


def _picked(
    table: HeadroomTable,
    allowed: NDArray[np.bool_],
    gain: NDArray[np.float64],
    fit: NDArray[np.intp],
    test: NDArray[np.intp],
    ridge: float,
) -> NDArray[np.float64]:
    mean, scale = table.x[fit].mean(0), table.x[fit].std(0) + 1e-6
    a, b = ((table.x[part] - mean) / scale for part in (fit, test))
    kernel = a.astype(np.float64) @ a.T
    penalty = ridge * max(float(np.trace(kernel)) / len(fit), 1e-12)
    intercept = gain[fit].mean(0)
    weights = np.linalg.solve(kernel + penalty * np.eye(len(fit)), gain[fit] - intercept)
    predicted = b.astype(np.float64) @ a.T @ weights + intercept
    predicted = np.where(allowed[test], predicted, -np.inf)
    pick = predicted.argmax(1)
    chosen = table.reward[test, pick]
    return np.where(predicted.max(1) > 0, chosen, table.unsteered[test]).astype(np.float64)


def chosen_features(table: HeadroomTable, count: int = 10) -> Sequence[tuple[int, float]]:
    """The features with the largest mean reward, with it, best first."""
    mean = table.reward.mean(0)
    ids = range(len(mean)) if table.candidates is None else table.candidates.features
    return [(int(ids[k]), float(mean[k])) for k in np.argsort(-mean, kind="stable")[:count]]

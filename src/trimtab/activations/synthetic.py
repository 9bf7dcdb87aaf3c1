"""Activations whose features are known: sparse sums of more unit directions than there are dimensions.

x = offset + Σ_i a_i g_i + noise. Features fire with Zipf-like rates and gamma magnitudes; families of features form a
hierarchy (a child fires only with its parent, siblings exclude each other), and topics make features fire together.
The model is that of "Toy models of superposition" (Elhage et al. 2022) with the hierarchy of Chanin et al. 2024 (arXiv
2409.14507) and the Zipf-like rates of SynthSAEBench (arXiv 2602.14687).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from trimtab.activations.shards import Split
from trimtab.dictionaries.sparse import ActivePairs, decode_pairs
from trimtab.errors import UserError
from trimtab.runs import check_least, check_values

CHUNK_ROWS = 1024
"""Rows that are drawn together; row r is the same however rows are batched."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Which features there are and how they fire."""

    d: int = 128
    """Width of a row."""
    n_true: int = 256
    """Features; more than d superposes them."""
    true_l0: float = 5.0
    """Features that fire on a row, on average, children included."""
    zipf_exponent: float = 0.5
    """Features without a parent fire at rates ∝ rank^−exponent."""
    max_rate: float = 0.25
    """No feature without a parent fires on more than this share of the rows."""
    n_parents: int = 8
    """Features that have children; spread evenly over the more frequent half."""
    n_children: int = 4
    """Children of a parent: at most one of them fires, and only where the parent does."""
    child_share: float = 0.8
    """Share of a parent's firings that come with one of its children."""
    correlation: float = 0.0
    """From 0 (features without a parent fire independently) to 1 (each fires only where its topic is on)."""
    n_topics: int = 8
    """Topics among which features without a parent are spread."""
    topic_share: float = 0.3
    """Share of the rows on which a topic is on."""
    magnitude_spread: float = 0.3
    """Mean magnitudes of features are uniform in 1 ± this."""
    magnitude_cv: float = 0.3
    """Largest ratio of a magnitude's standard deviation to its mean; features' ratios are uniform from half of it."""
    noise: float = 0.01
    """Variance of the Gaussian noise, summed over coordinates, as a share of the features' summed variances."""
    offset: float = 1.0
    """Norm of the constant that is added to every row, in units of √(the features' summed variances)."""
    data_seed: int = 0
    """Of the features and of the rows."""

    @property
    def n_roots(self) -> int:
        """Features without a parent; they come first."""
        return self.n_true - self.n_parents * self.n_children

    def __post_init__(self) -> None:
        check_least(self, 1, "d", "n_true", "n_topics")
        check_least(self, 0, "n_parents", "n_children", "zipf_exponent", "noise", "offset", "data_seed")
        check_values(self, "from 0 to 1", lambda value: 0 <= value <= 1, "child_share", "correlation")
        check_values(self, "from 0 to below 1", lambda value: 0 <= value < 1, "magnitude_spread")
        check_values(
            self, "above 0 and below 1", lambda value: 0 < value < 1, "max_rate", "topic_share", "magnitude_cv"
        )
        if 2 * self.n_parents > self.n_roots:
            raise UserError(
                f"n_parents {self.n_parents} with {self.n_children} children each",
                f"of {self.n_true} features, {max(0, self.n_roots)} are left for parents and others",
                "lower them or raise n_true: parents are at most half of those without a parent",
            )
        expected = _root_rates(self, np.inf)[0]
        if not 0 < self.true_l0 < expected:
            raise UserError(
                f"true_l0 {self.true_l0}",
                f"with max_rate {self.max_rate} it must lie between 0 and {expected:.4g}",
                "change it, or raise max_rate or n_true",
            )
        on = 1 + self.correlation * (1 / self.topic_share - 1)
        if self.max_rate * on >= 1:
            raise UserError(
                f"correlation {self.correlation}",
                f"a feature of rate {self.max_rate} would have to fire on every row of its topic and more",
                "lower it or max_rate, or raise topic_share",
            )


class PlantedFeatures(NamedTuple):
    """What a synthetic source is made of; feature i is row i everywhere."""

    directions: Float[Tensor, "n d"]
    """Unit rows."""
    rate: Float[ndarray, " n"]
    """Probability that the feature fires on a row."""
    magnitude_mean: Float[ndarray, " n"]
    """Of the magnitude where it fires."""
    magnitude_sd: Float[ndarray, " n"]
    parent: ndarray
    """Index of the feature's parent, −1 for none."""
    topic: ndarray
    """Topic of the feature, −1 for children."""
    offset: Float[Tensor, " d"]
    noise_sd: float
    """Standard deviation of the noise in each coordinate."""


class LabelledRows(NamedTuple):
    """Rows, and what they are sums of."""

    x: Float[Tensor, "B d"]
    pairs: ActivePairs
    """The features that fire on each row, with their magnitudes."""
    n_true: int

    @property
    def codes(self) -> Float[Tensor, "B n"]:
        """Magnitudes of all features, 0 where they do not fire."""
        dense = self.x.new_zeros(len(self.x), self.n_true)
        dense[self.pairs.row, self.pairs.feature] = self.pairs.value
        return dense

    def blocks(self, rows: int) -> Iterator[LabelledRows]:
        """The same rows, so many at a time."""
        value, feature, start = self.pairs
        for first in range(0, len(self.x), rows):
            bounds = start[first : first + rows + 1]
            held = slice(int(bounds[0]), int(bounds[-1]))
            pairs = ActivePairs(value[held], feature[held], bounds - bounds[0])
            yield LabelledRows(self.x[first : first + rows], pairs, self.n_true)


def plant_features(config: SyntheticConfig) -> PlantedFeatures:
    """Draw the features that a config describes, always the same ones."""
    rng = np.random.default_rng([config.data_seed, _FEATURES])
    n, n_roots = config.n_true, config.n_roots
    directions = rng.standard_normal((n, config.d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mean = 1 + config.magnitude_spread * rng.uniform(-1, 1, n)
    sd = mean * config.magnitude_cv * rng.uniform(0.5, 1, n)
    parents = _parents(config)
    parent = np.full(n, -1)
    parent[n_roots:] = np.repeat(parents, config.n_children)
    topic = np.full(n, -1)
    topic[:n_roots] = rng.integers(config.n_topics, size=n_roots)
    rate = np.empty(n)
    rate[:n_roots] = _root_rates(config, config.true_l0)[1]
    rate[n_roots:] = rate[parent[n_roots:]] * config.child_share / max(config.n_children, 1)
    variance = float((rate * (mean**2 + sd**2) - (rate * mean) ** 2).sum())
    offset = rng.standard_normal(config.d)
    offset *= config.offset * variance**0.5 / np.linalg.norm(offset)
    return PlantedFeatures(
        torch.from_numpy(directions).float(),
        rate,
        mean,
        sd,
        parent,
        topic,
        torch.from_numpy(offset).float(),
        (config.noise * variance / config.d) ** 0.5,
    )


class SyntheticSource:
    """An `ActivationSource` of rows whose features are known.

    Any row is found from the seed and its place alone; there is no end to them, so that a second epoch brings new rows.

    Args:
        config: the features.
        rows_total: rows that count as one epoch.
        split: `train` or `holdout`: other rows of the same features.
    """

    def __init__(self, config: SyntheticConfig, *, rows_total: int = 1_000_000, split: Split = "train") -> None:
        self.config, self.rows_total = config, rows_total
        self.split: Split = split
        self.features = plant_features(config)
        if rows_total < 1:
            raise UserError(f"rows_total {rows_total}", "an epoch needs a row", "set it to 1 or more")

    @property
    def d(self) -> int:
        return self.config.d

    @property
    def description(self) -> dict[str, object]:
        """What the rows are of."""
        what = {"kind": "synthetic", "split": self.split, "rows": self.rows_total}
        return {**what, **dataclasses.asdict(self.config)}

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Float[Tensor, "B d"]]:
        """Batches `start_step`, `start_step + 1`, …, without end; the same ones whatever the start."""
        stream = _STREAMS[self.split]
        chunk, skip = divmod(start_step * batch_size, CHUNK_ROWS)
        waiting, held = [], -skip
        while True:
            while held < batch_size:
                waiting.append(self._chunk(stream, chunk).x)
                chunk, held = chunk + 1, held + CHUNK_ROWS
                if skip:
                    waiting[0], skip = waiting[0][skip:], 0
            rows = torch.cat(waiting)
            yield rows[:batch_size].clone()
            waiting, held = [rows[batch_size:]], held - batch_size

    def sample(self, n: int) -> Float[Tensor, "m d"]:
        """n rows, always the same ones; none that `batches` gives."""
        return self.labelled(n).x

    def labelled(self, n: int) -> LabelledRows:
        """The rows of `sample(n)`, with what they are sums of."""
        stream = _STREAMS[self.split] + 1
        chunks = [self._chunk(stream, chunk) for chunk in range(-(-n // CHUNK_ROWS))]
        start = np.cumsum([0, *(len(c.pairs.value) for c in chunks)])
        starts = [c.pairs.start[:-1] + int(s) for c, s in zip(chunks, start[:-1], strict=True)]
        ends = torch.cat([*starts, torch.tensor([int(start[-1])])])[: n + 1]
        values, features = (torch.cat([getattr(c.pairs, name) for c in chunks]) for name in ("value", "feature"))
        pairs = ActivePairs(values[: int(ends[-1])], features[: int(ends[-1])], ends)
        return LabelledRows(torch.cat([c.x for c in chunks])[:n], pairs, self.config.n_true)

    def _chunk(self, stream: int, chunk: int) -> LabelledRows:
        """`CHUNK_ROWS` rows, from the seed and the chunk's number alone."""
        rng = np.random.default_rng([self.config.data_seed, stream, chunk])
        planted, n = self.features, self.config.n_true
        key = self._firing(rng)
        row, feature = key // n, key % n
        mean, sd = planted.magnitude_mean[feature], planted.magnitude_sd[feature]
        value = rng.gamma((mean / sd) ** 2, sd**2 / mean).astype(np.float32)
        start = np.searchsorted(row, np.arange(CHUNK_ROWS + 1))
        pairs = ActivePairs(torch.from_numpy(value), torch.from_numpy(feature), torch.from_numpy(start))
        x = decode_pairs(pairs, planted.directions).add_(planted.offset)
        if planted.noise_sd:
            noise = rng.standard_normal((CHUNK_ROWS, self.d), dtype=np.float32)
            x.add_(torch.from_numpy(noise), alpha=planted.noise_sd)
        return LabelledRows(x, pairs, n)

    def _firing(self, rng: np.random.Generator) -> ndarray:
        """Sorted row · n + feature of everything that fires.

        A feature that fires where a Poisson process of intensity −log(1 − p) has a point fires with probability p,
        independently of all else, and only the points need to be drawn.
        """
        c, planted, n, n_roots = self.config, self.features, self.config.n_true, self.config.n_roots
        rate = planted.rate[:n_roots]
        on, off = (-np.log1p(-rate * (1 + c.correlation * by)) for by in (1 / c.topic_share - 1, -1))
        feature = np.repeat(np.arange(n_roots), rng.poisson(on * CHUNK_ROWS))
        row = rng.integers(CHUNK_ROWS, size=len(feature))
        if c.correlation:
            topics = rng.random((CHUNK_ROWS, c.n_topics)) < c.topic_share
            here = topics[row, planted.topic[feature]]
            kept = here | (rng.random(len(feature)) * on[feature] < off[feature])
            row, feature = row[kept], feature[kept]
        key = np.sort(row * n + feature)  # np.unique hashes, which takes five times as long
        key = key[np.diff(key, prepend=-1) > 0]
        if n_roots == n or not c.child_share:
            return key
        family = np.full(n_roots, -1)
        family[_parents(c)] = np.arange(c.n_parents)
        of_parent = key[family[key % n] >= 0]
        child = (rng.random(len(of_parent)) * c.n_children / c.child_share).astype(np.int64)
        kept = child < c.n_children
        born = n_roots + family[of_parent % n] * c.n_children + child
        return np.sort(np.concatenate([key, (of_parent // n * n + born)[kept]]))


_FEATURES = 1
_STREAMS: dict[Split, int] = {"train": 2, "holdout": 4}
"""Seeds of the parts of a source; the number after a split's is that of its sample."""


def _parents(config: SyntheticConfig) -> ndarray:
    return np.arange(config.n_parents) * (config.n_roots // 2) // max(config.n_parents, 1)


def _root_rates(config: SyntheticConfig, l0: float) -> tuple[float, ndarray]:
    """Rates of the features without a parent, such that all features together have this L0, and the L0 reached."""
    n_roots = config.n_roots
    zipf = np.arange(1, n_roots + 1.0) ** -config.zipf_exponent
    weight = np.ones(n_roots)
    weight[_parents(config)] += config.child_share * bool(config.n_children)

    def reached(scale: float) -> float:
        return float(weight @ np.minimum(config.max_rate, scale * zipf))

    low, high = 0.0, config.max_rate / zipf[-1]
    if l0 >= reached(high):
        return reached(high), np.full(n_roots, config.max_rate)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < l0 else (low, middle)
    return reached(high), np.minimum(config.max_rate, high * zipf)

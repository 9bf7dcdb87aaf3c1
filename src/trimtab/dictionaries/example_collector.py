"""Collects windows of text in which features fire, in one pass and in memory for features × windows.

Of each stretch (the part of a document that stands in one sequence) a feature gets at most one window of each kind.
Keys decide which are kept, the largest first: a firing token's activation a (top), log(u)/a with u uniform in (0, 1]
(weighted: draws without replacement in proportion to a, Efraimidis and Spirakis 2006), or u alone (random). A draw is a
hash of seed, document, position, feature and kind, so that windows depend neither on batches nor on what else is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from trimtab.dictionaries.feature_examples import KINDS, FeatureExamples
from trimtab.dictionaries.sparse import ActivePairs, order_by_feature
from trimtab.lm.sampling import uniform

_LAST = np.iinfo(np.int64).max
FIRST_STREAM = 16
"""Draws of the kinds have streams of their own, from this one on."""


class Places(NamedTuple):
    """Where rows stand: `[R]` each, whole stretches, in the order of the text within them."""

    token: ndarray
    document: ndarray
    position: ndarray
    """In the document."""
    slot: ndarray
    """In the sequence."""

    @property
    def stretch(self) -> ndarray:
        """Number of each row's stretch: within one, position and slot rise together."""
        new = (np.diff(self.position - self.slot) != 0) | (np.diff(self.document) != 0)
        return np.append(0, np.cumsum(new))[: len(self.token)]


class _Firings(NamedTuple):
    """Active pairs feature after feature, rows ascending: `[p]` each."""

    feature: ndarray
    row: ndarray
    activation: ndarray
    run: ndarray
    """Number of the (feature, stretch) that a pair belongs to."""
    start: ndarray
    """Where each run begins."""


class ExampleCollector:
    """Keeps the windows with the largest keys.

    Args:
        decoder_norms: `[n]` ‖W_dec[i]‖; codes times these are in model units.
        counts: windows of each kind per feature, in the order of `KINDS`.
        window: tokens of a window; two thirds of them stand before the one that it is chosen for.
        seed: of the draws.
    """

    def __init__(self, decoder_norms: Float[Tensor, " n"], counts: Sequence[int], window: int, seed: int) -> None:
        self.norms = decoder_norms.detach().cpu().double().numpy()
        self.counts, self.window, self.seed = dict(zip(KINDS, counts, strict=True)), window, seed
        self.before = window * 2 // 3
        self._arrived, n = 0, len(self.norms)
        self.kept: dict[str, dict[str, ndarray]] = {
            kind: {
                "key": np.full((n, count), -np.inf),
                "arrived": np.full((n, count), _LAST),
                "document": np.zeros((n, count), np.int32),
                "position": np.zeros((n, count), np.int32),
                "tokens": np.full((n, count, window), -1, np.int32),
                "activations": np.zeros((n, count, window), np.float32),
            }
            for kind, count in self.counts.items()
            if count
        }

    def update(self, pairs: ActivePairs, places: Places) -> None:
        """Take in rows, of stretches that are whole.

        Args:
            pairs: what `Dictionary.encode_pairs` gives for them, all finite.
            places: where they stand.
        """
        found = self._firings(pairs, places)
        if not len(found.row):
            return
        for kind, state in self.kept.items():
            key = self._keys(kind, found, places)
            best = np.maximum.reduceat(key, found.start)
            equal = np.flatnonzero(key == best[found.run])
            first = equal[np.append(True, np.diff(found.run[equal]) != 0)]  # one of each run, the earliest
            least = state["key"].min(axis=1)
            chosen = first[best > least[found.feature[first]]]
            if len(chosen):
                self._keep(state, chosen, key[chosen], found, places)
        self._arrived += len(found.start)

    def _firings(self, pairs: ActivePairs, places: Places) -> _Firings:
        pairs = ActivePairs(*(part.cpu() for part in pairs))
        order = order_by_feature(pairs, len(self.norms))
        feature, row = pairs.feature[order.pair].numpy(), order.row.numpy()
        activation = (pairs.value[order.pair].double().numpy() * self.norms[feature]).astype(np.float32)
        stretch = places.stretch[row]
        new = np.append(True, (np.diff(feature) != 0) | (np.diff(stretch) != 0))[: len(row)]
        return _Firings(feature, row, activation, np.cumsum(new) - 1, np.flatnonzero(new))

    def _keys(self, kind: str, found: _Firings, places: Places) -> ndarray:
        if kind == "top":
            return found.activation.astype(np.float64)
        where = (places.document[found.row], found.feature, places.position[found.row])
        document, feature, position = (torch.from_numpy(part.astype(np.int64)) for part in where)
        draw = uniform(self.seed, document, feature, position, FIRST_STREAM + KINDS.index(kind)).numpy()
        return np.log1p(-draw) / found.activation if kind == "weighted" else draw

    def _keep(self, state: dict[str, ndarray], chosen: ndarray, key: ndarray, found: _Firings, places: Places) -> None:
        """Put windows in the places of those of their features with smaller keys. Where keys are equal, what was read
        first stays."""
        features, first, counts = np.unique(found.feature[chosen], return_index=True, return_counts=True)
        kept = state["key"].shape[1]
        line = np.repeat(np.arange(len(features)), counts)
        slot = kept + np.arange(len(chosen)) - np.repeat(first, counts)
        shape = (len(features), kept + int(counts.max()))
        keys, arrived, pair = np.full(shape, -np.inf), np.full(shape, _LAST), np.zeros(shape, np.int64)
        keys[:, :kept], arrived[:, :kept] = state["key"][features], state["arrived"][features]
        keys[line, slot], arrived[line, slot], pair[line, slot] = key, self._arrived + found.run[chosen], chosen
        stays = np.zeros(shape, bool)
        np.put_along_axis(stays, np.lexsort((arrived, -keys), axis=1)[:, :kept], True, axis=1)
        at, free = np.nonzero(~stays[:, :kept])
        came, place = np.nonzero(stays[:, kept:])  # as many in each line
        assert np.array_equal(at, came)
        where, new = (features[at], free), pair[came, kept + place]
        state["key"][where], state["arrived"][where] = keys[came, kept + place], arrived[came, kept + place]
        state["document"][where] = places.document[found.row[new]]
        state["position"][where] = places.position[found.row[new]]
        state["tokens"][where], state["activations"][where] = self._windows(new, found, places)

    def _windows(self, pair: ndarray, found: _Firings, places: Places) -> tuple[ndarray, ndarray]:
        """Tokens and activations around some pairs, within their stretches."""
        step, stretch = np.arange(self.window) - self.before, places.stretch
        row = found.row[pair][:, None]
        begin = np.arange(len(pair))[:, None] * self.window + self.before
        tokens = np.full((len(pair), self.window), -1, np.int32)
        near = np.clip(row + step, 0, len(places.token) - 1)
        slot = places.position[near] - places.position[row]
        inside = (stretch[near] == stretch[row]) & (slot >= step[0]) & (slot <= step[-1])
        tokens.ravel()[(begin + slot)[inside]] = places.token[near[inside]]
        activations = np.zeros((len(pair), self.window), np.float32)
        near = np.clip(pair[:, None] + step, 0, len(found.row) - 1)
        slot = places.position[found.row[near]] - places.position[row]
        inside = (found.run[near] == found.run[pair][:, None]) & (slot >= step[0]) & (slot <= step[-1])
        activations.ravel()[(begin + slot)[inside]] = found.activation[near[inside]]
        return tokens, activations

    def state(self) -> dict[str, Tensor]:
        """All that was kept, by name, as `restore` takes it."""
        columns = {f"{kind}.{name}": column for kind, of in self.kept.items() for name, column in of.items()}
        return {name: torch.from_numpy(column) for name, column in columns.items()} | {
            "arrived": torch.tensor(self._arrived)
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._arrived = int(state["arrived"])
        for kind, of in self.kept.items():
            for name in of:
                of[name] = state[f"{kind}.{name}"].numpy().copy()

    def result(
        self, documents: Sequence[str], texts: Callable[[Iterable[int]], Sequence[str]], **about: Any
    ) -> FeatureExamples:
        """The windows kept.

        Args:
            documents: ids.
            texts: gives the texts of token ids.
            about: further fields of `FeatureExamples`.
        """
        parts: list[dict[str, ndarray]] = []
        for kind, of in self.kept.items():
            feature, place = np.nonzero(of["key"] > -np.inf)
            columns = {name: column[feature, place] for name, column in of.items()}
            parts.append({"feature": feature, "kind": np.full(len(feature), KINDS.index(kind)), **columns})
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((whole["arrived"], -whole["key"], whole["kind"], whole["feature"]))
        tokens = whole["tokens"][order]
        used, index = np.unique(tokens, return_inverse=True)
        absent = int(used[0] < 0) if len(used) else 0
        return FeatureExamples(
            feature=whole["feature"][order].astype(np.int32),
            kind=whole["kind"][order].astype(np.int8),
            document=whole["document"][order],
            position=whole["position"][order],
            place=np.full(len(order), self.before, np.int32),
            tokens=(index.reshape(tokens.shape) - absent).astype(np.int32),
            activations=whole["activations"][order],
            documents=tuple(documents),
            vocabulary=tuple(texts(used[absent:].tolist())),
            n_features=len(self.norms),
            seed=self.seed,
            **about,
        )

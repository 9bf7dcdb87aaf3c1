"""Collects windows of text in which features fire, in one pass and in memory for features × windows.

Of each stretch (the part of a document that stands in one sequence) a feature gets at most one window of each kind.
Keys decide which are kept, the largest first: a firing token's activation a (top), log(u)/a with u uniform in (0, 1]
(weighted: draws without replacement in proportion to a, Efraimidis and Spirakis 2006), or u alone (random). A draw is a
hash of seed, document, position, feature and kind, and of equal keys the earlier document and position wins, so that
windows depend neither on batches, nor on the order of reading, nor on what else is read.
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
        n = len(self.norms)
        self.kept: dict[str, dict[str, ndarray]] = {
            kind: {
                "key": np.full((n, count), -np.inf),
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
            pairs: what `Dictionary.encode_pairs` gives for them, in model units, all finite.
            places: where they stand.
        """
        found = self._firings(pairs, places)
        if not len(found.row):
            return
        room: dict[str, tuple[tuple[ndarray, ndarray], ndarray]] = {}
        for kind, state in self.kept.items():
            key = self._keys(kind, found, places)
            best = np.maximum.reduceat(key, found.start)
            equal = np.flatnonzero(key == best[found.run])
            first = equal[np.append(True, np.diff(found.run[equal]) != 0)]  # one of each run, the earliest
            least = state["key"].min(axis=1)
            chosen = first[best >= least[found.feature[first]]]
            if len(chosen):
                room[kind] = self._make_room(state, chosen, key[chosen], found, places)
        if not room:
            return
        chosen_pairs = np.unique(np.concatenate([pair for _, pair in room.values()]))  # kinds have many in common
        tokens, activations = self._windows(chosen_pairs, found, places)
        for kind, (to, pair) in room.items():
            window = np.searchsorted(chosen_pairs, pair)
            self.kept[kind]["tokens"][to], self.kept[kind]["activations"][to] = tokens[window], activations[window]

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

    @staticmethod
    def _make_room(
        state: dict[str, ndarray], chosen: ndarray, key: ndarray, found: _Firings, places: Places
    ) -> tuple[tuple[ndarray, ndarray], ndarray]:
        """Put keys in the places of those of their features that are smaller: where, and of which pairs."""
        features, first, counts = np.unique(found.feature[chosen], return_index=True, return_counts=True)
        kept, row = state["key"].shape[1], found.row[chosen]
        line = np.repeat(np.arange(len(features)), counts)
        slot = kept + np.arange(len(chosen)) - np.repeat(first, counts)
        shape = (len(features), kept + int(counts.max()))
        keys, where, pair = np.full(shape, -np.inf), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        keys[:, :kept], where[:, :kept] = state["key"][features], _where(state["document"], state["position"])[features]
        keys[line, slot], where[line, slot], pair[line, slot] = (
            key,
            _where(places.document, places.position)[row],
            chosen,
        )
        stays = np.zeros(shape, bool)
        np.put_along_axis(stays, np.lexsort((where, -keys), axis=1)[:, :kept], True, axis=1)
        at, free = np.nonzero(~stays[:, :kept])
        came, place = np.nonzero(stays[:, kept:])  # as many in each line
        assert np.array_equal(at, came)
        to, new = (features[at], free), pair[came, kept + place]
        state["key"][to] = keys[came, kept + place]
        state["document"][to] = places.document[found.row[new]]
        state["position"][to] = places.position[found.row[new]]
        return to, new

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
        return {
            f"{kind}.{name}": torch.from_numpy(column) for kind, of in self.kept.items() for name, column in of.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
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
        order = np.lexsort(
            (_where(whole["document"], whole["position"]), -whole["key"], whole["kind"], whole["feature"])
        )
        tokens = whole["tokens"][order]
        known = np.bincount(tokens.ravel() + 1, minlength=1) > 0
        known[0] = False  # what is outside
        place = np.cumsum(known, dtype=np.int32) - 1
        return FeatureExamples(
            feature=whole["feature"][order].astype(np.int32),
            kind=whole["kind"][order].astype(np.int8),
            document=whole["document"][order],
            position=whole["position"][order],
            place=np.full(len(order), self.before, np.int32),
            tokens=place[tokens + 1],
            activations=whole["activations"][order],
            documents=tuple(documents),
            vocabulary=tuple(texts((np.flatnonzero(known) - 1).tolist())),
            n_features=len(self.norms),
            seed=self.seed,
            **about,
        )


def _where(document: ndarray, position: ndarray) -> ndarray:
    """Places in order: documents as they were given, positions within them."""
    return (document.astype(np.int64) << 32) + position

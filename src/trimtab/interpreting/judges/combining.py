"""Several detectors as one probability, each weighed by what it is worth on passages that it was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from trimtab.interpreting.judge import Passage
from trimtab.interpreting.judges.detectors import Detector, Fitting
from trimtab.judges import Unjudged

FOLDS = 5
LEAST = 4
"""Passages that must have a feature, and as many that must lack it."""
MOST_FAR = 4.0
"""Standard deviations beyond which a score counts no more: longer texts have likelier words than any exemplar."""


class Combined:
    """Detectors and the weights of their scores.

    Out-of-fold scores, standardised, are what the weights are learned on. A detector that is no better than chance
    there, or would weigh against the feature, is left out; without any the probability is ½ everywhere.
    """

    def __init__(self, fittings: Mapping[str, Fitting], has: Sequence[Passage], lacks: Sequence[Passage]) -> None:
        passages, yes = [*has, *lacks], np.arange(len(has) + len(lacks)) < len(has)
        unseen = {name: _out_of_fold(fitting, passages, yes) for name, fitting in fittings.items()}
        self.weights: dict[str, float] = {}
        self._offset = 0.0
        self._scales = {name: (float(s.mean()), float(s.std()) or 1.0) for name, s in unseen.items()}
        names = [name for name, scores in unseen.items() if _auc(scores, yes) > 0.5]
        while names:
            model = _weigh(np.stack([self._standard(name, unseen[name]) for name in names], axis=1), yes)
            weights = model.coef_[0].tolist()
            if min(weights) > 0:
                self.weights, self._offset = dict(zip(names, weights, strict=True)), float(model.intercept_[0])
                break
            names.pop(int(np.argmin(weights)))
        self.detectors: dict[str, Detector] = {name: fittings[name](has, lacks) for name in self.weights}

    def _standard(self, name: str, scores: Float[ndarray, " N"]) -> Float[ndarray, " N"]:
        mean, spread = self._scales[name]
        return np.clip((scores - mean) / spread, -MOST_FAR, MOST_FAR)

    def probabilities(self, passages: Sequence[Passage]) -> Float[ndarray, " N"]:
        """How likely passages have the feature, were it as likely as not beforehand."""
        odds = np.full(len(passages), self._offset)
        if not passages:
            return odds
        for name, detector in self.detectors.items():
            odds += self.weights[name] * self._standard(name, detector.scores(passages))
        return 1 / (1 + np.exp(-odds))


def too_few(has: Sequence[Passage], lacks: Sequence[Passage]) -> Unjudged | None:
    """Why nothing can be fitted on some passages; None if it can."""
    if min(len(has), len(lacks)) >= LEAST:
        return None
    return Unjudged(f"{len(has)} passages have it and {len(lacks)} lack it, where {LEAST} of each are needed")


def _out_of_fold(fitting: Fitting, passages: Sequence[Passage], yes: Bool[ndarray, " N"]) -> Float[ndarray, " N"]:
    """Scores of passages by detectors that were fitted on the others; fold after fold in order, as exemplars come
    strongest first."""
    fold = np.empty(len(yes), int)
    for kind in (yes, ~yes):
        fold[kind] = np.arange(kind.sum()) % min(FOLDS, int(yes.sum()), int((~yes).sum()))
    scores = np.empty(len(yes))
    for number in range(int(fold.max()) + 1):
        held = np.flatnonzero(fold == number).tolist()
        kept = [np.flatnonzero((fold != number) & kind).tolist() for kind in (yes, ~yes)]
        detector = fitting(*([passages[i] for i in rows] for rows in kept))
        scores[held] = detector.scores([passages[i] for i in held])
    return scores


def _auc(scores: Float[ndarray, " N"], yes: Bool[ndarray, " N"]) -> float:
    from trimtab.stats.resamples import auc

    return float(auc(scores, yes, np.ones((1, len(yes))))[0])


def _weigh(x: Float[ndarray, "N D"], yes: Bool[ndarray, " N"]) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1.0, class_weight="balanced").fit(x, yes)

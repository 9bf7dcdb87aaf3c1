"""The input score (Arad et al., arXiv 2505.20063): does a feature fire on the tokens that it promotes?

M_i are the `n_tokens` most likely tokens of softmax(head(final_norm(W_dec[i]))), as in the output score. The score is
the share of the feature's `top` windows, those in which it fires most (`feature_examples.parquet`), whose most
activating token is in M_i. Tokens are compared by their texts, case and leading space included, which is what examples
keep; parts of characters, which all read the same, are in no M_i. A feature without windows, which never fired on the
examples' text, scores 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.dictionaries.feature_examples import KINDS, FeatureExamples
from trimtab.errors import UserError
from trimtab.lm.logit_lens import token_texts
from trimtab.selection.criterion import ScoringTarget, StatisticCriterion

PART_OF_A_CHARACTER = "\ufffd"
"""What tokens decode to that are no whole character."""


@dataclass(frozen=True, kw_only=True)
class InputScore(StatisticCriterion):
    """Share of the windows in which a feature fires most whose strongest token the logit lens names, from 0 to 1."""

    name: ClassVar[str] = "input-score"

    n_tokens: int = 20
    """Tokens that a feature is taken to stand for, by the logit lens."""

    def scores(self, target: ScoringTarget) -> Float[Tensor, " n"]:
        examples = _examples(target.dictionary)
        promoted = token_texts(target.model, target.lens_tokens(self.n_tokens))
        top = np.flatnonzero(examples.kind == KINDS.index("top"))
        of, strongest = examples.feature[top], examples.tokens[top, examples.place[top]]
        features = target.features.cpu().numpy()
        found = torch.zeros(len(features), dtype=torch.float64)
        for i, (low, high) in enumerate(zip(*(np.searchsorted(of, features + at) for at in (0, 1)), strict=True)):
            own = {text for text in promoted[i] if PART_OF_A_CHARACTER not in text}
            hits = [examples.vocabulary[token] in own for token in strongest[low:high].tolist()]
            found[i] = sum(hits) / max(len(hits), 1)
        return found


def _examples(dictionary: Dictionary) -> FeatureExamples:
    if dictionary.feature_examples is None:
        raise UserError(
            "criterion input-score",
            "the dictionary comes without examples (feature_examples.parquet), so it is unknown what its features "
            "fire on",
            "make them with `trimtab examples --sae SAE --text FILE --into SAE`",
        )
    return dictionary.feature_examples

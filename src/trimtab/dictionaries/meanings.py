"""What features mean, as far as their directions say: the tokens that the logit lens reads in them."""

from __future__ import annotations

from collections.abc import Iterable

from trimtab.dictionaries.base import Dictionary
from trimtab.lm import LanguageModel
from trimtab.lm.logit_lens import logit_lens, token_texts
from trimtab.runs import Run

TOKENS = 5


def name_features(run: Run, model: LanguageModel, dictionary: Dictionary, features: Iterable[int]) -> None:
    """Keep in a run the likeliest tokens of some features' decoder rows, beside what it keeps of others.

    Rows that are not in the residual stream have none.
    """
    ids = sorted({int(feature) for feature in features if feature >= 0})
    if ids and dictionary.d_in == model.d_model:
        texts = token_texts(model, logit_lens(model, dictionary.W_dec[ids], TOKENS).ids)
        run.record(features=run.record_dict.get("features", {}) | dict(zip(map(str, ids), texts, strict=True)))

"""What features mean: what the dictionary says of them, or the tokens that the logit lens reads in their directions."""

from __future__ import annotations

from collections.abc import Iterable

from trimtab.dictionaries.base import Dictionary
from trimtab.lm import LanguageModel
from trimtab.lm.logit_lens import logit_lens, token_texts
from trimtab.runs import Run

TOKENS = 5


def name_features(run: Run, model: LanguageModel, dictionary: Dictionary, features: Iterable[int]) -> None:
    """Keep in a run what some features mean, or else the likeliest tokens of their decoder rows, beside what it keeps
    of others.

    Rows that are not in the residual stream have no tokens.
    """
    ids = sorted({int(feature) for feature in features if feature >= 0})
    names = dictionary.feature_names
    found = {str(i): [names[i]] for i in ids if names and names[i]}
    rest = [i for i in ids if str(i) not in found]
    if rest and dictionary.d_in == model.d_model:
        texts = token_texts(model, logit_lens(model, dictionary.W_dec[rest], TOKENS).ids)
        found |= dict(zip(map(str, rest), texts, strict=True))
    if found:
        run.record(features=run.record_dict.get("features", {}) | found)

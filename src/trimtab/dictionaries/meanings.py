"""What features mean, in a few words: what the dictionary says of them, what they fire on, what they promote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trimtab.dictionaries.base import Dictionary
from trimtab.lm import LanguageModel
from trimtab.lm.logit_lens import logit_lens, token_texts
from trimtab.runs import Run, whole_number, whole_numbers

TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class FeatureWords:
    """What a table says of a feature beside its number. A feature may read one thing and write another."""

    feature: int
    meaning: str = ""
    """What the dictionary says that it means; empty where it says nothing."""
    fires_on: tuple[str, ...] = ()
    """Tokens of the examples beside the dictionary at which it is strongest; none without examples, or if it never
    fires there."""
    promotes: tuple[str, ...] = ()
    """Tokens that the logit lens reads in its decoder row, most likely first; none outside of the residual stream, or
    where the model's final norm and head are not known."""

    def __str__(self) -> str:
        parts = {"": self.meaning}
        for of, tokens in (("fires on ", self.fires_on), ("promotes ", self.promotes)):
            parts[of] = ", ".join(token.strip() or repr(token) for token in tokens)
        return "; ".join(f"{of}{words}" for of, words in parts.items() if words)


def describe_features(
    model: LanguageModel, dictionary: Dictionary, features: Iterable[int], count: int = TOKENS
) -> list[FeatureWords]:
    """A few words on each of some features.

    Args:
        model: the model, whose final norm and head read decoder rows.
        dictionary: whose features; what they fire on is known where `feature_examples.parquet` lies beside it.
        features: ids.
        count: tokens of each kind.

    Raises:
        UserError: a feature does not exist, or the examples are damaged or another dictionary's.
    """
    ids = whole_numbers(features if isinstance(features, int | str) else list(features), "feature")
    count = whole_number(count, "count", 0)
    dictionary.check_features(ids)
    names = dictionary.feature_names
    promoted: list[list[str]] = [[] for _ in ids]
    if ids and dictionary.d_in == model.d_model and "logit-lens" in model.capabilities:
        promoted = token_texts(model, logit_lens(model, dictionary.W_dec[ids], count).ids)
    return [
        FeatureWords(
            feature=i,
            meaning=names[i] if names else "",
            fires_on=fires_on(dictionary, i, count),
            promotes=tuple(tokens),
        )
        for i, tokens in zip(ids, promoted, strict=True)
    ]


def fires_on(dictionary: Dictionary, feature: int, count: int = TOKENS) -> tuple[str, ...]:
    """Tokens of the examples beside a dictionary at which a feature is strongest; none without examples."""
    found = dictionary.feature_examples
    return () if found is None else found.fires_on(feature, count)


def name_features(run: Run, model: LanguageModel, dictionary: Dictionary, features: Iterable[int]) -> None:
    """Keep in a run what some features mean (or else the likeliest tokens of their decoder rows) and what they fire on,
    beside what it keeps of others.

    Rows that are not in the residual stream have no tokens.
    """
    words = describe_features(model, dictionary, sorted({int(feature) for feature in features if feature >= 0}))
    facts = {
        "features": {str(one.feature): [one.meaning] if one.meaning else list(one.promotes) for one in words},
        "fires_on": {str(one.feature): list(one.fires_on) for one in words},
    }
    kept = {name: {i: tokens for i, tokens in of.items() if tokens} for name, of in facts.items()}
    if any(kept.values()):
        run.record(**{name: run.record_dict.get(name, {}) | of for name, of in kept.items() if of})

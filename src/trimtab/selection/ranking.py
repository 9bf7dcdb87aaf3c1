"""Rank a dictionary's features by what amplifying them does: the Python API of `trimtab rank`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.dictionaries.base import Dictionary, check_is_dictionary
from trimtab.errors import UserError, did_you_mean
from trimtab.lm import LanguageModel, Site, site_width
from trimtab.lm.logit_lens import token_texts
from trimtab.lm.model import check_is_model
from trimtab.runs import whole_numbers
from trimtab.selection.criterion import Criterion, ScoringTarget
from trimtab.selection.feature_table import FeatureTable
from trimtab.selection.output_score import OutputScore
from trimtab.selection.registry import criterion_object, make_criteria
from trimtab.selection.scorer import BATCH_SIZE
from trimtab.selection.scoring import Scores, score_features

TOP_TOKENS = 10


OPTIONS = ("live_only", "top_tokens", "batch_size", "progress")


def rank(
    model: LanguageModel,
    dictionary: Dictionary,
    criterion: str | Criterion = "delta-confidence",
    *,
    site: Site | str | None = None,
    features: Sequence[int] | None = None,
    **options: Any,
) -> FeatureTable:
    """Rank features by one criterion.

    The arguments, and what is raised, are those of `rank_by`; `options` are `live_only`, `top_tokens`, `batch_size` and
    `progress`.
    """
    for name in options:
        if name not in OPTIONS:
            hint = did_you_mean(name, ["criterion", "site", "features", *OPTIONS], f"there is {', '.join(OPTIONS)}")
            raise UserError(f"rank({name}=…)", "it has no such argument", hint)
    return rank_by(model, dictionary, [criterion], site=site, features=features, **options)[0]


def rank_by(
    model: LanguageModel,
    dictionary: Dictionary,
    criteria: Sequence[str | Criterion],
    *,
    site: Site | str | None = None,
    features: Sequence[int] | None = None,
    live_only: bool = True,
    top_tokens: int = TOP_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] | None = None,
) -> list[FeatureTable]:
    """Rank features by several criteria; those with the same dose and prefix share one pass through the model.

    Args:
        model: the model; it is left as it was.
        dictionary: its features' directions, statistics and site are used.
        criteria: names (with default settings) or criteria.
        site: where features are amplified; by default the site that the dictionary names.
        features: ids to rank; by default all.
        live_only: leave out features that never fired over the statistics' corpus, where there are statistics.
        top_tokens: tokens per feature by the logit lens; none where a row is not in the residual stream.
        batch_size: features that go through the layers together, at most: fewer where they do not fit in memory.
        progress: called with the number of features whenever some have been scored.

    Returns:
        One table per criterion.

    Raises:
        UserError: dictionary and model do not fit, no site is known, statistics are missing, a feature does not exist,
            or none is left to rank.
    """
    check_is_model(model)
    check_is_dictionary(dictionary)
    for name, value in (("top_tokens", top_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} {value}", "it must be at least 1", "change it")
    chosen = [make_criteria([c])[0] if isinstance(c, str) else criterion_object(c) for c in criteria]
    place = dictionary_site(model, dictionary, site)
    ids = features_to_rank(dictionary, features, live_only=live_only)
    lens_count = max([top_tokens, *(c.n_tokens for c in chosen if isinstance(c, OutputScore))])
    target = ScoringTarget(model, dictionary, ids, lens_count=lens_count)
    scores = score_features(target, place, chosen, batch_size=batch_size, progress=progress)
    tokens: Sequence[Sequence[str]] = [()] * len(ids)
    if dictionary.d_in == model.d_model:
        tokens = token_texts(model, target.lens_tokens(top_tokens))
    return [_table(dictionary, ids, result, tokens, top_tokens) for result in scores]


def dictionary_site(model: LanguageModel, dictionary: Dictionary, site: Site | str | None) -> Site:
    """The site to amplify at.

    Raises:
        UserError: nobody names one, the model has no such site, or the dictionary does not fit there.
    """
    name = site or dictionary.info.site
    if not name:
        raise UserError("--site", "the SAE's file does not name the site it reads", "give one, like resid_post.15")
    place = model.site(name)
    dictionary.check_model(site_width(model, place), model.name, str(place))
    return place


def features_to_rank(
    dictionary: Dictionary, features: Sequence[int] | None = None, *, live_only: bool = True
) -> Int[Tensor, " n"]:
    """Ids of the features to rank, in the order given (or ascending).

    Raises:
        UserError: a feature does not exist or is given twice, or none is left.
    """
    if features is None:
        ids = torch.arange(dictionary.n_features)
    else:
        wanted = whole_numbers(features, "feature")
        if not wanted:
            raise UserError("the features", "there is none", "choose some, or leave them out for all")
        dictionary.check_features(wanted)
        if len(set(wanted)) < len(wanted):
            raise UserError("the features", "one is given twice", "give each once")
        ids = torch.tensor(wanted, dtype=torch.long)
    if live_only and dictionary.feature_stats is not None:
        ids = ids[torch.as_tensor(dictionary.feature_stats.live)[ids]]
    if len(ids) == 0:
        raise UserError("the features", "none of them ever fired", "choose others")
    return ids


def _table(
    dictionary: Dictionary, ids: Int[Tensor, " n"], result: Scores, tokens: Sequence[Sequence[str]], top_tokens: int
) -> FeatureTable:
    stats, rows = dictionary.feature_stats, ids.numpy()
    unknown = np.full(len(ids), np.nan)
    dose = unknown if result.relative_dose is None else result.relative_dose.numpy()
    return FeatureTable.ranked(
        criterion=result.criterion.label,
        signed=result.criterion.signed,
        order_by=result.score.double().numpy(),
        feature=rows.astype(np.int32),
        relative_dose=dose.astype(np.float32),
        firing_rate=unknown if stats is None else stats.firing_rate[rows].astype(np.float64),
        max_activation=(unknown if stats is None else stats.max_activation[rows]).astype(np.float32),
        top_tokens=tuple(tuple(row) for row in tokens),
        meaning=tuple(names[i] for i in rows) if (names := dictionary.feature_names) else (),
        fires_on=tuple(examples.fires_on(i, top_tokens) for i in rows)
        if (examples := dictionary.feature_examples)
        else (),
    )

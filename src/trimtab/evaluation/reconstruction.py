"""How well a dictionary rebuilds activations: one pass over text that stops at the site."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.activations import PackedText
from trimtab.activations.row_selection import norms
from trimtab.dictionaries.base import Dictionary
from trimtab.dictionaries.core_metrics import CoreMetricsAccumulator, DocumentTotals
from trimtab.dictionaries.feature_stats import FeatureStats, FeatureStatsAccumulator
from trimtab.evaluation.documents import PassOptions
from trimtab.lm import LanguageModel, Site, capture, not_finite_error

_MEDIAN_ROWS = 8_192


class Reconstruction(NamedTuple):
    """What one pass over a text tells about a dictionary."""

    totals: DocumentTotals
    """Sums by document over the rows that the dictionary answers for."""
    mean: Float[Tensor, " d"]
    """Mean of those rows."""
    stats: FeatureStats
    norm_limit: float
    """Rows above this norm were left out."""
    excluded: dict[str, int]
    """Tokens left out, by reason: first, special, outlier."""


def reconstruct(
    model: LanguageModel,
    dictionary: Dictionary,
    site: Site,
    packed: PackedText,
    options: PassOptions,
    progress: Callable[[int], None] | None = None,
) -> Reconstruction:
    """Encode and decode every row of a text, first and special tokens and outlier norms left out.

    Args:
        packed: the text; progress is called with the number of sequences done.
        options: the median norm is that of the first 8,192 rows.
    """
    metrics = CoreMetricsAccumulator(dictionary.d_in, dictionary.n_features)
    stats = FeatureStatsAccumulator(dictionary.decoder_norms.cpu())
    total = torch.zeros(dictionary.d_in, dtype=torch.float64)
    excluded = {"first": 0, "special": 0, "outlier": 0}
    norm_limit: float | None = None
    waiting: list[tuple[Tensor, Tensor]] = []  # rows seen before the norm limit is known

    def take(x: Tensor, document: Tensor) -> None:
        assert norm_limit is not None
        usual = norms(x) <= norm_limit
        excluded["outlier"] += int((~usual).sum())
        x = x[usual].float()
        f = dictionary.encode_sparse(x)
        metrics.update(x, dictionary.rebuild(f, x), f, document[usual])
        stats.update(dictionary.in_model_units(f, x))
        total.add_(x.double().sum(dim=0).cpu())

    with torch.no_grad():
        for batch in options.batches(packed, model):
            x = capture(model, batch.tokens, [site])[site].flatten(2)
            excluded["first"] += x.shape[0]
            excluded["special"] += int((~batch.candidate[:, 1:]).sum())
            rows = x[batch.candidate]
            if len(bad := (~norms(rows).isfinite()).nonzero()):
                row, slot = batch.candidate.nonzero()[int(bad[0])].tolist()
                raise not_finite_error(model, batch.tokens.ids[row, : slot + 1].tolist(), f"activations at {site}")
            waiting.append((rows, batch.document[batch.candidate]))
            if norm_limit is None and sum(len(rows) for rows, _ in waiting) >= _MEDIAN_ROWS:
                norm_limit = options.outlier_norm * _median_norm(waiting)
            if norm_limit is not None:
                while waiting:
                    take(*waiting.pop(0))
            if progress:
                progress(len(x))
        if waiting:
            norm_limit = options.outlier_norm * _median_norm(waiting)
            for rows in waiting:
                take(*rows)
    assert norm_limit is not None
    mean = (total / max(stats.n_tokens, 1)).to(model.device, torch.float32)
    kept_out = f"position 0 of each {packed.context}-token sequence; norm > {options.outlier_norm:g} × median"
    kept_out += "; special tokens" * bool(options.special_ids(model))
    found = stats.result(corpus_hash=packed.corpus.hash, sink_filter=kept_out)
    return Reconstruction(metrics.totals(), mean, found, norm_limit, excluded)


def _median_norm(rows: list[tuple[Tensor, Tensor]]) -> float:
    found = torch.cat([norms(x) for x, _ in rows])
    return float(found.median()) if len(found) else float("inf")

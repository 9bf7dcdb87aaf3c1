"""Statistics of a dictionary's features on some text, for dictionaries that come without any."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from trimtab.activations import Document, tokenise
from trimtab.dictionaries.base import Dictionary
from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.evaluation.core import DEFAULT_OPTIONS, CoreOptions
from trimtab.evaluation.documents import pack
from trimtab.evaluation.reconstruction import reconstruct
from trimtab.lm import LanguageModel
from trimtab.selection.ranking import dictionary_site


def compute_feature_stats(
    model: LanguageModel,
    dictionary: Dictionary,
    documents: Iterable[Document],
    options: CoreOptions = DEFAULT_OPTIONS,
    *,
    site: str | None = None,
    limit_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> FeatureStats:
    """Maximum, mean and rate of every feature over a text, sinks left out as in training.

    Args:
        documents: the text; `options.split` chooses among them.
        site: where the dictionary reads; by default what its file says.
        limit_tokens: read no document behind this many tokens.
        progress: called with the number of sequences done.

    Raises:
        UserError: the dictionary does not fit the model, or the text does not fill a sequence.
    """
    where = dictionary_site(model, dictionary, site)
    packed = pack(
        tokenise(documents, model.tokenizer, limit_tokens=limit_tokens),
        options.split,
        options.holdout,
        options.context,
    )
    return reconstruct(
        model,
        dictionary,
        where,
        packed,
        batch_size=options.batch_size,
        special_ids=sorted(model.tokenizer.all_special_ids) if options.drop_special else [],
        outlier_norm=options.outlier_norm,
        progress=progress,
    ).stats

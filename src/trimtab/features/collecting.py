"""Examples of what every feature fires on, over a corpus, in one pass.

The same pass gives the statistics of the features: both take what the encoder finds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
import transformers
from torch import Tensor

from trimtab.activations import Document, HarvestOptions, TokenisedCorpus, as_documents, tokenise
from trimtab.dictionaries import Dictionary, FeatureStats, FeatureStatsAccumulator
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.dictionaries.example_collector import ExampleCollector
from trimtab.dictionaries.feature_examples import KINDS, FeatureExamples
from trimtab.errors import UserError
from trimtab.features.example_rows import Block, RowBlocks, ShardBlocks, TextBlocks, not_finite
from trimtab.lm import LanguageModel, Site, load_tokenizer
from trimtab.lm.continuations import find_anchor, token_text
from trimtab.lm.model import check_is_model
from trimtab.runs import Meter, as_path, check_least, field_types, known_arguments, read_keywords
from trimtab.selection.ranking import dictionary_site
from trimtab.training.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint

CHECKPOINT_SECONDS = 300.0
"""Between checkpoints, where there are any."""


@known_arguments
@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """How many windows of each kind, and how text is read."""

    top: int = 10
    """Windows with the largest activations, per feature."""
    weighted: int = 10
    """Windows drawn in proportion to activation, per feature."""
    random: int = 10
    """Windows drawn evenly among the tokens where the feature fires, per feature."""
    window: int = 32
    """Tokens of a window; two thirds stand before the token that it is chosen for."""
    seed: int = 0
    """Of the draws."""
    context: int = 256
    """Tokens of a sequence, the leading BOS included."""
    batch_size: int = 8
    """Sequences per forward pass."""
    autocast: bool = False
    """Run matrix products of the model in bfloat16."""
    outlier_norm: float = 10.0
    """Leave out rows whose norm exceeds this many times the median norm."""
    drop_special: bool = True
    """Leave out special tokens; position 0 of a sequence is always left out."""

    def __post_init__(self) -> None:
        check_least(self, 0, *KINDS)
        check_least(self, 1, "window")
        if not any(self.counts):
            raise UserError("the windows", "there are none of any kind", "give --top, --weighted or --random")
        _ = self.harvest_options

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows of each kind, in the order of `KINDS`."""
        return tuple(getattr(self, kind) for kind in KINDS)

    @property
    def harvest_options(self) -> HarvestOptions:
        """How text is read: all of it, as a harvest reads it."""
        return HarvestOptions(
            context=self.context, batch_size=self.batch_size, autocast=self.autocast, holdout=0.0, seed=self.seed,
            outlier_norm=self.outlier_norm, drop_special=self.drop_special,
        )  # fmt: skip


class Found(NamedTuple):
    """What a pass tells of a dictionary."""

    examples: FeatureExamples
    stats: FeatureStats


@overload
def examples(
    model: LanguageModel, dictionary: Dictionary, texts: Iterable[str | Document] | TokenisedCorpus, **options: Any
) -> FeatureExamples: ...
@overload
def examples(
    model: LanguageModel,
    dictionary: Sequence[Dictionary],
    texts: Iterable[str | Document] | TokenisedCorpus,
    **options: Any,
) -> list[FeatureExamples]: ...
def examples(
    model: LanguageModel,
    dictionary: Dictionary | Sequence[Dictionary],
    texts: Iterable[str | Document] | TokenisedCorpus,
    **options: Any,
) -> FeatureExamples | list[FeatureExamples]:
    """Windows of text in which each feature fires: the strongest, and ones drawn by activation and evenly.

    Args:
        model: the model.
        dictionary: an SAE, or several at different sites, which one pass serves.
        texts: strings, documents or tokens. They are packed into sequences, as for training; what is left behind the
            last whole sequence is not read.
        options: fields of `ExampleOptions`.

    Returns:
        The windows of every feature (`found[12]` those of one); for several dictionaries a list.

    Raises:
        UserError: there is too little text, a dictionary does not fit the model, or activations are not finite.
    """
    check_is_model(model)
    given = [dictionary] if not isinstance(dictionary, Sequence) else list(dictionary)
    if not given:
        raise UserError("the SAEs", "there is none", "give at least one")
    for one in given:
        check_is_dictionary(one)
    chosen = ExampleOptions(**read_keywords(options, field_types(ExampleOptions), examples))
    corpus = texts if isinstance(texts, TokenisedCorpus) else tokenise(as_documents(texts), model.tokenizer)
    found = [one.examples for one in examples_of_text(model, given, corpus, chosen)]
    return found if isinstance(dictionary, Sequence) else found[0]


def examples_of_text(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    corpus: TokenisedCorpus,
    options: ExampleOptions,
    checkpoints: Path | None = None,
    *,
    any_model: bool = False,
) -> list[Found]:
    """Examples and statistics of dictionaries, which may be of several sites, from one pass of a model over text.

    Args:
        checkpoints: directory to go on from, and to keep what was found so far in; without it nothing is kept.
        any_model: take dictionaries of other models, if widths agree.

    Raises:
        UserError: as `examples`.
    """
    sites = [dictionary_site(model, dictionary, None) for dictionary in dictionaries]
    for dictionary in () if any_model else dictionaries:
        dictionary.check_same_model(model.name, model.fingerprint)
    _check_room(options.window, options.context, len(corpus.tokens))
    blocks = TextBlocks(model, list(dict.fromkeys(sites)), corpus, options.harvest_options)
    return _collect(blocks, dictionaries, sites, options, model.name, model.tokenizer, checkpoints)


def examples_of_harvest(
    directories: Sequence[Path],
    dictionaries: Sequence[Dictionary],
    options: ExampleOptions,
    checkpoints: Path | None = None,
    *,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    any_model: bool = False,
) -> list[Found]:
    """The same from finished harvests; of the model only the tokenizer is loaded, for the texts of tokens.

    Options that say how text is read are those of the harvest.

    Args:
        directories: of harvests of one model.
        tokenizer: by default that of the model which the harvests name.

    Raises:
        UserError: there is no finished harvest of a dictionary's site, it is of another model, or a shard is damaged.
    """
    sites = [_named_site(dictionary) for dictionary in dictionaries]
    if isinstance(directories, str | Path) or not directories:
        raise UserError(f"the directories {directories!r}", "they are no list of harvests", "give one, like [path]")
    blocks = ShardBlocks([as_path(one, "a harvest") for one in directories], list(dict.fromkeys(sites)))
    index = blocks.indices[0]
    for dictionary, site in zip(dictionaries, sites, strict=True):
        dictionary.check_model(index.widths[site], index.model, site)
        if not any_model:
            dictionary.check_same_model(index.model, index.identity["model_fingerprint"])
    _check_room(options.window, index.identity["context"], options.window)
    known = tokenizer or load_tokenizer(index.model)
    return _collect(blocks, dictionaries, sites, options, index.model, known, checkpoints)


class _Kept:
    """What is found of one dictionary."""

    def __init__(self, dictionary: Dictionary, site: str, options: ExampleOptions) -> None:
        self.dictionary, self.site = dictionary, site
        self.stats = FeatureStatsAccumulator(dictionary.decoder_norms.cpu())
        self.windows = ExampleCollector(dictionary.decoder_norms, options.counts, options.window, options.seed)

    def take(self, block: Block, documents: Sequence[str]) -> None:
        """Take in a block, if it has rows."""
        if not len(block.places.token):
            return
        weight = self.dictionary.W_dec
        x = block.rows[self.site].to(weight.device, weight.dtype)
        bad = ~x.isfinite().all(1)
        if bool(bad.any()):
            raise not_finite(self.site, documents[int(block.places.document[int(bad.nonzero()[0])])])
        pairs = self.dictionary.in_model_units(self.dictionary.encode_pairs(x), x)
        self.stats.update(pairs)
        self.windows.update(pairs, block.places)

    def state(self) -> dict[str, Tensor]:
        """All that was found, by name, as `restore` takes it."""
        return {f"stats.{name}": tensor for name, tensor in self.stats.state().items()} | self.windows.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.stats.restore({name.removeprefix("stats."): t for name, t in state.items() if name.startswith("stats.")})
        self.windows.restore(state)


@torch.no_grad()
def _collect(
    blocks: RowBlocks,
    dictionaries: Sequence[Dictionary],
    sites: Sequence[Site | str],
    options: ExampleOptions,
    model: str,
    tokenizer: transformers.PreTrainedTokenizerBase,
    checkpoints: Path | None,
) -> list[Found]:
    kept = [_Kept(one, str(site), options) for one, site in zip(dictionaries, sites, strict=True)]
    last = None if checkpoints is None else latest_checkpoint(checkpoints)
    if last is not None:
        for i, one in enumerate(kept):
            one.restore({n.removeprefix(f"{i}."): t for n, t in last.tensors.items() if n.startswith(f"{i}.")})
    first, saved = last.step if last else 0, time.monotonic()
    with Meter("reading for examples", blocks.total, done=first) as meter:
        for step, found in enumerate(blocks.read(first), start=first):
            if checkpoints is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                tensors = {f"{i}.{name}": t for i, one in enumerate(kept) for name, t in one.state().items()}
                write_checkpoint(checkpoints, Checkpoint(step, tensors, {}))
                saved = time.monotonic()
            for block in found:
                for one in kept:
                    one.take(block, blocks.documents)
            meter.advance()

    anchor = find_anchor(tokenizer)

    def texts(ids: Iterable[int]) -> list[str]:
        return [token_text(tokenizer, int(i), anchor) for i in ids]

    return [
        Found(
            one.windows.result(
                blocks.documents, texts, n_tokens=one.stats.n_tokens, model=model, site=one.site,
                dictionary=one.dictionary.fingerprint, corpus_hash=blocks.corpus_hash,
            ),
            one.stats.result(corpus_hash=blocks.corpus_hash, sink_filter=blocks.sink_filter),
        )
        for one in kept
    ]  # fmt: skip


def _named_site(dictionary: Dictionary) -> str:
    if not dictionary.info.site:
        name = dictionary.name or "the SAE"
        raise UserError(
            f"sae {name}", "it does not name the site it reads", "convert it with --site (trimtab sae convert)"
        )
    return dictionary.info.site


def _check_room(window: int, context: int, tokens: int) -> None:
    """Raise a `UserError` if no window can be filled."""
    if window >= context:
        raise UserError(
            f"window {window}",
            f"a sequence has {context - 1} tokens of text",
            "give a smaller window or a larger context",
        )
    if tokens < window:
        raise UserError(
            f"text of {tokens} tokens", f"it does not fill a window of {window}", "give more text or a smaller window"
        )

"""Which sequences a harvest visits, in which order: options, held-out documents, forward batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from trimtab.activations.packing import PackedText, TokenisedCorpus
from trimtab.activations.shards import Split
from trimtab.errors import UserError
from trimtab.runs import check_least, check_values, split_ids

SPLITS: tuple[Split, ...] = ("holdout", "train")
"""In the order in which a harvest writes them."""


@dataclass(frozen=True, kw_only=True)
class HarvestOptions:
    """What decides which rows a harvest gives, beside model, sites and text."""

    context: int = 256
    """Tokens of a sequence, the leading BOS included."""
    batch_size: int = 8
    """Sequences per forward pass."""
    autocast: bool = False
    """Run matrix products in bfloat16, the residual stream staying in the model's dtype: faster on
    processors with bfloat16 matrix units and on accelerators."""
    holdout: float = 0.05
    """Share of the documents kept out of training; a document's id decides."""
    seed: int = 0
    """Of the order of sequences and of the shuffle within shards."""
    shard_rows: int = 65_536
    """Rows of a shard, which is also the block that is shuffled."""
    outlier_norm: float = 10.0
    """Leave out rows whose norm exceeds this many times the median norm."""
    drop_special: bool = True
    """Leave out special tokens, chat markup among them; position 0 of a sequence is always left out."""

    def __post_init__(self) -> None:
        check_least(self, 2, "context")
        check_least(self, 1, "batch_size", "shard_rows")
        check_values(self, "a share below 1", lambda share: 0 <= share < 1, "holdout")
        check_values(self, "above 1", lambda norm: norm > 1, "outlier_norm")


def split_corpus(corpus: TokenisedCorpus, holdout: float) -> Bool[ndarray, " documents"]:
    """Which documents are held out: decided by each document's id alone."""
    held_out = set(split_ids(corpus.ids, {"holdout": holdout, "train": 1 - holdout}, "activations")["holdout"])
    return np.array([name in held_out for name in corpus.ids])


def pack_splits(corpus: TokenisedCorpus, options: HarvestOptions) -> dict[Split, PackedText]:
    """Training and held-out documents, packed apart. Raises a `UserError` if the training text does not fill a
    sequence."""
    held_out = split_corpus(corpus, options.holdout)
    packed: dict[Split, PackedText] = {
        "holdout": PackedText(corpus, np.flatnonzero(held_out).astype(np.int32), options.context),
        "train": PackedText(corpus, np.flatnonzero(~held_out).astype(np.int32), options.context),
    }
    if held_out.all():
        raise UserError(
            f"text of {len(held_out)} document{'s' * (len(held_out) > 1)}",
            f"each is held out as a whole or not at all, and at --holdout {options.holdout:g} all of them are",
            "split it into more documents, or give --holdout 0",
        )
    if not len(packed["train"]):
        raise UserError(
            f"text of {packed['train'].n_tokens} tokens",
            f"it does not fill one sequence of {options.context}",
            "give more text or a smaller --context",
        )
    return packed


def batch_order(packed: PackedText, options: HarvestOptions, split: Split) -> list[ndarray]:
    """Indices of the sequences of every forward batch, in the order of a harvest."""
    n, size = len(packed), options.batch_size
    order = np.random.default_rng([options.seed, SPLITS.index(split)]).permutation(n)
    return [order[i : i + size] for i in range(0, n, size)]

"""Steered texts: which row is steered with what, decoding them, and the table in which they are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy import ndarray

from trimtab.dictionaries import Dictionary
from trimtab.lm import DecodeConfig, LanguageModel, Site, decode
from trimtab.steering import StaticSource
from trimtab.studies.readback import read_back


class Assignment(NamedTuple):
    """One row: a prompt, which of its samples, and the feature that it is steered with."""

    arm: str
    prompt: int
    """Index into the split's prompts."""
    replicate: int
    """Which sample of the prompt; equal numbers share their random draws in all arms."""
    feature: int
    """-1 for no steering."""
    dose: float
    """In units of ‖x‖."""
    rank: int = 0
    """The feature's place in its list, 0 for the first."""


COLUMNS = (*Assignment._fields, "token_ids", "text", "fired", "nll", "repetition", "n_edits", "relative_dose")
"""Of a table of texts, one row each: what it was assigned; its continuation as token ids and as text; whether its
feature fires at each token, the negative log-likelihood in nats per token and the share of repeated 4-grams, as the
unedited model reads it back; its edited tokens and their mean realised ‖Δ‖/‖x‖, 0 without edits."""


def read_texts(path: Path) -> pd.DataFrame:
    """A table of texts, with `rate`: the share of tokens at which the row's feature fires."""
    texts = pq.read_table(path, columns=list(COLUMNS)).to_pandas()
    return texts.assign(rate=[fired.mean() for fired in texts.fired])


def write_texts(
    model: LanguageModel,
    dictionary: Dictionary,
    site: Site,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Assignment],
    config: DecodeConfig,
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[pa.Table, ndarray]:
    """Decode continuations, each row steered with its own feature, and read them back.

    Random draws are keyed by prompt and replicate only, so that rows of different arms differ by the steering alone.

    Args:
        prompts: token ids of the split's prompts.
        rows: what to write; steered rows and unsteered ones must not be mixed.
        config: it must not stop early, so that every row has as many edits.
        progress: called with the number of rows, twice for each: when it is written and when it is read back.

    Returns:
        A table with `COLUMNS`, and `[N, n]` the tokens of each text at which each feature of the dictionary fires.
    """
    steered = {row.feature >= 0 for row in rows}
    assert len(steered) == 1, "mixed rows"
    source = None
    if steered == {True}:
        feature = torch.tensor([[row.feature] for row in rows])
        dose = torch.tensor([[row.dose] for row in rows])
        source = StaticSource(dictionary, feature, dose, site, unit="relative")
    row_prompts = [list(prompts[row.prompt]) for row in rows]
    decoded = decode(
        model,
        row_prompts,
        config,
        source,
        samples=[row.prompt for row in rows],
        branches=[row.replicate for row in rows],
        progress=progress,
    )
    read = read_back(
        model,
        dictionary,
        site,
        row_prompts,
        decoded.token_ids,
        [row.feature for row in rows],
        batch_size=config.batch_size,
        progress=progress,
    )
    log = decoded.edits
    n_edits = np.bincount(log.row.numpy(), minlength=len(rows))
    total = np.bincount(log.row.numpy(), weights=log.relative_dose.double().numpy(), minlength=len(rows))
    columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in Assignment._fields}
    columns |= {"token_ids": decoded.token_ids, "text": decoded.texts, "fired": list(read.fired)}
    columns |= {"nll": read.nll, "repetition": read.repetition, "n_edits": n_edits}
    return pa.table(columns | {"relative_dose": total / np.maximum(n_edits, 1)}), read.counts

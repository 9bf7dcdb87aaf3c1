"""Steered texts: which row is steered with what, decoding them, and the table in which they are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy import ndarray

from trimtab.dictionaries import Dictionary
from trimtab.lm import DecodeConfig, LanguageModel, Site, decode
from trimtab.runs import write_table
from trimtab.steering import DoseSummary, StaticSource, dose_summary
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


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts as written and as read back. All columns have N rows."""

    arm: ndarray
    prompt: ndarray
    replicate: ndarray
    feature: ndarray
    dose: ndarray
    rank: ndarray
    token_ids: ndarray
    """`[N, T]` the continuation."""
    text: tuple[str, ...]
    fired: ndarray
    """`[N, T]` whether the row's feature fires at each token, read back by the unedited model."""
    nll: ndarray
    repetition: ndarray
    n_edits: ndarray
    """Edited tokens."""
    relative_dose: ndarray
    """Realised ‖Δ‖/‖x‖, mean over the row's edits; 0 without."""

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def rate(self) -> ndarray:
        """`[N]` share of tokens at which the row's feature fires."""
        return self.fired.mean(axis=1)

    def take(self, rows: ndarray) -> Texts:
        """The rows of a mask or of indices."""
        index = np.flatnonzero(rows) if rows.dtype == bool else rows
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {name: column[index] for name, column in columns.items() if isinstance(column, np.ndarray)}
        return replace(self, **arrays, text=tuple(self.text[i] for i in index))

    def of(self, arm: str) -> Texts:
        """The rows of one arm."""
        return self.take(self.arm == arm)

    @classmethod
    def join(cls, parts: Sequence[Texts]) -> Texts:
        """All rows of several tables."""
        columns: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(part, f.name) for part in parts]
            columns[f.name] = sum(values, ()) if f.name == "text" else np.concatenate(values)
        return cls(**columns)

    def write(self, path: Path) -> None:
        """Keep the table as a Parquet file."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: list(column) if np.ndim(column) == 2 else column for name, column in columns.items()}
        write_table(path, pa.table({name: pa.array(column) for name, column in plain.items()}))

    @classmethod
    def read(cls, path: Path) -> Texts:
        """The inverse of `write`."""
        table = pq.read_table(path)
        columns: dict[str, Any] = {}
        for f in fields(cls):
            column = table[f.name]
            if f.name in ("token_ids", "fired"):
                columns[f.name] = np.array(column.to_pylist())
            else:
                columns[f.name] = tuple(column.to_pylist()) if f.name == "text" else column.to_numpy()
        return cls(**columns)


class Written(NamedTuple):
    """Texts, and how often every feature of the dictionary fires in each."""

    texts: Texts
    counts: ndarray  # [N, n]
    dose: DoseSummary


def write_texts(
    model: LanguageModel,
    dictionary: Dictionary,
    site: Site,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Assignment],
    config: DecodeConfig,
    *,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Decode continuations, each row steered with its own feature, and read them back.

    Random draws are keyed by prompt and replicate only, so that rows of different arms differ by the steering alone.

    Args:
        prompts: token ids of the split's prompts.
        rows: what to write; steered rows and unsteered ones must not be mixed.
        config: it must not stop early, so that every row has as many edits.
        progress: called with the number of rows, twice for each: when it is written and when it is read back.
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
    texts = Texts(
        **{name: np.array([getattr(row, name) for row in rows]) for name in Assignment._fields},
        token_ids=np.array(decoded.token_ids),
        text=tuple(decoded.texts),
        fired=read.fired,
        nll=read.nll,
        repetition=read.repetition,
        n_edits=n_edits,
        relative_dose=total / np.maximum(n_edits, 1),
    )
    return Written(texts, read.counts, dose_summary(log))

"""Windows of text in which features fire: the strongest ones, ones drawn by activation, and ones drawn evenly.

The table lies beside a dictionary's weights as `feature_examples.parquet`, one row per window, and needs no tokenizer
to be read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trimtab.errors import UserError
from trimtab.runs import as_path, whole_number, write_table
from trimtab.runs.results import Result
from trimtab.runs.tables import NUMBER, Column, Table

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
"""Version of the table; another one is refused."""
Kind = Literal["top", "weighted", "random"]
KINDS: tuple[Kind, ...] = ("top", "weighted", "random")
"""Ways in which windows are chosen: by the largest activation, drawn in proportion to it, drawn evenly."""
LEFT_OUT = "…"
"""Stands in a window for a token at which no activation was read: special tokens, outliers."""
_ABOUT = {
    "n_features": int, "n_tokens": int, "model": str, "site": str, "dictionary": str, "corpus_hash": str, "seed": int,
}  # fmt: skip
_AGAIN = "make the examples again (trimtab examples)"


@dataclass(frozen=True, kw_only=True)
class Window:
    """A place at which a feature fires, with what stands around it."""

    feature: int
    kind: Kind
    activation: float
    """f·‖W_dec‖ at the token: how far the feature moves the reconstruction there."""
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    """Of the same feature at each of the tokens."""
    place: int
    """Which of the tokens the window was chosen for."""
    document: str
    position: int
    """Of that token in the document."""

    @property
    def token(self) -> str:
        return self.tokens[self.place]

    @property
    def before(self) -> str:
        return "".join(self.tokens[: self.place])

    @property
    def after(self) -> str:
        return "".join(self.tokens[self.place + 1 :])


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureWindows(Result):
    """The windows of one feature."""

    feature: int
    n_tokens: int
    """Tokens looked at."""
    windows: tuple[Window, ...]

    def headline(self) -> str:
        if not self.windows:
            return f"feature {self.feature} never fired on {self.n_tokens:,} tokens"
        return f"feature {self.feature}: {len(self.windows)} windows out of {self.n_tokens:,} tokens"

    def tables(self) -> dict[str, Table]:
        columns = [
            Column("window", "kind"),
            Column("activation", "activation", NUMBER),
            *(Column(name, name) for name in ("before", "token", "after")),
        ]
        return {"windows": Table(columns=columns, rows=self.windows)}


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureExamples(Result):
    """Windows of all features of a dictionary: m of them, features ascending, kinds in order, best first."""

    feature: NDArray[np.int32]
    """`[m]`"""
    kind: NDArray[np.int8]
    """`[m]` place in `KINDS`."""
    document: NDArray[np.int32]
    """`[m]` place in `documents`."""
    position: NDArray[np.int32]
    """`[m]` place in its document of the token that the window was chosen for."""
    place: NDArray[np.int32]
    """`[m]` place in the window of that token."""
    tokens: NDArray[np.int32]
    """`[m, window]` places in `vocabulary`; -1 outside of the document or sequence."""
    activations: NDArray[np.float32]
    """`[m, window]` f·‖W_dec‖ of the feature."""
    documents: tuple[str, ...]
    """Ids."""
    vocabulary: tuple[str, ...]
    """Texts of tokens, leading space included."""
    n_features: int
    n_tokens: int
    """Tokens looked at."""
    model: str = ""
    site: str = ""
    dictionary: str = ""
    """Fingerprint."""
    corpus_hash: str = ""
    seed: int = 0

    @property
    def live(self) -> NDArray[np.int32]:
        """Features that have a window."""
        return np.unique(self.feature)

    def __getitem__(self, feature: int) -> FeatureWindows:
        """Windows of a feature. Raises a `UserError` if there is no such feature."""
        if not 0 <= whole_number(feature, "feature") < self.n_features:
            raise UserError(
                f"feature {feature}", f"there are features 0 to {self.n_features - 1}", "choose one of them"
            )
        low, high = np.searchsorted(self.feature, [feature, feature + 1])
        windows = tuple(self._window(row) for row in range(low, high))
        return FeatureWindows(feature=feature, n_tokens=self.n_tokens, windows=windows)

    def fires_on(self, feature: int, count: int) -> tuple[str, ...]:
        """Texts of the tokens at which a feature's activations in its windows sum up to most, largest first; tokens
        that are the same but for case and outer blanks are one."""
        low, high = np.searchsorted(self.feature, [whole_number(feature, "feature"), feature + 1])
        rows = np.arange(low, high)
        sums: dict[str, float] = {}
        at = (self.tokens[rows, self.place[rows]], self.activations[rows, self.place[rows]])
        for token, activation in zip(*(column.tolist() for column in at), strict=True):
            text = self.vocabulary[token]
            text = text.strip().lower() or text
            sums[text] = sums.get(text, 0.0) + activation
        return tuple(sorted(sums, key=lambda text: -sums[text])[: whole_number(count, "count", 0)])

    def _window(self, row: int) -> Window:
        first, last = (int(ends[0]) for ends in self._spans([row]))
        return Window(
            feature=int(self.feature[row]),
            kind=KINDS[self.kind[row]],
            activation=float(self.activations[row, self.place[row]]),
            tokens=tuple(self.vocabulary[i] if i >= 0 else LEFT_OUT for i in self.tokens[row, first:last].tolist()),
            activations=tuple(self.activations[row, first:last].tolist()),
            place=int(self.place[row]) - first,
            document=self.documents[self.document[row]],
            position=int(self.position[row]),
        )

    def _spans(self, rows: Sequence[int] | slice) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Where windows' tokens begin and end."""
        known = self.tokens[rows] >= 0
        return known.argmax(axis=1), known.shape[1] - known[:, ::-1].argmax(axis=1)

    def headline(self) -> str:
        of = f"{len(self.live):,} of {self.n_features:,} features"
        return f"{len(self.feature):,} windows of {of} at {self.site or 'a site'}, out of {self.n_tokens:,} tokens"

    def to_frame(self, table: str = "") -> pd.DataFrame:
        """All windows."""
        return super().to_frame(table) if table else self.to_table().to_pandas()

    def to_table(self) -> pa.Table:
        """One row per window; what belongs to all of them is in the schema's metadata."""
        about = {"format": FORMAT, **{name: getattr(self, name) for name in _ABOUT}}
        first, last = self._spans(slice(None))
        starts = np.append(0, np.cumsum(last - first)).astype(np.int32)
        slot = np.arange(self.tokens.shape[1])
        inside = (slot >= first[:, None]) & (slot < last[:, None])
        texts = pa.DictionaryArray.from_arrays(  # -1 is the last of the texts
            pa.array(self.tokens[inside] % (len(self.vocabulary) + 1), pa.int32()),
            pa.array([*self.vocabulary, LEFT_OUT], pa.string()),
        )
        rows = np.arange(len(self.feature))
        columns = {
            "feature": self.feature,
            "window": pa.DictionaryArray.from_arrays(pa.array(self.kind, pa.int8()), list(KINDS)),
            "activation": self.activations[rows, self.place],
            "document": pa.DictionaryArray.from_arrays(pa.array(self.document), pa.array(self.documents, pa.string())),
            "position": self.position,
            "place": (self.place - first).astype(np.int32),
            "tokens": pa.ListArray.from_arrays(pa.array(starts), texts.cast(pa.string())),
            "activations": pa.ListArray.from_arrays(pa.array(starts), pa.array(self.activations[inside])),
        }
        return pa.table(columns).replace_schema_metadata({"trimtab.feature_examples": json.dumps(about)})

    def write(self, path: str | Path) -> None:
        """Write the table as Parquet, whole. Raises `UserError` if the disk refuses."""
        write_table(path, self.to_table())

    @classmethod
    def read(cls, path: str | Path, *, n_features: int | None = None) -> FeatureExamples:
        """Read `feature_examples.parquet`.

        Raises:
            UserError: the file is missing or damaged, is another kind of table, or not of `n_features` features.
        """
        path = as_path(path, "the table")
        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {})[b"trimtab.feature_examples"])
            if about["format"] != FORMAT:
                raise UserError(str(path), f"it has format {about['format']}, this version reads {FORMAT}", _AGAIN)
            found = cls(**_columns(table), **{name: kind(about[name]) for name, kind in _ABOUT.items()})
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(str(path), "no such file", _AGAIN) from None
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(str(path), f"not readable as examples of features ({reason})", _AGAIN) from error
        if n_features is not None and found.n_features != n_features:
            raise UserError(str(path), f"it describes {found.n_features} features, not {n_features}", _AGAIN)
        if not np.isfinite(found.activations).all():
            raise UserError(f"column activations of {path}", "it holds values that are not finite", _AGAIN)
        return found


def _columns(table: pa.Table) -> dict[str, Any]:
    """Columns of the file as those of `FeatureExamples`."""
    flat = {name: table.column(name).combine_chunks() for name in table.column_names}
    starts = flat["tokens"].offsets.to_numpy().astype(np.int64)
    lengths = np.diff(starts)
    width = int(lengths.max(initial=1))
    inside = np.arange(width) < lengths[:, None]
    texts = flat["tokens"].values.dictionary_encode()
    words: list[str] = texts.dictionary.to_pylist()
    ids = texts.indices.to_numpy(zero_copy_only=False).astype(np.int32)
    if LEFT_OUT in words:  # a token of that text, which stands for itself, reads the same
        ids = np.where(ids == words.index(LEFT_OUT), -1, ids)
    tokens = np.full(inside.shape, -1, dtype=np.int32)
    activations = np.zeros(inside.shape, dtype=np.float32)
    tokens[inside] = ids
    activations[inside] = flat["activations"].values.to_numpy()
    document = flat["document"].cast(pa.string()).dictionary_encode()
    kinds = flat["window"].cast(pa.string()).to_pylist()
    return {
        "feature": flat["feature"].to_numpy().astype(np.int32),
        "kind": np.array([KINDS.index(kind) for kind in kinds], dtype=np.int8),
        "document": document.indices.to_numpy(zero_copy_only=False).astype(np.int32),
        "position": flat["position"].to_numpy().astype(np.int32),
        "place": flat["place"].to_numpy().astype(np.int32),
        "tokens": tokens,
        "activations": activations,
        "documents": tuple(document.dictionary.to_pylist()),
        "vocabulary": tuple(words),
    }

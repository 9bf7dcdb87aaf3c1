"""The explanation score: how well a judge's explanation of a feature tells where it fires, from an autointerp run.

It is read from a table, which puts interpretability beside the criteria of what steers. Any Parquet or CSV table does
that has the columns `feature` and `score`, one row per feature; what the score measures is the table's affair.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.errors import UserError
from trimtab.runs import read_record
from trimtab.selection.criterion import ScoringTarget, StatisticCriterion

SCORES_FILE = "autointerp.parquet"
"""The table in a run of `trimtab autointerp`."""
_COLUMNS = {"feature": pa.int64(), "score": pa.float64()}


@dataclass(frozen=True, kw_only=True)
class ExplanationScore(StatisticCriterion):
    """The score that a table has of each feature's explanation, in the table's unit."""

    name: ClassVar[str] = "explanation-score"

    explanations: str = ""
    """A run of `trimtab autointerp`, or a table."""

    def __post_init__(self) -> None:
        if not self.explanations:
            why = "it reads how well explanations of features did, and no table of that is named"
            raise UserError(
                "criterion explanation-score", why, "name a run of `trimtab autointerp`: --explanations RUN"
            )

    def scores(self, target: ScoringTarget) -> Float[Tensor, " n"]:
        _check_same_dictionary(Path(self.explanations), target.dictionary)
        known, features = read_scores(self.explanations), target.features.tolist()
        missing = [feature for feature in features if feature not in known]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            why = f"they have no score of feature {missing[0]}{more}"
            raise UserError(f"explanations {self.explanations}", why, "rank only features that they score")
        return torch.tensor([known[feature] for feature in features], dtype=torch.float64)


def read_scores(path: str | Path) -> dict[int, float]:
    """Scores by feature; features without one are left out.

    Args:
        path: a table, or a run that holds `autointerp.parquet`.

    Raises:
        UserError: there is no such file, it is no table or has not the columns, or a feature has several rows.
    """
    path = scores_file(path)
    hint = "give a run of `trimtab autointerp`, or a Parquet or CSV table with the columns feature and score"
    try:
        table = (csv.read_csv if path.suffix == ".csv" else pq.read_table)(str(path))
        features, scores = (table[name].cast(kind).to_pylist() for name, kind in _COLUMNS.items())
    except FileNotFoundError:
        raise UserError(f"explanations {path}", "no such file", hint) from None
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"explanations {path}", f"not readable as scores of features ({reason})", hint) from error
    (feature, times), *_ = Counter(features).most_common(1) or [(None, 0)]
    if times > 1:
        raise UserError(f"explanations {path}", f"feature {feature} has {times} rows", "keep one row per feature")
    return {f: score for f, score in zip(features, scores, strict=True) if score is not None and score == score}


def scores_file(path: str | Path) -> Path:
    """The table that is named, or that of the run that is named."""
    path = Path(path)
    return path / SCORES_FILE if path.is_dir() else path


def _check_same_dictionary(path: Path, dictionary: Dictionary) -> None:
    """Raise a `UserError` if a run says that its scores are of another dictionary's features."""
    if not (path / "run.json").is_file() or dictionary.W_dec.dtype != torch.float32:
        return
    hashes: dict[str, str] = read_record(path).get("hashes", {})
    of = [value for name, value in hashes.items() if name.startswith("dictionary")]
    if of and dictionary.fingerprint not in of:
        raise UserError(
            f"explanations {path}", "they are of another SAE's features", "score explanations of this one's"
        )

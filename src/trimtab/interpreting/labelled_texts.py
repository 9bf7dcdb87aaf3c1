"""Labelled texts that say how good a judge of features is: concepts, texts to explain them by and texts to test on.

AxBench (arXiv 2501.17148) has them as Parquet: `*_train_data.parquet` with 72 answers that have each concept and 216
that have none, `*_latent_eval_data.parquet` with 36 of either and a few hard negatives, in which a word of the concept
stands in another sense. The data are not part of trimtab.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trimtab.errors import UserError
from trimtab.interpreting.judge import Exemplars
from trimtab.interpreting.judges.rating import as_passage
from trimtab.runs import as_path, text_id

TextKind = Literal["positive", "negative", "hard negative", "other concept"]
KINDS: tuple[TextKind, ...] = get_args(TextKind)
TRAIN, TEST = "_train_data.parquet", "_latent_eval_data.parquet"
_COLUMNS = ("input", "output", "output_concept", "category", "concept_id")
_NO_CONCEPT = -1


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """An answer, and whether it has a concept."""

    text: str
    instruction: str
    kind: TextKind
    """`positive` has it; the others lack it: plain answers, answers with a word of it in another sense, answers that
    have another concept."""

    @property
    def has(self) -> bool:
        return self.kind == "positive"


@dataclass(frozen=True, kw_only=True)
class LabelledConcept:
    """A concept and its texts."""

    exemplars: Exemplars
    """To explain it by."""
    texts: tuple[LabelledText, ...]
    """To test on; none of them is an exemplar."""
    plain: tuple[str, ...]
    """Answers that have no concept and are neither exemplars nor among the texts."""


def read_axbench(
    directory: Path | str,
    *,
    having: int | None = None,
    lacking: int = 144,
    others: int = 36,
    most: int | None = None,
    seed: int = 0,
) -> list[LabelledConcept]:
    """Labelled texts of all concepts in AxBench's files of a directory and those below it.

    Args:
        directory: with pairs of files of the same beginning.
        having: exemplars with a concept; all by default.
        lacking: exemplars without the concept: half of them plain answers (three in four of
            those that there are, at most), half answers with other concepts.
        others: texts with other concepts to test each concept on.
        most: concepts at most of each pair of files.
        seed: of the draws.

    Raises:
        UserError: there is no such pair of files, or one is not what AxBench's are.
    """
    path = as_path(directory, "AxBench's texts")
    found: list[LabelledConcept] = []
    for train in sorted(path.rglob(f"*{TRAIN}")):
        test = train.with_name(train.name.removesuffix(TRAIN) + TEST)
        found += _concepts(_rows(train), _rows(test), (having, lacking, others), most, np.random.default_rng(seed))
    if not found:
        why = f"no *{TRAIN} lies there"
        raise UserError(f"labelled texts {path}", why, "name a directory of AxBench's data")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path, columns=list(_COLUMNS)).to_pylist()
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "AxBench's files come in pairs") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(str(path), f"not readable as AxBench's texts ({reason})", "give another") from error


def _concepts(
    train: Sequence[dict[str, Any]],
    test: Sequence[dict[str, Any]],
    counts: tuple[int | None, int, int],
    most: int | None,
    rng: np.random.Generator,
) -> list[LabelledConcept]:
    having, lacking, others = counts
    plain = [row["output"] for row in train if row["concept_id"] == _NO_CONCEPT]
    if len(plain) < 2:
        raise UserError("AxBench's texts", f"{len(plain)} have no concept", "give at least 2 of concept -1")
    ids = sorted({row["concept_id"] for row in train} - {_NO_CONCEPT})[:most]
    found: list[LabelledConcept] = []
    for concept in ids:
        has = [row for row in train if row["concept_id"] == concept][:having]
        with_other = [row["output"] for row in train if row["concept_id"] not in (concept, _NO_CONCEPT)]
        lacks = _draw(plain, min(lacking // 2, len(plain) - 1 - len(plain) // 4), rng)
        rest = sorted(set(plain) - set(lacks))
        mixed = _draw([*lacks, *_draw(with_other, len(lacks), rng)], lacking, rng)
        own = [(row, row["category"]) for row in test if row["concept_id"] == concept]
        foreign = [row for row in test if row["concept_id"] != concept and row["category"] == "positive"]
        tested = [*own, *((row, "other concept") for row in _draw(foreign, others, rng))]
        exemplars = Exemplars(
            name=has[0]["output_concept"],
            has=tuple(as_passage(row["output"]) for row in has),
            lacks=tuple(map(as_passage, mixed)),
        )
        texts = [LabelledText(text=row["output"], instruction=row["input"], kind=kind) for row, kind in tested]
        known = {*(row["output"] for row in has), *mixed}
        found.append(
            LabelledConcept(
                exemplars=exemplars,
                texts=tuple(one for one in texts if one.kind in KINDS and one.text not in known),
                plain=tuple(rest),
            )
        )
    return found


def labelled_hash(labelled: Sequence[LabelledConcept]) -> str:
    """Of all concepts, exemplars and texts."""
    parts = [
        [one.exemplars.name, *(p.text for p in one.exemplars.has), *(t.text for t in one.texts)] for one in labelled
    ]
    return text_id(json.dumps(parts))


def _draw(of: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    return [of[i] for i in rng.permutation(len(of))[:count]]

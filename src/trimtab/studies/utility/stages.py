"""The stages of a study of utility, each safe to repeat: plain functions from a config and a shard to files.

Each writes one run of the command that does the same by hand, so that a cell can be looked at by itself.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from trimtab.activations import Document, tokenise
from trimtab.dictionaries.config import load_dictionary
from trimtab.dictionaries.files import EXAMPLES_FILE
from trimtab.errors import UserError
from trimtab.features.collecting import ExampleOptions, examples_of_text
from trimtab.interpreting.autointerp import read_scores
from trimtab.interpreting.autointerp_command import AutointerpConfig, run_autointerp
from trimtab.interpreting.axbench import AxBenchConfig, run_axbench
from trimtab.interpreting.calibration_command import CalibratedJudgeConfig
from trimtab.lm import ModelConfig
from trimtab.runs import part_of
from trimtab.runs.record import RECORD_NAME
from trimtab.selection.command import TABLE_FILE, RankConfig, run_rank
from trimtab.selection.explanation_score import SCORES_FILE
from trimtab.training.bank import MEMBERS, Place, unfinished
from trimtab.training.bank_table import TABLE
from trimtab.training.command import BankConfig, train_bank

WINDOW = 21
"""Tokens of the windows that judges read."""
HALVES = ("interpreted", "steered")
"""Of the text: windows that features are interpreted by, and that steered text is read for."""


Stage = Callable[[Any, Any], Iterable[Path]]


def contained(stage: Stage) -> Stage:
    """A stage whose own mistakes end one cell and not the study: they are shown, and told as why the cell failed."""

    @wraps(stage)
    def safely(config: Any, shard: Any) -> Iterable[Path]:
        try:
            return stage(config, shard)
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            traceback.print_exc()
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(stage.__name__, why, "the traceback is above") from error

    return safely


@dataclass(frozen=True, kw_only=True)
class Bank:
    """SAEs that are trained from one stream of activations."""

    number: int
    config: BankConfig

    @property
    def path(self) -> Path:
        return self.config.directory()

    @property
    def label(self) -> str:
        return f"bank {self.number}, {self.config.model}"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The SAEs of a bank that are there: one that joins later makes windows for all anew."""

    bank: Bank
    names: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.bank.label


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One SAE of a study."""

    bank: int
    name: str
    sae: Path
    directory: Path
    """Where its runs go."""
    model: dict[str, Any]
    """Fields of `ModelConfig`."""

    @property
    def label(self) -> str:
        return f"{self.model['model']}, {self.name}"

    @property
    def autointerp(self) -> Path:
        return self.directory / "autointerp"

    @property
    def ranking(self) -> Path:
        return self.directory / "rank"

    @property
    def axbench(self) -> Path:
        return self.directory / "axbench"

    def examples(self, half: str) -> Path:
        """Table of windows in half of the text."""
        return self.directory / half / EXAMPLES_FILE

    def features(self) -> tuple[int, ...]:
        """Those that were interpreted."""
        return tuple(score.feature for score in read_scores(self.autointerp / SCORES_FILE))


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Config of `collect`."""

    top: int
    weighted: int
    limit_tokens: int | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Interpreting(CalibratedJudgeConfig):
    """Config of `interpret`."""

    features: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Config of `rank`."""

    criterion: tuple[str, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Steering(CalibratedJudgeConfig):
    """Config of `steer`."""

    factor: tuple[float, ...]
    instructions: Path | None
    n_instructions: int
    max_new_tokens: int
    batch_size: int
    dtype: str
    seed: int


@contained
def train(_config: None, bank: Bank) -> Iterable[Path]:
    """Train the SAEs of a bank that are not trained yet.

    Raises:
        UserError: one of them failed; the others are there.
    """
    trained = train_bank(bank.config)
    assert trained is not None
    if trained.problem is not None:
        raise trained.problem
    return [trained.run / TABLE]


@contained
def collect(config: Windows, trained: Trained) -> Iterable[Path]:
    """Windows of text in which the features of a bank's SAEs fire: two tables for each, of different documents, so that
    what a judge interprets a feature by is not what it reads steered text for."""
    of = trained.bank.config
    model, cells = of.load_model(), cells_of(trained.bank)
    documents = of.documents(of.text, of.limit_documents)
    options = ExampleOptions(
        top=config.top, weighted=config.weighted, random=2, window=WINDOW, seed=config.seed, context=of.context,
        batch_size=of.model_batch_size, autocast=of.autocast, outlier_norm=of.outlier_norm,
    )  # fmt: skip
    saes = [load_dictionary(str(cell.sae), model=model, device=model.device) for cell in cells]
    files = []
    for documents_of_half, name in zip(halves(documents), HALVES, strict=True):
        corpus = tokenise(documents_of_half, model.tokenizer, limit_tokens=config.limit_tokens)
        found = examples_of_text(model, saes, corpus, options)
        for cell, (examples, _) in zip(cells, found, strict=True):
            files.append(cell.examples(name))
            examples.write(files[-1])
    return files


@contained
def interpret(config: Interpreting, cell: Cell) -> Iterable[Path]:
    """How well a judge that is shown some windows tells where features fire."""
    run_autointerp(
        AutointerpConfig(
            **cell.model, **part_of(config, CalibratedJudgeConfig), sae=(str(cell.sae),), features=config.features,
            examples=cell.examples(HALVES[0]), seed=config.seed, run=cell.autointerp,
        )
    )  # fmt: skip
    return [cell.autointerp / RECORD_NAME, cell.autointerp / SCORES_FILE]


@contained
def rank(config: Ranking, cell: Cell) -> Iterable[Path]:
    """Scores of the same features by criteria."""
    run_rank(
        RankConfig(
            **cell.model, sae=str(cell.sae), criterion=config.criterion, feature=cell.features(), live_only=False,
            seed=config.seed if "random" in config.criterion else None, run=cell.ranking,
        )
    )  # fmt: skip
    return [cell.ranking / RECORD_NAME, cell.ranking / TABLE_FILE]


@contained
def steer(config: Steering, cell: Cell) -> Iterable[Path]:
    """What steering with the same features brings about."""
    run_axbench(
        AxBenchConfig(
            **{**cell.model, "dtype": config.dtype}, **part_of(config, CalibratedJudgeConfig), sae=str(cell.sae),
            arm=("features",), batch_size=config.batch_size,
            feature=cell.features(), factor=config.factor, examples=cell.examples(HALVES[1]),
            instructions=config.instructions, n_instructions=config.n_instructions,
            max_new_tokens=config.max_new_tokens, ranking=cell.ranking, seed=config.seed, run=cell.axbench,
        )
    )  # fmt: skip
    return [cell.axbench / RECORD_NAME]


def halves(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Documents in two parts that share none: every second one, and of a file that was cut into pieces the first half
    of it in one part and the rest in the other."""
    files: dict[str, list[Document]] = {}
    for document in documents:
        file, cut, _ = document.id.rpartition("#")
        files.setdefault(file if cut else document.id, []).append(document)
    parts: tuple[list[Document], list[Document]] = [], []
    for number, pieces in enumerate(files.values()):
        middle = (len(pieces) + number % 2) // 2
        parts[0].extend(pieces[:middle])
        parts[1].extend(pieces[middle:])
    return parts


def cells_of(bank: Bank) -> list[Cell]:
    """The SAEs of a bank that are trained."""
    left = {member.name for member in unfinished(bank.config.members, Place(bank.path, bank.config.device))}
    return [
        Cell(
            bank=bank.number, name=member.name, sae=bank.path / MEMBERS / member.name / "sae",
            directory=bank.path.parent.parent / "cells" / f"{bank.number}-{member.name}",
            model=part_of(bank.config, ModelConfig),
        )
        for member in bank.config.members
        if member.config is not None and member.name not in left
    ]  # fmt: skip

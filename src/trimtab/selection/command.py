"""`trimtab rank`: load a model and an SAE, rank the SAE's features, and write the tables into a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.dictionaries import AnyModelConfig
from trimtab.dictionaries.meanings import name_features
from trimtab.errors import UserError, named
from trimtab.runs import (
    LEFT_OUT_AT_DEFAULT,
    Meter,
    Run,
    SourceName,
    check_choices,
    check_least,
    config_directory,
    sha256_file,
)
from trimtab.runs.results import Result
from trimtab.runs.tables import Column, Table
from trimtab.selection.criterion import Criterion, PrefixCriterion
from trimtab.selection.explanation_score import read_scores, scores_file
from trimtab.selection.feature_table import FeatureTable, read_feature_tables, side_by_side, write_feature_tables
from trimtab.selection.kl import KLDirection
from trimtab.selection.ranking import TOP_TOKENS, dictionary_site, features_to_rank, rank_by
from trimtab.selection.registry import make_criteria
from trimtab.selection.scorer import BATCH_SIZE
from trimtab.selection.scoring import passes
from trimtab.steering import Unit

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

TABLE_FILE = "features.parquet"


@dataclass(frozen=True, kw_only=True)
class RankConfig(AnyModelConfig):
    """Rank an SAE's features by what amplifying them does to the next token."""

    criterion: tuple[str, ...] = ("delta-confidence",)
    """delta-confidence, output-score, kl, entropy-change, gradient-attribution, input-score, lens-concentration,
    explanation-score, max-activation, firing-rate, random, or your own as module:Class; several rank side by side."""
    site: str | None = None
    """Where features are amplified; by default the site that the SAE names."""
    prefix: tuple[str, ...] | None = None
    """Texts at whose last token features are amplified, scores averaged; by default "From my experience,"."""
    dose: float | None = None
    """How strongly features are amplified, in `unit`; 10 times the feature's largest activation by default."""
    unit: Unit | None = field(default=None, metadata=LEFT_OUT_AT_DEFAULT)
    """What the dose is a multiple of: max_activation (the feature's largest, the default), relative (the activation's
    norm) or absolute (1); the last two need a dose and no statistics."""
    confidence_k: int | None = None
    """k of delta-confidence and gradient-attribution: the tokens over which they average; 1 by default."""
    n_tokens: int | None = None
    """Tokens that a feature stands for in output and input score; 20 by default."""
    explanations: SourceName | None = field(default=None, metadata=LEFT_OUT_AT_DEFAULT)
    """Run of `trimtab autointerp`, or table with the columns feature and score, for explanation-score."""
    kl_direction: KLDirection | None = None
    """KL(steered ‖ base), the default, or KL(base ‖ steered)."""
    seed: int | None = None
    """Of the random criterion; 0 by default."""
    feature: tuple[int, ...] | None = None
    """Rank these features only; by default all, or those that the explanations score."""
    live_only: bool = True
    """Leave out features that never fired over the statistics' corpus, where there are statistics."""
    top_tokens: int = TOP_TOKENS
    """Tokens per feature that the logit lens names."""
    limit: int = 10
    """Rows to print of each end of a ranking."""
    batch_size: int = BATCH_SIZE
    """Features that go through the layers together."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.unit not in (None, "max_activation") and self.dose is None:
            raise UserError(f"unit {self.unit}", "it has no usual dose", "give one, like --dose 0.4")
        self.criteria()
        check_least(self, 1, "top_tokens", "limit", "batch_size")

    def criteria(self) -> list[Criterion]:
        """The criteria with their settings."""
        shared = {name: getattr(self, name) for name in ("dose", "unit", "n_tokens", "kl_direction", "seed")}
        own = {"k": self.confidence_k, "prefixes": self.prefix, "explanations": self.explanations}
        return make_criteria(self.criterion, {**shared, **own})

    def needed(self) -> tuple[str, ...]:
        scored = any(isinstance(criterion, PrefixCriterion) for criterion in self.criteria())
        return ("logit-lens", "prefix") if scored else ("logit-lens",)

    def directory(self) -> Path:
        """Where the run goes: the same config always finds its own run."""
        return self.run or config_directory("rank", self, ignore=_NOT_THE_RESULT)


_NOT_THE_RESULT = ("run", "limit", "batch_size", "any_model")
"""Fields that may differ between openings of one run."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RankResult(Result):
    """What was ranked, and the rankings, one per criterion."""

    model: str
    sae: str
    site: str
    n_features: int
    """Features of the SAE."""
    n_ranked: int
    """Features that were ranked."""
    rankings: tuple[FeatureTable, ...]
    limit: int
    run: Path
    resumed: bool
    """Whether the run was done before, and its tables were read back."""

    @property
    def table_path(self) -> Path:
        return self.run / TABLE_FILE

    def __getitem__(self, criterion: str) -> FeatureTable:
        return named({table.criterion: table for table in self.rankings}, criterion, "ranking")

    def headline(self) -> str:
        return f"{self.n_ranked:,} of {self.n_features:,} features of {self.sae} at {self.site} of {self.model}"

    def tables(self) -> dict[str, Table]:
        """Both ends of each signed ranking, the upper end of the others; before them, if there are several, all scores
        of the features at the ends of the first."""
        found = (ranking.ends(self.limit) for ranking in self.rankings)
        ends = {table.title: table for ends in found for table in ends.values()}
        return {"side by side": self._side_by_side(), **ends} if len(self.rankings) > 1 else ends

    def _side_by_side(self) -> Table:
        rows, first = side_by_side(self.rankings).to_pylist(), self.rankings[0]
        shown = rows[: self.limit]
        if first.signed:
            shown += rows[max(self.limit, len(rows) - self.limit) :]
        scores = [Column(table.criterion, itemgetter(table.criterion), ".4g") for table in self.rankings]
        title = f"all criteria, ordered by {first.criterion}"
        return Table(columns=[Column("feature", "feature", "d", whole=True), *scores], rows=shown, title=title)

    def to_frame(self, table: str = "") -> pd.DataFrame:
        """All features, one row each with its score by every criterion; or those that a table shows."""
        return super().to_frame(table) if table else side_by_side(self.rankings).to_pandas()

    def render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(super().render(), Text(f"{self.table_path}{' (done before)' if self.resumed else ''}"))

    def to_json(self) -> dict[str, Any]:
        """Both ends of each ranking as plain values; all rows are in the Parquet table."""
        return {
            "model": self.model,
            "sae": self.sae,
            "site": self.site,
            "n_features": self.n_features,
            "n_ranked": self.n_ranked,
            "table": str(self.table_path),
            "resumed": self.resumed,
            "criteria": {
                table.criterion: {"top": table.top(self.limit).records(), "bottom": table.bottom(self.limit).records()}
                for table in self.rankings
            },
        }


def run_rank(config: RankConfig) -> RankResult:
    """Rank what the config names; a run that is done is read back.

    Raises:
        UserError: anything that the user named is wrong; see `load_model`, `load_dictionary`, `rank_by`, `Run.open`.
    """
    criteria = config.criteria()
    model, dictionary = config.load()
    site = dictionary_site(model, dictionary, config.site)
    wanted, hashes = config.feature, {"model": model.fingerprint, "dictionary": dictionary.fingerprint}
    if config.explanations is not None:
        wanted = wanted or tuple(sorted(read_scores(config.explanations)))
        hashes["explanations"] = sha256_file(scores_file(config.explanations))
    ids = features_to_rank(dictionary, wanted, live_only=config.live_only)
    with Run.open(config.directory(), "rank", config, device=config.device, ignore_fields=_NOT_THE_RESULT) as run:
        run.record(hashes=hashes)
        if run.done:
            tables = read_feature_tables(run.file(TABLE_FILE))
        else:
            with Meter("scoring features", len(ids) * len(passes(criteria))) as meter:
                tables = rank_by(
                    model,
                    dictionary,
                    criteria,
                    site=site,
                    features=ids.tolist(),
                    live_only=False,
                    top_tokens=config.top_tokens,
                    batch_size=config.batch_size,
                    progress=meter.advance,
                )
            write_feature_tables(run.file(TABLE_FILE), tables)
            ends = [
                part for t in tables for part in (t.top(config.limit), t.bottom(config.limit) if t.signed else t.top(0))
            ]
            name_features(run, model, dictionary, (i for part in ends for i in part.feature))
        result = RankResult(
            model=config.model,
            sae=config.sae,
            site=str(site),
            n_features=dictionary.n_features,
            n_ranked=len(ids),
            rankings=tuple(tables),
            limit=config.limit,
            run=run.path,
            resumed=run.done,
        )
        if not run.done:
            run.finish(result.to_json())
    return result

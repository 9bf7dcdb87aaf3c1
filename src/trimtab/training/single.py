"""Training of one SAE: in a run, or on texts in memory, where nothing is kept unless asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.activations import Document, HarvestOptions, as_documents, harvest, tokenise
from trimtab.dictionaries import SAE, load_dictionary
from trimtab.dictionaries.precision import precision_on
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site
from trimtab.lm.model import check_is_model
from trimtab.runs import (
    Run,
    config_dict,
    field_types,
    json_safe,
    kept_or_temporary,
    read_keywords,
    read_metrics,
    read_typed,
)
from trimtab.runs.figures import Curve, plot_curves
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, SHARE, Column, Table
from trimtab.training.bank import open_run
from trimtab.training.checkpoint import discard_checkpoints
from trimtab.training.config import TrainConfig
from trimtab.training.loop import train
from trimtab.training.result import TrainResult
from trimtab.training.rows import SiteRows
from trimtab.training.sources import NOTHING_HELD_OUT, SHARDS, harvest_text_of, shard_rows
from trimtab.training.trainer import CHECKPOINTS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainedSAE(Result):
    """A trained SAE and what it does on held-out rows."""

    result: TrainResult
    sae: SAE
    """The SAE, with its statistics."""
    metrics: list[dict[str, Any]]
    """What was logged while it was trained."""
    run: Path | None
    """The run's directory; None if none was asked for."""
    resumed: bool = False
    """Whether the run was done before."""
    harvest_bytes: int = 0
    """Size of the activations that were kept in the run."""

    @classmethod
    def of(cls, run: Run, *, resumed: bool, kept: bool = True) -> TrainedSAE:
        """What a run that is done holds; not all of it may be kept."""
        result = read_typed(TrainResult, run.results, f"run {run.path}")
        sae = load_dictionary(result.sae)
        sae.name = sae.name if kept else f"{sae.architecture} SAE of {sae.n_features:,} features"
        path = run.path if kept else None
        return cls(result=result, sae=sae, metrics=read_metrics(run.path), run=path, resumed=resumed)

    def headline(self) -> str:
        r = self.result
        where = "held-out" if r.heldout else "training"
        return (
            f"explained variance {r.variance_text}, L0 {r.l0:.2f}, dead {r.dead_share:.2%}, "
            f"dense {r.dense_share:.2%} on {r.measured_rows:,} {where} rows"
        )

    def tables(self) -> dict[str, Table]:
        return {"result": Table(columns=_COLUMNS, rows=[self.result], caption=self.result.advice)}

    def to_frame(self, table: str = "") -> pd.DataFrame:
        """What was logged, one row for each logged step; or the table `result`."""
        import pandas as pd

        return super().to_frame(table) if table else pd.DataFrame(self.metrics)

    def draw(self, ax: Axes) -> None:
        """Explained variance over the training."""
        points = [(line["step"], line["explained_variance"]) for line in self.metrics]
        steps, values = zip(*points, strict=True) if points else ((), ())
        plot_curves(ax, [Curve("explained variance", steps, values)], "explained variance", steps="step")

    def render(self) -> str:
        """The result in a few lines."""
        r = self.result
        lines = [
            f"{self.sae.name}{' (done before)' if self.resumed else ''}",
            f"  trained on {r.rows:,} rows in {r.steps:,} steps, {r.seconds:.0f} s",
            f"  {self.headline()}",
            *([f"  {r.advice}"] if r.advice else []),
            *(harvest_text_of(self.run / SHARDS, self.harvest_bytes) if self.run else []),
            *([f"  next: trimtab evaluate core --sae {r.sae}"] if self.run else []),
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        beside = {"run": str(self.run), "resumed": self.resumed, "harvest_bytes": self.harvest_bytes}
        return {**json_safe(asdict(self.result)), **beside}


_COLUMNS = [
    Column("explained variance", "explained_variance", ".4f"),
    Column("L0", "l0", ".2f"),
    Column("L0 asked for", "l0_target", "g"),
    Column("dead", "dead_share", SHARE),
    Column("dense", "dense_share", SHARE),
    Column("rows", "rows", COUNT),
    Column("steps", "steps", COUNT),
    Column("seconds", "seconds", ".0f"),
]


def train_one(run: Run, config: TrainConfig, rows: SiteRows, device: str) -> None:
    """Train an SAE in an open run, and finish the run. Raises a `UserError` as `train` does."""
    run.finish(train(config, rows.source, run, heldout=rows.heldout, device=device))
    discard_checkpoints(run.file(CHECKPOINTS))


def train_sae(
    model: LanguageModel,
    texts: Iterable[str | Document],
    site: Site | str,
    *,
    harvest_options: HarvestOptions | None = None,
    run: Path | str | None = None,
    **options: Any,
) -> TrainedSAE:
    """Train an SAE on a model's activations over texts.

    Args:
        model: the model; training computes where it is.
        texts: each is a document, which is trained on or held out as a whole.
        site: where to read.
        harvest_options: which rows: context, share held out, outliers.
        run: directory to keep harvest, metrics and SAE in; the same call again goes on from there. Without one nothing
            is kept but what is returned.
        options: fields of `TrainConfig`, such as `arch`, `n_features`, `l0`, `epochs`, `lr` and `seed`, and the
            architecture's own.

    Returns:
        The SAE in `sae`, what it does on held-out rows, what was logged in `metrics`. Where no sequence of held-out
        texts fills, it is measured on training rows, with a warning.

    Raises:
        UserError: a value is not allowed, there is too little text, rows are not finite, or the run is of other
            settings.
    """
    check_is_model(model)
    config = TrainConfig(**read_keywords(options, field_types(TrainConfig), train_sae))
    rows_of = harvest_options or HarvestOptions()
    if not isinstance(rows_of, HarvestOptions):
        hint = "give trimtab.activations.HarvestOptions(context=…)"
        raise UserError(f"harvest_options {rows_of!r}", "they are no HarvestOptions", hint)
    precision_on(model.device, config.precision)
    place, corpus = model.site(site), tokenise(as_documents(texts), model.tokenizer)
    described = {"site": str(place), **config_dict(config), "harvest": asdict(rows_of)}
    with (
        kept_or_temporary(run) as path,
        open_run(path, described, config.seed, str(model.device)) as opened,
    ):
        opened.record(hashes={"model": model.fingerprint, "corpus": corpus.hash})
        resumed = opened.done
        if not resumed:
            harvest(model, [place], corpus, path / SHARDS, rows_of)
            rows = shard_rows([path / SHARDS], str(place), rows_of.seed)
            if rows_of.holdout and rows.heldout is None:
                remedy = "or hold out a larger share: harvest_options=HarvestOptions(holdout=0.3)"
                warnings.warn(f"{NOTHING_HELD_OUT}, {remedy}", stacklevel=2)
            train_one(opened, config, rows, str(model.device))
        return TrainedSAE.of(opened, resumed=resumed, kept=run is not None)

"""`trimtab evaluate ground-truth`: train every architecture on data whose features are known, and rank them there.

What an SAE of a language model should have found is not known, so that its scores are proxies. Here it is: features are
planted, SAEs are trained on their sums as on a model's activations, and scored by what they found of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from trimtab.activations import LabelledRows, SyntheticConfig, SyntheticSource
from trimtab.dictionaries import load_dictionary
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.precision import Precision, precision_on
from trimtab.distributed import Ranks
from trimtab.evaluation.ground_truth_result import GroundTruthResult, Scored
from trimtab.evaluation.ground_truth_scores import GroundTruthScores, controls, score
from trimtab.runs import LEFT_OUT_AT_DEFAULT, Run, check_least, check_values, part_of, read_typed, write_table
from trimtab.training import Member, SiteRows, expand
from trimtab.training.bank import Place, train_members, unfinished
from trimtab.training.options import architecture_options, with_options

SITE = "synthetic"
TABLE = "ground_truth.parquet"
OPTIONS = architecture_options(**LEFT_OUT_AT_DEFAULT)


@with_options(OPTIONS)
@dataclass(frozen=True, kw_only=True)
class GroundTruthConfig(SyntheticConfig):
    """Rank SAE architectures by what they find in synthetic activations whose features are known."""

    arch: tuple[str, ...] = ()
    """Architectures to train; by default all."""
    l0: tuple[float, ...] = ()
    """Active features per row to aim at; by default as many as truly fire."""
    n_features: int = 384
    """Features to learn."""
    data_sets: int = 5
    """Data sets, each with features, rows and initial weights from a seed of its own, from data_seed on."""
    rows: int = 750_000
    """Rows to train on."""
    heldout_rows: int = 20_000
    """Further rows, to calibrate thresholds on and to score on."""
    batch_size: int = 512
    """Rows per step."""
    lr: float | None = None
    """Adam's peak learning rate; by default that of `trimtab train`."""
    precision: Precision = dataclasses.field(default="auto", metadata=LEFT_OUT_AT_DEFAULT)
    """Of dense matrix products in training: fp32 or bf16."""
    match_cosine: float = 0.8
    """Cosine from which a learned feature counts as a true one."""
    rank_by: Literal["f1", "recovered", "true_to_learned", "matched_cosine", "magnitude_correlation"] = "f1"
    """Score that ranks the architectures."""
    run: Path | None = None
    """Directory to write: the SAEs, their runs and the scores. The same command resumes it; --data-sets may grow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "data_sets")
        check_values(self, "at least batch_size", lambda rows: rows >= self.batch_size, "rows")
        check_least(self, 2, "heldout_rows")
        precision_on("cpu", self.precision)
        check_values(self, "above 0 and at most 1", lambda cosine: 0 < cosine <= 1, "match_cosine")
        errors = [member.error for member in self.members(self.data_seed)]
        if errors[0] is not None and None not in errors:
            raise errors[0]

    @property
    def l0_targets(self) -> tuple[float, ...]:
        """Active features per row to aim at."""
        return self.l0 or (self.true_l0,)

    def data(self, data_seed: int) -> SyntheticConfig:
        """The features of one data set."""
        return SyntheticConfig(**part_of(self, SyntheticConfig) | {"data_seed": data_seed})

    def members(self, data_seed: int) -> list[Member]:
        """The SAEs to train on one data set.

        Raises:
            UserError: an architecture that does not exist, or nothing that can be trained.
        """
        values: dict[str, Sequence[Any]] = {
            "site": [SITE],
            "arch": list(dict.fromkeys(self.arch)) or sorted(TRAINABLE),
            "n_features": [self.n_features],
            "l0": sorted(set(self.l0_targets)),
            "seed": [data_seed],
            "rows": [self.rows],
            "heldout_rows": [self.heldout_rows],
            "batch_size": [self.batch_size],
        }
        chosen = {name: getattr(self, name) for name in ("lr", "precision", *(option.name for option in OPTIONS))}
        return expand(values | {name: [value] for name, value in chosen.items() if value is not None})


def run_ground_truth(config: GroundTruthConfig) -> GroundTruthResult:
    """Train, score and rank.

    A training that fails is reported and does not stop the others. A run may be asked for more data sets, or fewer.

    Raises:
        UserError: an architecture that does not exist, data that cannot be made, a run directory of another config.
    """
    seeds = range(config.data_seed, config.data_seed + config.data_sets)
    if config.run is None:
        with TemporaryDirectory(prefix="trimtab-ground-truth-") as directory:
            return _result(config, _scored(config, seeds, Path(directory)))
    with Run.open(config.run, "evaluate ground-truth", config, ignore_fields=("run", "data_sets")) as run:
        found = read_typed(list[Scored], (run.results or {}).get("scored", []), f"run {config.run}")
        left = [seed for seed in seeds if seed not in {one.data_seed for one in found}]
        if left:
            found += _scored(config, left, run.path)
            _write(run.file(TABLE), found)
            run.record(seeds=sorted({one.data_seed for one in found}))
            run.finish({"scored": [dataclasses.asdict(one) for one in found]})
        result = _result(config, [one for one in found if one.data_seed in seeds])
        return dataclasses.replace(result, run=run.path, resumed=not left)


def _result(config: GroundTruthConfig, scored: Iterable[Scored]) -> GroundTruthResult:
    families = f" ({config.n_parents} with {config.n_children} children each)" if config.n_parents else ""
    return GroundTruthResult(
        description=f"{config.n_true} true features{families} in {config.d} dimensions, {config.true_l0:g} on a row; "
        f"{config.n_features} learned features; {config.data_sets} data sets of {config.rows:,} training rows, scored "
        f"on {config.heldout_rows:,} others",
        rank_by=config.rank_by,
        threshold=config.match_cosine,
        scored=tuple(scored),
    )


def _scored(config: GroundTruthConfig, seeds: Iterable[int], directory: Path) -> Iterator[Scored]:
    for data_seed in seeds:
        data = config.data(data_seed)
        source = SyntheticSource(data, rows_total=config.rows)
        heldout = SyntheticSource(data, rows_total=config.heldout_rows, split="holdout")
        *_, test = heldout.labelled(2 * config.heldout_rows).blocks(config.heldout_rows)  # the first set thresholds
        place = Place(directory / f"data{data_seed}")
        place.directory.mkdir(exist_ok=True)
        members = config.members(data_seed)
        left = unfinished(members, place)
        table = train_members(members, left, {SITE: SiteRows(source, heldout)}, place, Ranks())
        assert table is not None
        for member, row in zip(members, table, strict=True):
            scores, error = dict[str, float | None](), row.error
            if not error:
                try:
                    sae = load_dictionary(row.path)
                    scores = _plain(score(sae, test, source.features, threshold=config.match_cosine))
                except ValueError as found:
                    error = str(found)
            yield Scored(
                dictionary=row.arch,
                kind="trained",
                l0_target=float(member.values["l0"]),
                data_seed=data_seed,
                scores=scores,
                error=error,
            )
        yield from _of_controls(config, source, test)


def _of_controls(config: GroundTruthConfig, source: SyntheticSource, test: LabelledRows) -> Iterator[Scored]:
    sample = source.sample(config.heldout_rows)
    for l0 in sorted(set(config.l0_targets)):
        for name, control in controls(source.features, sample, config.n_features, l0).items():
            of = score(control.dictionary, test, source.features, threshold=config.match_cosine, codes=control.codes)
            yield Scored(
                dictionary=name,
                kind="control",
                l0_target=l0,
                data_seed=source.config.data_seed,
                scores=_plain(of),
            )


def _plain(found: GroundTruthScores) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def _write(path: Path, found: Sequence[Scored]) -> None:
    import pyarrow as pa

    rows = [{**{k: v for k, v in dataclasses.asdict(one).items() if k != "scores"}, **one.scores} for one in found]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_table(path, pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]))

"""Where rows come from: text and a model, through shards on disk or a live stream, or finished harvests."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.activations import HarvestConfig, HarvestOptions, LiveSource, ShardSource, TextConfig, harvest_text
from trimtab.distributed import Ranks
from trimtab.errors import UserError
from trimtab.lm import ModelConfig, check_device
from trimtab.runs import SourceName, part_of
from trimtab.training.rows import SiteRows

SHARDS = "activations"
NOTHING_HELD_OUT = (
    "no document is held out (there are too few, they are too short, or the harvest kept none), and results are "
    "measured on training rows; give more documents"
)


@dataclass(frozen=True, kw_only=True)
class RowsConfig(TextConfig, ModelConfig):
    """What all SAEs of a bank are trained on."""

    text: tuple[SourceName, ...] = ()
    """Files, directories or hub:NAME[[:CONFIG]:SPLIT] to read."""
    limit_documents: int | None = None
    """Read only this many documents."""
    activations: tuple[Path, ...] = ()
    """Directories of finished harvests to train on, instead of text."""
    data_seed: int = 0
    """Seed of the order of rows, shared by a whole bank."""
    keep_harvest: bool = True
    """Keep the activations of the text in the run when all is trained. --no-keep-harvest drops them, also from a run
    that is done; members that join a bank later then need a harvest of their own."""
    live: bool = False
    """Compute activations as they are needed instead of keeping shards in the run; every epoch runs the model again."""
    context: int = 256
    """Tokens of a sequence, the leading BOS included."""
    model_batch_size: int = 8
    """Sequences per forward pass of the model."""
    holdout: float = 0.05
    """Share of the documents kept out of training, on which the result is measured."""
    outlier_norm: float = 10.0
    """Leave out rows whose norm exceeds this many times the median norm."""
    autocast: bool = False
    """Run the model's matrix products in bfloat16; the residual stream keeps its precision."""

    def check(self) -> None:
        """Raise a `UserError` unless the fields go together."""
        if bool(self.text) == bool(self.activations):
            given = "both are given" if self.text else "neither is given"
            raise UserError("--text and --activations", given, "give text to harvest, or finished harvests")
        _ = self.harvest_options()
        check_device(self.device)

    def harvest_options(self) -> HarvestOptions:
        """What decides which rows a harvest gives."""
        return HarvestOptions(
            context=self.context,
            batch_size=self.model_batch_size,
            holdout=self.holdout,
            seed=self.data_seed,
            outlier_norm=self.outlier_norm,
            autocast=self.autocast,
        )


def open_rows(config: RowsConfig, sites: Sequence[str], shards: Path, ranks: Ranks) -> dict[str, SiteRows]:
    """The rows of each site, from one harvest by all ranks: row i is the same token at all of them.

    An unfinished harvest in `shards` goes on. Raises a `UserError` as `load_model`, `read_documents` and `harvest` do.
    """
    if config.live:
        rows = {sites[0]: _live_rows(config, sites)}
    else:
        directories = list(config.activations)
        if not directories:
            directories = [shards]
            named = {"text": config.text, "limit_documents": config.limit_documents, "site": tuple(sites)}
            shared = part_of(config, ModelConfig) | part_of(config, TextConfig)
            options = part_of(config.harvest_options(), HarvestOptions)
            harvest_text(HarvestConfig(**shared, **options, **named, run=shards), ranks=ranks)
        rows = {site: shard_rows(directories, site, config.data_seed) for site in sites}
    if ranks.is_first and config.holdout and any(one.heldout is None for one in rows.values()):
        remedy = "a larger --holdout, or a smaller --document-characters for plain text"
        print(f"trimtab: warning: {NOTHING_HELD_OUT}, {remedy}", file=sys.stderr, flush=True)
    return rows


def end_harvest(shards: Path, keep: bool) -> int:
    """Keep the harvest that a training read, or remove it; its size in bytes, 0 if there is none (any more)."""
    if not keep:
        shutil.rmtree(shards, ignore_errors=True)
    return sum(file.stat().st_size for file in shards.rglob("*") if file.is_file())


def harvest_text_of(shards: Path, size: int) -> list[str]:
    """What is said of a harvest that was kept; no line if there is none."""
    return [f"  kept {size / 1e6:,.1f} MB of activations in {shards} (--no-keep-harvest drops them)"] if size else []


def shard_rows(directories: list[Path], site: str, seed: int) -> SiteRows:
    """The rows of a site from finished harvests, held-out ones apart."""
    source = ShardSource(directories, site=site, seed=seed)
    has_heldout = any(index.rows("holdout") for index in source.indexes)
    return SiteRows(source, ShardSource(directories, site=site, split="holdout", seed=seed) if has_heldout else None)


def _live_rows(config: RowsConfig, sites: Sequence[str]) -> SiteRows:
    if len(sites) > 1:
        raise UserError(
            f"--live with sites {', '.join(sites)}",
            "a live stream runs the model for one site",
            "leave out --live, so that one harvest serves all sites",
        )
    model = config.load_model()
    corpus = config.corpus(config.text, model.tokenizer, config.limit_documents)
    options = config.harvest_options()
    source, *rest = [
        LiveSource(model, sites[0], corpus, split=split, seed=config.data_seed, options=options)
        for split in (("train", "holdout") if config.holdout else ("train",))
    ]
    return SiteRows(source, rest[0] if rest else None)

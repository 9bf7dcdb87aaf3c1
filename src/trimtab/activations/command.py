"""Harvest from names: what is behind `trimtab harvest`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from trimtab.activations.config import TextConfig
from trimtab.activations.harvesting import HarvestResult, harvest
from trimtab.activations.sequences import HarvestOptions
from trimtab.distributed import Ranks
from trimtab.lm import ModelConfig
from trimtab.runs import Run, SourceName, part_of


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(HarvestOptions, TextConfig, ModelConfig):
    """Write a model's activations over text to disk, for trainings to read."""

    text: tuple[SourceName, ...]
    """Files, directories or hub:NAME[[:CONFIG]:SPLIT] to read."""
    run: Path
    """Directory to write; the same command resumes an unfinished harvest there."""
    site: tuple[str, ...] = ("resid_post.15",)
    """Sites to read, all in one pass."""
    dtype: str = "float32"
    """What the model computes in; rows are kept in bfloat16 in any case."""
    limit_documents: int | None = None
    """Read only this many documents."""


def run_harvest(config: HarvestConfig) -> HarvestResult | None:
    """The command: `harvest_text` together with the processes that torchrun started. None on all ranks but the
    first."""
    with Ranks.from_environment() as ranks:
        result = harvest_text(config, ranks=ranks)
        return result if ranks.is_first else None


def harvest_text(config: HarvestConfig, ranks: Ranks | None = None) -> HarvestResult:
    """Load the model, read the text and write the shards, with a bar on stderr; all ranks must call, the first one
    writes.

    Raises a `UserError` as `load_model`, `read_documents` and `harvest` do.
    """
    ranks = ranks or Ranks()
    opened = nullcontext()
    if ranks.is_first:
        opened = Run.open(config.run, "harvest", config, seeds=[config.seed], device=config.device)
    with opened as run:
        model = config.load_model(ranks.device(config.device))
        corpus = config.corpus(config.text, model.tokenizer, config.limit_documents)
        if run is not None:
            left_out = {"bad_records": corpus.bad_records} if corpus.bad_records else {}
            run.record(hashes={"model": model.fingerprint, "corpus": corpus.hash}, **left_out)
        options = HarvestOptions(**part_of(config, HarvestOptions))
        result = harvest(model, config.site, corpus, config.run, options, ranks=ranks)
        if run is not None and not run.done:
            run.finish(result._asdict())
    return result

"""Harvest from names: what is behind `trimtab harvest`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from trimtab.activations.config import TextConfig
from trimtab.activations.harvesting import HarvestProgress, HarvestResult, harvest
from trimtab.activations.sequences import HarvestOptions
from trimtab.distributed import Ranks
from trimtab.lm import ModelConfig
from trimtab.runs import Run, part_of


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(HarvestOptions, TextConfig, ModelConfig):
    """Write a model's activations over text to disk, for trainings to read."""

    text: tuple[str, ...]
    """Files, directories or hub:NAME[:SPLIT] to read."""
    run: Path
    """Directory to write; the same command resumes an unfinished harvest there."""
    site: tuple[str, ...] = ("resid_post.15",)
    """Sites to read, all in one pass."""
    dtype: str = "float32"
    """What the model computes in; rows are kept in bfloat16 in any case."""
    limit_documents: int | None = None
    """Read only this many documents."""


def run_harvest(config: HarvestConfig) -> HarvestResult | None:
    """The command: `harvest_text` together with the processes that torchrun started, if it did.

    Returns:
        What is on disk; None on all ranks but the first.
    """
    with Ranks.from_environment() as ranks:
        result = harvest_text(config, ranks=ranks)
        return result if ranks.is_first else None


def harvest_text(
    config: HarvestConfig, progress: Callable[[HarvestProgress], None] | None = None, ranks: Ranks | None = None
) -> HarvestResult:
    """Load the model, read the text and write the shards.

    Args:
        config: what to read and where to write.
        progress: called after every forward pass, on rank 0; by default a bar on stderr.
        ranks: processes that share the forward passes; all of them must call. Rank 0 writes.

    Raises:
        UserError: anything that the user named is wrong; see `load_model`, `read_documents` and `harvest`.
    """
    ranks = ranks or Ranks()
    with _open_run(config, ranks) as run:
        model = config.load_model(ranks.device(config.device))
        corpus = config.corpus(config.text, model.tokenizer, config.limit_documents)
        if run is not None:
            run.record(hashes={"model": model.fingerprint, "corpus": corpus.hash})
        options = HarvestOptions(**part_of(config, HarvestOptions))
        result = harvest(model, config.site, corpus, config.run, options, progress, ranks)
        if run is not None and not run.done:
            run.finish(result._asdict())
    return result


def _open_run(config: HarvestConfig, ranks: Ranks) -> AbstractContextManager[Run | None]:
    """The run that rank 0 writes; None on the others."""
    if not ranks.is_first:
        return nullcontext()
    return Run.open(config.run, "harvest", config, seeds=[config.seed], device=config.device)

"""Harvest from names: what is behind `trimtab harvest`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

from trimtab.activations.harvest import HarvestProgress, HarvestResult, harvest
from trimtab.activations.packing import tokenise
from trimtab.activations.sequences import HarvestOptions
from trimtab.activations.text import MAX_CHARACTERS, Normalisation, read_documents
from trimtab.distributed import Ranks
from trimtab.lm import load_model
from trimtab.runs import Meter, Run


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(HarvestOptions):
    """A harvest by names and paths."""

    text: tuple[str, ...]
    """Files, directories or hub:NAME[:SPLIT] to read."""
    out: Path
    """Directory to write; the same command resumes an unfinished harvest there."""
    model: str = "smollm2-135m-instruct"
    """Hub id, directory, GGUF file or catalogue name."""
    sites: tuple[str, ...] = ("resid_post.15",)
    """Sites to read, all in one pass."""
    dtype: str = "float32"
    """What the model computes in; rows are kept in bfloat16 in any case."""
    device: str = "cpu"
    """Where the model runs."""
    text_field: str = "text"
    """Key or column that holds the text."""
    normalise: Normalisation = "none"
    """`wikitext` undoes the tokenisation of the WikiText corpora."""
    document_characters: int = MAX_CHARACTERS
    """Longest document that a plain text file is cut into."""
    limit_documents: int | None = None
    """Read only this many documents."""
    limit_tokens: int | None = None
    """Read no document behind this many tokens."""


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
        documents = read_documents(
            config.text,
            text_field=config.text_field,
            limit=config.limit_documents,
            normalise=config.normalise,
            max_characters=config.document_characters,
        )
        model = load_model(config.model, dtype=config.dtype, device=ranks.device(config.device))
        corpus = tokenise(documents, model.tokenizer, limit_tokens=config.limit_tokens)
        if run is not None:
            run.record(hashes={"model": model.fingerprint, "corpus": corpus.hash})
        options = HarvestOptions(**{field.name: getattr(config, field.name) for field in fields(HarvestOptions)})
        with _Bar() as bar:
            result = harvest(model, config.sites, corpus, config.out, options, progress or bar.show, ranks)
        if run is not None and not run.done:
            run.finish(result._asdict())
    return result


def _open_run(config: HarvestConfig, ranks: Ranks) -> AbstractContextManager[Run | None]:
    """The run that rank 0 writes; None on the others."""
    if not ranks.is_first:
        return nullcontext()
    return Run.open(config.out, "harvest", config, seeds=[config.seed], device=config.device)


class _Bar(ExitStack):
    """A bar on stderr, whose length is known once the harvest has packed its text."""

    meter: Meter | None = None

    def show(self, state: HarvestProgress) -> None:
        if self.meter is None:
            self.meter = self.enter_context(Meter("harvesting, sequences", state.total_sequences))
        self.meter.advance(state.sequences - self.meter.completed)

"""`trimtab sae stats`: how strongly and how often an SAE's features fire on a text, in one pass up to the site."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trimtab.activations import TextConfig, sample_text
from trimtab.dictionaries import AnyModelConfig
from trimtab.dictionaries.describing import Firing
from trimtab.dictionaries.files import STATS_FILE
from trimtab.errors import UserError
from trimtab.evaluation.documents import PassOptions, pack
from trimtab.evaluation.reconstruction import reconstruct
from trimtab.runs import Meter, OutputPath, SourceName
from trimtab.runs.tables import named_values
from trimtab.selection.ranking import dictionary_site


@dataclass(frozen=True, kw_only=True)
class SAEStatsConfig(PassOptions, TextConfig, AnyModelConfig):
    """Measure how strongly and how often an SAE's features fire, for doses in max_activation and live features."""

    sae: SourceName = field()
    """Directory of the SAE in any known format, a shipped one's name, or saelens:RELEASE/SAE_ID."""
    site: str | None = None
    """Where it reads; by default the site that the SAE names."""
    text: tuple[SourceName, ...] = ()
    """Files, directories or hub:NAME[[:CONFIG]:SPLIT]; by default a sample that ships with trimtab."""
    into: OutputPath | None = None
    """Directory to write feature_stats.parquet to; by default that of the SAE, where commands look for it."""


@dataclass(frozen=True)
class SAEStats:
    """What was measured, and where it is."""

    path: str
    firing: Firing

    def render(self) -> str:
        return f"{named_values(self.firing.said())}\n{self.path}"


def measure_stats(config: SAEStatsConfig) -> SAEStats:
    """Measure an SAE's features on a text and write their statistics.

    Raises:
        UserError: anything that the user named is wrong, or the SAE is in no directory of its own.
    """
    if config.into is None and not Path(config.sae).is_dir():
        hint = "name a directory with --into, and give it to `trimtab sae convert --stats`"
        raise UserError(f"sae {config.sae!r}", "it is no directory to write statistics to", hint)
    model, dictionary = config.load()
    site = dictionary_site(model, dictionary, config.site)
    corpus = config.corpus(config.text or (sample_text(),), model.tokenizer)
    packed = pack(corpus, config.split, config.holdout, config.context, model)
    with Meter("measuring features", len(packed)) as meter:
        stats = reconstruct(model, dictionary, site, packed, config, meter.advance).stats
    path = (config.into or Path(config.sae)) / STATS_FILE
    stats.write(path)
    return SAEStats(str(path), Firing.of(stats))

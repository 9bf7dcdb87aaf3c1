"""Text → packed tokens → activations → shards on disk or a live stream."""

from trimtab.activations.command import HarvestConfig, harvest_text, run_harvest
from trimtab.activations.config import TextConfig
from trimtab.activations.contexts import Context, FeatureContexts, top_contexts
from trimtab.activations.harvesting import HarvestProgress, HarvestResult, harvest
from trimtab.activations.live import LiveSource
from trimtab.activations.packing import PackedText, TokenisedCorpus, tokenise
from trimtab.activations.row_sources import ActivationSource, ShardSource
from trimtab.activations.sequences import HarvestOptions
from trimtab.activations.synthetic import LabelledRows, PlantedFeatures, SyntheticConfig, SyntheticSource
from trimtab.activations.text import (
    Document,
    as_documents,
    corpus_hash,
    detokenise_wikitext,
    read_documents,
    sample_text,
)

__all__ = [
    "ActivationSource",
    "Context",
    "Document",
    "FeatureContexts",
    "HarvestConfig",
    "HarvestOptions",
    "HarvestProgress",
    "HarvestResult",
    "LabelledRows",
    "LiveSource",
    "PackedText",
    "PlantedFeatures",
    "ShardSource",
    "SyntheticConfig",
    "SyntheticSource",
    "TextConfig",
    "TokenisedCorpus",
    "as_documents",
    "corpus_hash",
    "detokenise_wikitext",
    "harvest",
    "harvest_text",
    "read_documents",
    "run_harvest",
    "sample_text",
    "tokenise",
    "top_contexts",
]

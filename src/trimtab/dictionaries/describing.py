"""What is known about a dictionary, from its files alone: the function behind `trimtab sae info`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from trimtab.dictionaries.architectures.jumprelu import JumpReLU
from trimtab.dictionaries.base import FEATURE_NAMES
from trimtab.dictionaries.core_metrics import DENSE_RATE
from trimtab.dictionaries.feature_examples import KINDS
from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.dictionaries.files import load_dictionary
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.saelens_layout import SAELENS_READS
from trimtab.runs import SourceName
from trimtab.runs.config import json_safe
from trimtab.runs.tables import named_values
from trimtab.stats import Interval, number_text

_VERSIONS = ("trimtab_version", "sae_lens_version", "sae_lens_training_version", "read_from")
READ_ACCURACY = "read_accuracy"
"""Where the metadata of supervised codes say on what share of held-out prompts each factor's value is read right."""
_SHOWN_APART = (*_VERSIONS, FEATURE_NAMES, READ_ACCURACY)
_NAMES_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class SAEInfoConfig:
    """Describe an SAE: architecture, sizes, model, site, norms, threshold, statistics, training."""

    sae: SourceName
    """Directory of the SAE in any known format, a shipped one's name, or saelens:RELEASE/SAE_ID."""


@dataclass(frozen=True)
class Spread:
    """Where the values of one weight per feature lie."""

    lowest: float
    median: float
    highest: float

    def __str__(self) -> str:
        lowest, median, highest = (number_text(value, ".4g") for value in (self.lowest, self.median, self.highest))
        return median if lowest == highest else f"{median} (from {lowest} to {highest})"


@dataclass(frozen=True)
class Firing:
    """What the statistics beside a dictionary come to."""

    n_tokens: int
    l0: float
    """Active features per token: the sum of all firing rates."""
    live: int
    """Features that fired at all."""
    dense: int
    """Features that fired on more than a tenth of the tokens."""

    @classmethod
    def of(cls, stats: FeatureStats) -> Firing:
        rate = stats.firing_rate
        return cls(stats.n_tokens, float(rate.sum()), int(stats.live.sum()), int((rate > DENSE_RATE).sum()))

    def said(self) -> dict[str, str]:
        """The numbers in words, by what they are of."""
        return {
            "L0": f"{self.l0:.1f} over {self.n_tokens:,} tokens",
            "features": f"{self.live:,} live, {self.dense:,} of them dense (> {DENSE_RATE:.0%})",
        }


@dataclass(frozen=True)
class ExampleSizes:
    """How many examples lie beside a dictionary."""

    windows: dict[str, int]
    """By kind, of each feature at most."""
    tokens: int
    """Of a window, at most."""
    features: int
    """That have a window."""
    n_tokens: int
    """Of the text."""
    megabytes: float
    """Of the file."""

    @classmethod
    def of(cls, sae: SAE) -> ExampleSizes | None:
        """Those beside an SAE, if there are any."""
        found = sae.feature_examples
        if found is None or sae.examples_file is None:
            return None
        windows = {
            kind: int(np.bincount(found.feature[found.kind == number], minlength=1).max())
            for number, kind in enumerate(KINDS)
        }
        size = sae.examples_file.stat().st_size / 1e6
        return cls(windows, found.tokens.shape[1], len(found.live), found.n_tokens, round(size, 1))

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.windows.items() if count)
        return (
            f"{kinds} windows of {self.tokens} tokens for {self.features:,} features, out of {self.n_tokens:,} tokens "
            f"({self.megabytes} MB)"
        )


@dataclass(frozen=True, kw_only=True)
class SAEDescription:
    """What an SAE's files say, and what follows from its weights."""

    sae: str
    made_by: str
    """The library that wrote it, with its version if it is known; empty if the files do not say."""
    architecture: str
    n_features: int
    d_in: int
    model: str
    """Empty if the files do not say."""
    site: str
    """Empty if the files do not say."""
    fingerprint: str
    settings: dict[str, Any]
    decoder_norms: Spread
    threshold: Spread | None
    """θ in model units, for JumpReLU SAEs."""
    firing: Firing | None
    """None without `feature_stats.parquet`."""
    examples: ExampleSizes | None
    """None without `feature_examples.parquet`."""
    metadata: dict[str, Any]
    """The training recipe, and whatever else the files say."""
    feature_names: tuple[str, ...] = ()
    """What each feature means, where the files say it."""
    read_accuracy: Mapping[str, Interval] = field(default_factory=dict)
    """Of supervised codes: by factor, how often its value is read right on held-out prompts."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not known of any feature is left out."""
        plain = json_safe(self)
        return {name: value for name, value in plain.items() if value or name not in (FEATURE_NAMES, READ_ACCURACY)}

    @property
    def _ours(self) -> bool:
        return self.architecture not in SAELENS_READS

    def render(self) -> str:
        """The description as text."""
        said = {
            "SAE": self.sae,
            "made by": self.made_by or "not said",
            "architecture": self.architecture + " (SAELens has none of that name)" * self._ours,
            "size": f"{self.n_features:,} features of width {self.d_in:,}",
            "model": self.model or "not said",
            "site": self.site or "not said (give --site to the commands that need one)",
            "fingerprint": self.fingerprint,
            "settings": ", ".join(f"{name} {_shown(value)}" for name, value in self.settings.items()),
            "decoder norms": str(self.decoder_norms),
        }
        if self.threshold is not None:
            said["threshold"] = str(self.threshold)
        if self.feature_names:
            names = [f"{i} {name}" for i, name in enumerate(self.feature_names) if name]
            more = f" and {len(names) - _NAMES_SHOWN:,} more (all with --json)" * (len(names) > _NAMES_SHOWN)
            said["features mean"] = ", ".join(names[:_NAMES_SHOWN]) + more
        if self.read_accuracy:
            said["read right"] = ", ".join(f"{factor} {value:.2f}" for factor, value in self.read_accuracy.items())
            said["read right"] += f" of {next(iter(self.read_accuracy.values())).n:,} held-out prompts"
        said |= self.firing.said() if self.firing else {"L0": "no statistics (trimtab sae stats makes them)"}
        said["examples"] = str(self.examples or "none (trimtab examples makes them)")
        recipe = [f"  {name} = {_shown(value)}" for name, value in _flat(self.metadata)]
        return "\n".join([named_values(said), *["training"] * bool(recipe), *recipe])


def describe_sae(config: SAEInfoConfig) -> SAEDescription:
    """Read an SAE and describe it. Raises what `load_dictionary` raises."""
    sae = load_dictionary(config.sae)
    return SAEDescription(
        sae=config.sae,
        made_by=made_by(sae.info.metadata),
        architecture=sae.architecture,
        n_features=sae.n_features,
        d_in=sae.d_in,
        model=sae.info.model,
        site=sae.info.site,
        fingerprint=sae.fingerprint,
        settings=sae.settings,
        decoder_norms=_spread(sae.decoder_norms),
        threshold=_spread(sae.threshold) if isinstance(sae, JumpReLU) else None,
        firing=None if sae.feature_stats is None else Firing.of(sae.feature_stats),
        examples=ExampleSizes.of(sae),
        metadata={name: value for name, value in sae.info.metadata.items() if name not in _SHOWN_APART},
        feature_names=sae.feature_names,
        read_accuracy={
            factor: Interval.from_dict(value) for factor, value in sae.info.metadata.get(READ_ACCURACY, {}).items()
        },
    )


def made_by(metadata: Mapping[str, Any]) -> str:
    """The library that trained or wrote a dictionary, from its metadata; empty if unknown."""
    if metadata.get("read_from"):
        return str(metadata["read_from"])
    for name, key in (("trimtab", "trimtab_version"), ("SAELens", "sae_lens_version")):
        if metadata.get(key):
            return f"{name} {metadata[key]}"
    return ""


def _spread(values: Tensor) -> Spread:
    values = values.detach().double()
    return Spread(float(values.min()), float(values.median()), float(values.max()))


def _flat(fields: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{inside}{name}.")
        else:
            yield f"{inside}{name}", value


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return str(value)

"""Any SAE that can be read, saved in SAELens's layout: the function behind `trimtab sae convert`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trimtab.dictionaries.describing import made_by
from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.dictionaries.files import STATS_FILE, load_dictionary, save_dictionary
from trimtab.dictionaries.saelens_layout import SAELENS_READS
from trimtab.errors import UserError
from trimtab.lm import Site
from trimtab.runs import OutputPath, SourceName


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Save an SAE of any known format in the layout that trimtab and SAELens open."""

    source: SourceName
    """Directory of the SAE in any known format, a shipped one's name, or saelens:RELEASE/SAE_ID."""
    destination: OutputPath
    """Directory to write; it must not hold anything yet."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of encoder and decoder on disk; biases and thresholds stay in float32."""
    model: SourceName | None = None
    """Name of the model that it was trained on, where the source does not say, or in its place."""
    site: str | None = None
    """Site that it reads (resid_post.15), where the source does not say, or in its place."""
    stats: Path | None = None
    """Statistics of its features to put beside it: feature_stats.parquet, or the directory that holds it."""


@dataclass(frozen=True, kw_only=True)
class ConvertResult:
    """What was written, and where."""

    source: str
    destination: str
    made_by: str
    architecture: str
    n_features: int
    d_in: int
    model: str
    site: str
    fingerprint: str
    """Of what was written, as it is read back."""
    has_stats: bool

    def render(self) -> str:
        """The result as text."""
        what = f"{self.architecture}, {self.n_features:,} features of width {self.d_in:,}"
        where = " of ".join(part for part in (self.site, self.model) if part)
        missing = [f"--{name}" for name in ("model", "site") if not getattr(self, name)]
        hint = f"\nthe source does not say its {' and '.join(m[2:] for m in missing)}; {' '.join(missing)} would"
        foreign = f"\nSAELens has no architecture {self.architecture}: only trimtab opens it"
        foreign *= self.architecture not in SAELENS_READS
        return f"{self.destination} ({what}{f', {where}' * bool(where)})" + hint * bool(missing) + foreign


def convert_sae(config: ConvertConfig) -> ConvertResult:
    """Read, save, and read back what was saved.

    Raises:
        UserError: the source cannot be read, the site is no site, the statistics are another dictionary's, or the
            destination holds something already.
    """
    destination = config.destination
    if destination.is_dir() and any(destination.iterdir()):
        raise UserError(
            f"destination {destination}", "it holds files already", "choose a directory that is new or empty"
        )
    sae = load_dictionary(config.source)
    changed = {"model": config.model, "site": config.site and str(Site.parse(config.site))}
    sae.info = dataclasses.replace(sae.info, **{name: value for name, value in changed.items() if value is not None})
    if config.stats is not None:
        path = config.stats / STATS_FILE if config.stats.is_dir() else config.stats
        sae.feature_stats = FeatureStats.read(path, n_features=sae.n_features)
    save_dictionary(sae, destination, dtype=config.dtype)
    written = load_dictionary(destination)
    return ConvertResult(
        source=config.source,
        destination=str(destination),
        made_by=made_by(sae.info.metadata),
        architecture=written.architecture,
        n_features=written.n_features,
        d_in=written.d_in,
        model=written.info.model,
        site=written.info.site,
        fingerprint=written.fingerprint,
        has_stats=written.feature_stats is not None,
    )

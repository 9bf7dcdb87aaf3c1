"""`trimtab feature`: all about some features, on the command line and as one page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.dictionaries import SAE
from trimtab.dictionaries.saes_config import SAEsConfig
from trimtab.errors import UserError
from trimtab.features.examples_command import examples_file
from trimtab.features.profile import FeatureProfile, FeatureProfiles, ProfileOptions, profile_features
from trimtab.lm import DecodeConfig, DecodingConfig
from trimtab.runs import (
    Run,
    config_directory,
    part_of,
    path_of_run,
    paths_of_run,
    read_record,
    read_typed,
)
from trimtab.runs.shown import FEATURE_PAGES, Shown, ShownText, feature_anchor, write_shown

STRIPS = 10
"""Windows of each kind on a page."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(ProfileOptions, DecodingConfig, SAEsConfig):
    """Show what features are: where they fire, the tokens they promote, their neighbours, and what a dose of them does
    to neutral prompts."""

    feature: tuple[str, ...] = ()
    """Ids; with several SAEs with the site before, like resid_post.15:2112."""
    of: Path | None = None
    """A run of rank, steer, find or a policy: its model and SAE, and unless ids are given the features that it names;
    the page goes into its directory, where its own page leads to it."""
    examples: Path | None = None
    """Run of `trimtab examples`, or its table; by default what lies beside the SAE."""
    max_new_tokens: int = 30
    """Tokens to generate at most."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config."""

    def needed(self) -> tuple[str, ...]:
        return ("decode",) if self.prompt and self.dose else ()

    def __post_init__(self) -> None:
        ProfileOptions.__post_init__(self)
        DecodingConfig.__post_init__(self)
        if self.of is not None and self.run is not None:
            raise UserError("--of and --run", "the page goes into the run that --of names", "leave one out")
        if self.of is None and not self.feature:
            raise UserError("the features", "there is none", "give some ids, like `trimtab feature 2112`")

    def directory(self) -> Path:
        """Where the run goes."""
        return self.run or config_directory("feature", self, ignore=_NOT_THE_RESULT)


_NOT_THE_RESULT = ("run", "of", "any_model", "batch_size")
"""Fields that may differ between openings of one run."""


def run_feature(config: FeatureConfig) -> FeatureProfiles:
    """Look at the features that the config names; a run that is done is read back.

    Raises:
        UserError: anything that the user named is wrong; see `profile_features`.
    """
    known: Mapping[str, str] = {}
    if config.of is not None:
        known = {} if config.any_model else read_record(config.of)["hashes"]
        config = _as_in_run(config, config.of)
    model = config.load_model()
    _check_same(f"model {model.name}", model.fingerprint, known, "model")
    saes = config.load_saes(model)
    for sae in saes:
        of_site = (f"sae {sae.info.site}", f"dictionary {sae.info.site}")
        _check_same(f"sae {sae.name}", sae.fingerprint, known, *of_site, *["dictionary"] * (len(saes) == 1))
    wanted = features_by_site(config.feature, saes)
    for sae in saes:
        sae.examples_file = examples_file(config.examples, sae, len(saes)) or sae.examples_file
        sae.check_features(wanted[sae.info.site])
    with Run.open(
        config.directory(), "feature", config, device=config.device, seeds=[config.seed], ignore_fields=_NOT_THE_RESULT
    ) as run:
        run.record(hashes={"model": model.fingerprint, **{f"dictionary {s.info.site}": s.fingerprint for s in saes}})
        if not run.done:
            options = ProfileOptions(**part_of(config, ProfileOptions))
            decoding = DecodeConfig(**part_of(config, DecodingConfig))
            found = [
                profile
                for sae in saes
                for profile in profile_features(model, sae, wanted[sae.info.site], options, decoding)
            ]
            write_shown(run, [shown(profile) for profile in found])
            run.finish(FeatureProfiles(model=model.name, profiles=tuple(found), run=os.fspath(run.path)))
        return read_typed(FeatureProfiles, run.results, f"run {run.path}")


def features_by_site(names: Sequence[str], saes: Sequence[SAE]) -> dict[str, list[int]]:
    """Ids of each SAE's features, by its site, from `ID` or `SITE:ID`.

    Raises:
        UserError: a name is neither, no SAE reads its site, or it says no site and there are several SAEs.
    """
    found: dict[str, list[int]] = {sae.info.site: [] for sae in saes}
    for name in names:
        site, _, number = name.rpartition(":")
        if not number.isdigit():
            raise UserError(
                f"feature {name!r}", "features are whole numbers from 0", "give 2112, or resid_post.15:2112"
            )
        if not site and len(saes) > 1:
            raise UserError(f"feature {name}", f"there are {len(saes)} SAEs", f"write {next(iter(found))}:{number}")
        place = site or saes[0].info.site
        if place not in found:
            raise UserError(f"feature {name}", f"the SAEs read {', '.join(found)}", "name one of these sites")
        if int(number) not in found[place]:
            found[place].append(int(number))
    return found


def shown(profile: FeatureProfile) -> Shown:
    """A feature as a section of a page."""
    largest = max((window.activation for window in profile.windows), default=0.0)
    texts: list[ShownText] = []
    for kind in dict.fromkeys(window.kind for window in profile.windows):
        of_kind = [window for window in profile.windows if window.kind == kind][:STRIPS]
        texts += [
            ShownText(
                label=f"{kind} {window.activation:.3g}, {window.document}",
                tokens=window.tokens,
                values=window.activations,
                largest=largest,
            )
            for window in of_kind
        ]
    title = f"Feature {profile.feature} at {profile.site}"
    anchor = feature_anchor(profile.site, profile.feature)
    return Shown.of(title, profile, texts=texts, anchor=anchor, leave_out=("windows",))


def _as_in_run(config: FeatureConfig, path: Path) -> FeatureConfig:
    """The config with a run's model and SAEs, and the features that it names if none are given."""
    record = read_record(path)
    given: dict[str, Any] = record["config"] | paths_of_run(record, ("model", "sae"))
    if "sae" not in given or "model" not in given:
        given |= _of_results(record)
    usual = SAEsConfig()
    given |= {name: own for name in ("model", "sae") if (own := getattr(config, name)) != getattr(usual, name)}
    if not given.get("sae") or not given.get("model"):
        why = f"it belongs to `{record['command']}`, which names no model and SAE that could be loaded"
        raise UserError(f"run {path}", why, "give them: --model and --sae")
    features = config.feature or tuple(record.get("features", {}) | record.get("fires_on", {}))
    if not features:
        raise UserError(f"run {path}", "it names no features", "give some ids")
    sae = (given["sae"],) if isinstance(given["sae"], str) else tuple(given["sae"])
    return replace(
        config, of=None, run=path / FEATURE_PAGES, model=given["model"], sae=sae, feature=features,
        site=config.site or given.get("site"), dtype=given.get("dtype", config.dtype),
        any_model=bool(given.get("any_model", config.any_model)),
    )  # fmt: skip


def _of_results(record: Mapping[str, Any]) -> dict[str, Any]:
    """Model and SAEs of a run that was made in Python, by the names that they were loaded by; what was made in memory
    has none."""
    found: Mapping[str, Any] = record.get("results") or {}
    if not {"model", "saes", "sites"} <= found.keys():
        return {}
    saes = [path_of_run(record, name) for name in found["saes"] if name and not name.endswith(" in memory")]
    return {
        "model": path_of_run(record, found["model"]),
        "sae": saes if len(saes) == len(found["saes"]) else [],
        "site": found["sites"][0] if len(found["sites"]) == 1 else None,
        "dtype": record.get("dtype", SAEsConfig.dtype),
    }


def _check_same(what: str, fingerprint: str, known: Mapping[str, str], *names: str) -> None:
    """Raise a `UserError` if a run was made with another model or SAE, as far as its hashes say."""
    for name in names:
        if known.get(name, fingerprint) != fingerprint:
            why = f"the run was made with one of hash {known[name]}, and this one has {fingerprint}"
            raise UserError(what, why, "give the run's: --model and --sae (and --dtype)")

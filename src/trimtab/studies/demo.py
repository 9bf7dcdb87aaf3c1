"""`trimtab demo`: which features of a real model control what it writes, with the evidence.

Protocol
--------
1. *Rank.* Every live feature of the SAE is scored by Delta Token Confidence and by the output score, both at 10 × its
   largest activation on the last token of "From my experience,". Candidates are the features at both ends of the first
   ranking (UP: confidence falls most, DOWN: it rises most), at the top of the second, and as many random ones.
2. *Choose* on validation prompts. Each candidate steers continuations of some of them at each dose of a small grid; the
   module `choice` says how direction, subset and one common dose follow from that. All randomness is fixed by the seed;
   prompts rotate over features, so that no feature has prompts of its own.
3. *Test* on held-out prompts, opened once the choice is written down. Arms: not steered; the chosen delta-confidence
   features; the chosen output-score features; features chosen in the same way from random candidates, which tells what
   the ranking adds to the choice; random live features, another one for each text, in several draws; the feature most
   active on each prompt. Every row is one prompt steered with one feature of its arm's set, at every token that is
   chosen, by the same ‖Δ‖/‖x‖; rows never stop early, so that arms also have the same number of edits.
4. *Measure without circularity.* The unedited model reads prompt and continuation again. A text's score is the rate of
   continuation tokens at which the feature it was steered with fires, minus the same feature's rate in the unsteered
   continuation of the same prompt under the same random draws, so that steering that does nothing scores exactly 0.
   Beside it: mean negative log-likelihood under the unedited model, whether that lies within the unsteered texts' 5th
   to 95th percentile, and the share of repeated 4-grams.

The unit is the prompt: scores are averaged over a prompt's rows, and intervals resample prompts. The verdict compares
the chosen features with random ones, pair by prompt; it is "no" unless the interval of the difference is above 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy import ndarray

from trimtab.dictionaries import Dictionary, DictionaryConfig
from trimtab.errors import UserError
from trimtab.finding.neutral import read_neutral_prompts
from trimtab.lm import DecodingConfig, LanguageModel, Site
from trimtab.runs import Meter, Run, check_least, check_values, text_id, write_table
from trimtab.selection import (
    DeltaConfidence,
    FeatureTable,
    OutputScore,
    rank_by,
    read_feature_tables,
    write_feature_tables,
)
from trimtab.selection.ranking import dictionary_site, features_to_rank
from trimtab.steering.fluency import Band
from trimtab.studies.choice import BaseRates, ValidationChoice, choose
from trimtab.studies.outcomes import HeldOutOutcome, summarise
from trimtab.studies.readback import most_active
from trimtab.studies.result import DemoResult
from trimtab.studies.texts import Assignment, read_texts, write_texts

LISTS = {
    "up": ("delta-confidence", "up"),
    "down": ("delta-confidence", "down"),
    "output-score": ("output-score", "up"),
    "chosen-random": ("chosen-random", "any"),
}
"""Lists of candidates: the criterion (or that they are random), and which end of its ranking."""
IGNORED = ("run", "policy")
"""Fields of the config that don't change the result."""
RANDOM_CANDIDATES = 10_000
"""Key of the draw of random candidates, apart from the random arms' keys."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(DecodingConfig, DictionaryConfig):
    """Find, choose and test steering features of a model, with controls, and train a small policy."""

    run: Path = Path("runs/demo")
    """Directory to write."""
    prompts: Path | None = None
    """JSON with lists `validation` and `held_out`; by default the openings that ship with trimtab."""
    dose: tuple[float, ...] = (0.25, 0.4)
    """Doses to choose from, in units of the residual's norm."""
    n_candidates: int = 16
    """Features of each end of a ranking that are tried on validation prompts."""
    size: tuple[int, ...] = (6, 3)
    """Subset sizes to choose from."""
    prompts_per_feature: int = 4
    """Validation prompts that each candidate steers, at each dose."""
    samples: int = 2
    """Sampled continuations per prompt."""
    random_draws: int = 2
    """Times that random features, one for each text, are drawn."""
    max_new_tokens: int = 20
    """Tokens of a continuation."""
    temperature: float = 0.7
    """Of sampling."""
    top_p: float = 0.95
    """Sample from the most likely tokens that hold this share of the probability."""
    seed: int = 0
    """Of continuations, random features and the bootstrap."""
    policy: bool = True
    """Train a small policy and show it beside its controls, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "n_candidates", "prompts_per_feature", "samples", "random_draws")
        if self.prompts_per_feature < 2:
            raise UserError("prompts_per_feature 1", "a choice is judged on prompts that did not make it", "raise it")
        if self.size and max(self.size) > self.n_candidates:
            raise UserError(f"size {self.size}", f"n_candidates is {self.n_candidates}", "choose smaller sizes")
        check_values(self, "positive and finite", lambda value: 0 < value < math.inf, "dose", "size")
        for name in ("dose", "size"):
            if not getattr(self, name):
                raise UserError(name, "there is none", "give at least one")


def run_demo(config: DemoConfig) -> DemoResult:
    """Run the demo, or what is left of it; a run that is done is read back.

    Raises:
        UserError: anything that the user named is wrong; see `load_model`, `load_dictionary`, `Run.open`.
    """
    prompts = read_neutral_prompts(config.prompts)
    ids = {name: [text_id(text) for text in texts] for name, texts in prompts.items()}
    with Run.open(
        config.run, "demo", config, seeds=[config.seed], splits=ids, device=config.device, ignore_fields=IGNORED
    ) as run:
        if run.done and run.results is not None:
            return DemoResult(run=run.path, resumed=True, results=run.results)
        model, dictionary = config.load()
        run.record(hashes={"model": model.fingerprint, "dictionary": dictionary.fingerprint})
        results = _Demo(config, run, model, dictionary, prompts).results()
        run.finish(results)
        assert run.results is not None
        return DemoResult(run=run.path, resumed=False, results=run.results)


class _Demo:
    """The stages of one demo; each writes its table and is read back where that exists."""

    def __init__(
        self,
        config: DemoConfig,
        run: Run,
        model: LanguageModel,
        dictionary: Dictionary,
        prompts: Mapping[str, Sequence[str]],
    ) -> None:
        self.config, self.run, self.model, self.dictionary, self.prompts = config, run, model, dictionary, prompts
        self.site: Site = dictionary_site(model, dictionary, None)
        self.tokens = {name: [model.encode_text(text) for text in texts] for name, texts in prompts.items()}

    def results(self) -> dict[str, Any]:
        rankings = self.rank()
        candidates = self.candidates(rankings)
        choice = self.choose(candidates)
        chosen = {name: list(cell.features) for name, cell in choice.cells.items()}
        self.run.record(choice={"dose": choice.dose, "features": chosen})
        self.run.open_split("held_out", [text_id(text) for text in self.prompts["held_out"]])
        outcome = self.test(self.arms(chosen, choice.dose))
        return {
            "model": self.model.name,
            "sae": self.config.sae,
            "site": str(self.site),
            "n_features": self.dictionary.n_features,
            "n_ranked": len(rankings[0]),
            "ranking": _quantiles(rankings[0]),
            "dose": choice.dose,
            "grid": [cell._asdict() for cell in choice.grid],
            "chosen": {name: cell._asdict() for name, cell in choice.cells.items()},
            "features": {
                name: _describe(_table_of(rankings, name), ids, outcome.by_feature(name))
                for name, ids in chosen.items()
            },
            **outcome.to_json(),
            "examples": outcome.examples(
                self.prompts["held_out"], lambda tokens: [self.model.decode_ids([t]) for t in tokens]
            ),
        }

    def rank(self) -> list[FeatureTable]:
        """Both rankings of every live feature, from one pass."""
        file = self.run.file("features.parquet")
        if not file.exists():
            ids = features_to_rank(self.dictionary, None, live_only=True)
            both = DeltaConfidence(), OutputScore()
            with Meter("ranking every live feature", len(ids)) as meter:
                tables = rank_by(self.model, self.dictionary, both, site=self.site, progress=meter.advance)
            write_feature_tables(file, tables)
        return read_feature_tables(file)

    def candidates(self, rankings: list[FeatureTable]) -> dict[str, list[int]]:
        """The features of every list, best first."""
        most = self.config.n_candidates
        confidence, output = (_table_of(rankings, name) for name in ("delta-confidence", "output-score"))
        if len(confidence) < 2 * most:
            raise UserError(f"{most} candidates", f"the SAE has only {len(confidence)} live features", "choose fewer")
        found = {"up": confidence.top(most), "down": confidence.bottom(most), "output-score": output.top(most)}
        rng = np.random.default_rng([self.config.seed, RANDOM_CANDIDATES])
        random = rng.choice(np.sort(confidence.feature), size=most, replace=False)
        return {**{name: table.feature.tolist() for name, table in found.items()}, "chosen-random": random.tolist()}

    def choose(self, candidates: Mapping[str, list[int]]) -> ValidationChoice:
        """Direction, subset and dose, from steered texts on validation prompts."""
        config, n_prompts = self.config, len(self.prompts["validation"])
        unsteered = [Assignment("unsteered", p, r, -1, 0.0) for p in range(n_prompts) for r in range(config.samples)]
        grid = [
            Assignment(name, (rank * config.prompts_per_feature + i) % n_prompts, i % config.samples, f, dose, rank)
            for dose in config.dose
            for name, features in candidates.items()
            for rank, f in enumerate(features)
            for i in range(config.prompts_per_feature)
        ]
        base, rates = self.unsteered("validation", unsteered)
        steered = self.written("validation", "candidates", grid)
        in_band = Band.of(base.nll).holds(steered.nll)
        return choose(steered, rates.effect(steered), in_band, LISTS, config.size, config.dose)

    def arms(self, chosen: Mapping[str, list[int]], dose: float) -> dict[str, list[Assignment]]:
        """The rows of every steered arm."""
        config, n_prompts = self.config, len(self.prompts["held_out"])
        live = features_to_rank(self.dictionary, None, live_only=True).numpy()
        free = np.setdiff1d(live, [f for features in chosen.values() for f in features])
        rows = [(p, r) for p in range(n_prompts) for r in range(config.samples)]
        if not len(free):
            raise UserError(f"{len(live)} live features", "none is left to draw random ones from", "use another SAE")
        sets: dict[str, ndarray] = {name: np.array(features) for name, features in chosen.items()}
        for draw in range(config.random_draws):
            rng = np.random.default_rng([config.seed, draw])
            # One for each text: a few shared by all prompts would say more of themselves than of random features.
            sets[f"random-{draw + 1}"] = rng.choice(free, size=len(rows), replace=len(free) < len(rows))
        arms: dict[str, list[Assignment]] = {}
        for name, features in sets.items():
            apart = -(-len(features) // config.samples)  # samples of a prompt take features far apart in the set
            ranks = [(p + r * apart) % len(features) for p, r in rows]
            arms[name] = [
                Assignment(name, p, r, int(features[rank]), dose, rank)
                for (p, r), rank in zip(rows, ranks, strict=True)
            ]
        active = most_active(self.model, self.dictionary, self.site, self.tokens["held_out"])
        return {**arms, "most-active": [Assignment("most-active", p, r, active[p], dose) for p, r in rows]}

    def test(self, arms: Mapping[str, list[Assignment]]) -> HeldOutOutcome:
        """Write and read back every arm's texts on held-out prompts."""
        pairs = [(row.prompt, row.replicate) for row in next(iter(arms.values()))]
        base, rates = self.unsteered("held_out", [Assignment("unsteered", p, r, -1, 0.0) for p, r in pairs])
        steered = {name: self.written("held_out", name, rows) for name, rows in arms.items()}
        return summarise(base, rates, steered, seed=self.config.seed)

    def unsteered(self, split: str, rows: list[Assignment]) -> tuple[pd.DataFrame, BaseRates]:
        """Unsteered texts, and how often every feature fires in them."""
        file = self.run.file(f"{split}-unsteered-firing.parquet")
        texts = self.written(split, "unsteered", rows, file)
        sparse = pq.read_table(file)
        counts = np.zeros((len(texts), self.dictionary.n_features))
        counts[sparse["text"].to_numpy(), sparse["feature"].to_numpy()] = sparse["tokens"].to_numpy()
        return texts, BaseRates.of(texts, counts)

    def written(self, split: str, name: str, rows: list[Assignment], counts_file: Path | None = None) -> pd.DataFrame:
        """One arm's texts; how often every feature fires in each goes into a file of its own, if there is one."""
        file = self.run.file(f"{split}-{name}.parquet")
        if not file.exists():
            what = "unsteered texts" if name == "unsteered" else name
            with Meter(f"{split}: writing and reading {what}", 2 * len(rows)) as meter:
                # Rows never stop early, so that all have as many edits.
                texts, counts = write_texts(
                    self.model, self.dictionary, self.site, self.tokens[split], rows,
                    self.config.decode_config(stop_at_eos=False), progress=meter.advance,
                )  # fmt: skip
            if counts_file is not None:
                text, feature = np.nonzero(counts)
                write_table(counts_file, {"text": text, "feature": feature, "tokens": counts[text, feature]})
            write_table(file, texts)
        return read_texts(file)


def _table_of(rankings: list[FeatureTable], criterion: str) -> FeatureTable:
    """The ranking by a criterion; features that none chose are described by the first."""
    return next((table for table in rankings if table.criterion.startswith(criterion)), rankings[0])


def _quantiles(table: FeatureTable) -> dict[str, Any]:
    """The ranking as a curve: the score at 201 evenly spaced ranks."""
    places = np.linspace(0, len(table) - 1, min(201, len(table))).round().astype(int)
    return {"criterion": table.criterion, "rank": places.tolist(), "score": table.score[places].tolist()}


def _describe(table: FeatureTable, ids: list[int], effect: Mapping[int, float]) -> list[dict[str, Any]]:
    rank = {int(f): i for i, f in enumerate(table.feature)}
    return [
        row | {"rank": rank[f], "top_tokens": row["top_tokens"][:8], "effect": effect.get(f)}
        for f, row in zip(ids, table.take([rank[f] for f in ids]).records(), strict=True)
    ]

"""`trimtab train`: from a model's name and some text to a saved SAE, through shards on disk or a live stream."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trimtab.activations import (
    ActivationSource,
    HarvestConfig,
    HarvestOptions,
    LiveSource,
    ShardSource,
    harvest_text,
    read_documents,
    tokenise,
)
from trimtab.activations.text import MAX_CHARACTERS, Normalisation
from trimtab.errors import UserError
from trimtab.lm import load_model
from trimtab.runs import Run, config_dict, json_safe
from trimtab.training.config import TrainConfig
from trimtab.training.loop import train

SHARDS = "activations"


@dataclass(frozen=True, kw_only=True)
class TrainTextConfig(TrainConfig):
    """Training of one SAE by names and paths."""

    text: tuple[str, ...] = ()
    """Files, directories or hub:NAME[:SPLIT] to read."""
    activations: tuple[Path, ...] = ()
    """Directories of finished harvests to train on, instead of text."""
    model: str = "smollm2-135m-instruct"
    """Hub id, directory, GGUF file or catalogue name."""
    site: str = "resid_post.15"
    """Site to read."""
    live: bool = False
    """Compute activations as they are needed instead of keeping shards in the run; every epoch runs the model again."""
    context: int = 256
    """Tokens of a sequence, the leading BOS included."""
    sequences_per_pass: int = 8
    """Sequences per forward pass of the model."""
    holdout: float = 0.05
    """Share of the documents kept out of training, on which the result is measured."""
    outlier_norm: float = 10.0
    """Leave out rows whose norm exceeds this many times the median norm."""
    autocast: bool = False
    """Run the model's matrix products in bfloat16; the residual stream keeps its precision."""
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
    dtype: str = "float32"
    """What the model computes in."""
    device: str = "cpu"
    """Where to compute."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config. The same command resumes it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.text) == bool(self.activations):
            given = "both are given" if self.text else "neither is given"
            raise UserError("--text and --activations", given, "give text to harvest, or finished harvests")
        _ = self.harvest_options()

    def harvest_options(self) -> HarvestOptions:
        """What decides which rows a harvest gives."""
        return HarvestOptions(
            context=self.context,
            batch=self.sequences_per_pass,
            holdout=self.holdout,
            seed=self.seed,
            outlier_norm=self.outlier_norm,
            autocast=self.autocast,
        )

    def directory(self) -> Path:
        """Where the run goes: the same config always finds its own run."""
        if self.run is not None:
            return self.run
        plain = {name: value for name, value in config_dict(self).items() if name not in _NOT_THE_RESULT}
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        return Path("runs") / f"train-{digest[:8]}"


_NOT_THE_RESULT = ("run", "checkpoint_every", "log_every")
"""Fields that may differ between openings of one run."""


@dataclass(frozen=True, kw_only=True)
class TrainedSAE:
    """What `trimtab train` made."""

    result: dict[str, Any]
    """The fields of `TrainResult`."""
    run: Path
    resumed: bool
    """Whether the run was done before."""

    def render(self) -> str:
        """The result in a few lines."""
        r = self.result
        where = "held-out" if r["heldout"] else "training"
        done = " (done before)" if self.resumed else ""
        return "\n".join(
            (
                f"{r['sae']}{done}",
                f"  trained on {r['rows']:,} rows in {r['steps']:,} steps, {r['seconds']:.0f} s",
                f"  on {r['measured_rows']:,} {where} rows: explained variance {r['explained_variance']:.4f}, "
                f"L0 {r['l0']:.2f}, dead {r['dead_share']:.2%}, dense {r['dense_share']:.2%}",
                f"  next: trimtab evaluate core --sae {r['sae']}",
            )
        )

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {**self.result, "run": str(self.run), "resumed": self.resumed}


def train_text(config: TrainTextConfig) -> TrainedSAE:
    """Harvest what the config names, train on it, save the SAE as `sae/` in the run.

    Raises:
        UserError: anything that the user named is wrong; see `load_model`, `read_documents`, `harvest`, `train`.
    """
    path = config.directory()
    with Run.open(
        path, "train", config, seeds=[config.seed], device=config.device, ignore_fields=_NOT_THE_RESULT
    ) as run:
        resumed = run.done
        if not run.done:
            source, heldout = _sources(config, run)
            result = train(config, source, run, heldout=heldout)
            run.finish(json_safe(asdict(result)))
        results: Any = run.results
        return TrainedSAE(result=dict(results), run=run.path, resumed=resumed)


def _sources(config: TrainTextConfig, run: Run) -> tuple[ActivationSource, ActivationSource | None]:
    """Rows to train on, and held-out ones if there are any."""
    if config.live:
        model = load_model(config.model, dtype=config.dtype, device=config.device)
        run.record(hashes={"model": model.fingerprint})
        documents = read_documents(
            config.text,
            text_field=config.text_field,
            limit=config.limit_documents,
            normalise=config.normalise,
            max_characters=config.document_characters,
        )
        corpus = tokenise(documents, model.tokenizer, limit_tokens=config.limit_tokens)
        options = config.harvest_options()
        live = [
            LiveSource(model, config.site, corpus, split=split, seed=config.seed, options=options)
            for split in (("train", "holdout") if config.holdout else ("train",))
        ]
        return live[0], live[1] if len(live) > 1 else None
    directories = list(config.activations) or [_harvest(config, run)]
    source = ShardSource(directories, site=config.site, seed=config.seed)
    has_heldout = any(index.rows("holdout") for index in source.indexes)
    heldout = ShardSource(directories, site=config.site, split="holdout", seed=config.seed) if has_heldout else None
    return source, heldout


def _harvest(config: TrainTextConfig, run: Run) -> Path:
    options = {field.name: getattr(config.harvest_options(), field.name) for field in fields(HarvestOptions)}
    harvest_config = HarvestConfig(
        **options,
        text=config.text,
        out=run.file(SHARDS),
        model=config.model,
        sites=(config.site,),
        dtype=config.dtype,
        device=config.device,
        text_field=config.text_field,
        normalise=config.normalise,
        document_characters=config.document_characters,
        limit_documents=config.limit_documents,
        limit_tokens=config.limit_tokens,
    )
    return harvest_text(harvest_config).directory

"""`trimtab examples`: windows of text in which every feature fires, from text or from a finished harvest."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.activations import TextConfig, sample_text
from trimtab.dictionaries import SAE
from trimtab.dictionaries.describing import Firing
from trimtab.dictionaries.files import EXAMPLES_FILE, STATS_FILE
from trimtab.dictionaries.saes_config import SAEsConfig
from trimtab.errors import UserError
from trimtab.features.collecting import ExampleOptions, Found, examples_of_harvest, examples_of_text
from trimtab.runs import OutputPath, Run, SourceName, config_directory, part_of, read_typed, write_bytes
from trimtab.runs.results import Result
from trimtab.runs.tables import COUNT, Column, Table

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig(ExampleOptions, TextConfig, SAEsConfig):
    """Collect windows of text in which each feature fires: the strongest, and ones drawn by activation and evenly."""

    text: tuple[SourceName, ...] = ()
    """Files, directories or hub:NAME[[:CONFIG]:SPLIT]; by default a sample that ships with trimtab."""
    activations: tuple[Path, ...] = ()
    """Directories of finished harvests to read instead of text; the model is not loaded then."""
    into: OutputPath | None = None
    """Also put the examples here; commands find them in the SAE's directory."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config. The same command goes on with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text and self.activations:
            raise UserError("--text and --activations", "rows come from one of them", "leave one out")
        if self.into is not None and len(self.sae) > 1:
            raise UserError("--into", "one directory takes the examples of one SAE", "name one SAE, or leave it out")

    def directory(self) -> Path:
        """Where the run goes."""
        return self.run or config_directory("examples", self, ignore=_NOT_THE_RESULT)


_NOT_THE_RESULT = ("run", "into", "any_model")
"""Fields that may differ between openings of one run."""


@dataclass(frozen=True, kw_only=True)
class SAEExamples:
    """What was collected for an SAE."""

    sae: str
    site: str
    windows: int
    firing: Firing
    path: str
    """Of the table."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ExamplesResult(Result):
    """What was collected."""

    model: str
    saes: tuple[SAEExamples, ...]

    def headline(self) -> str:
        tokens = self.saes[0].firing.n_tokens
        return f"windows out of {tokens:,} tokens of {self.model}; {', '.join(one.path for one in self.saes)}"

    def tables(self) -> dict[str, Table]:
        columns = [
            Column("SAE", "sae"),
            Column("site", "site"),
            Column("windows", "windows", COUNT),
            Column("features that fire", "firing.live", COUNT),
            Column("on more than 10% of tokens", "firing.dense", COUNT),
            Column("L0", "firing.l0", ".1f"),
        ]
        return {"examples": Table(columns=columns, rows=self.saes)}


def run_examples(config: ExamplesConfig) -> ExamplesResult:
    """Collect what the config names; a run that is done is read back.

    Raises:
        UserError: anything that the user named is wrong; see `examples_of_text` and `examples_of_harvest`.
    """
    with Run.open(
        config.directory(), "examples", config, device=config.device, seeds=[config.seed], ignore_fields=_NOT_THE_RESULT
    ) as run:
        if not run.done:
            saes, found = _collect(config, run)
            result = _write(run, saes, found)
            run.finish(result)
            shutil.rmtree(run.file(CHECKPOINTS), ignore_errors=True)
        done = read_typed(ExamplesResult, run.results, f"run {run.path}")
        if config.into is not None:
            write_bytes(config.into / EXAMPLES_FILE, Path(done.saes[0].path).read_bytes())
    return done


def _collect(config: ExamplesConfig, run: Run) -> tuple[Sequence[SAE], list[Found]]:
    options = ExampleOptions(**part_of(config, ExampleOptions))
    checkpoints = run.file(CHECKPOINTS)
    if config.activations:
        saes = config.load_saes()
        run.record(hashes={f"dictionary {sae.info.site}": sae.fingerprint for sae in saes})
        return saes, examples_of_harvest(config.activations, saes, options, checkpoints, any_model=config.any_model)
    model = config.load_model()
    saes = config.load_saes(model)
    corpus = config.corpus(config.text or (sample_text(),), model.tokenizer)
    hashes = {f"dictionary {sae.info.site}": sae.fingerprint for sae in saes}
    run.record(hashes={"model": model.fingerprint, "corpus": corpus.hash, **hashes})
    return saes, examples_of_text(model, saes, corpus, options, checkpoints, any_model=config.any_model)


def _write(run: Run, saes: Sequence[SAE], found: Sequence[Found]) -> ExamplesResult:
    """One folder for each SAE, if there are several."""
    written: list[SAEExamples] = []
    for sae, (examples, stats) in zip(saes, found, strict=True):
        folder = run.file(examples.site) if len(saes) > 1 else run.path
        examples.write(folder / EXAMPLES_FILE)
        stats.write(folder / STATS_FILE)
        written.append(
            SAEExamples(
                sae=sae.name, site=examples.site, windows=len(examples.feature), firing=Firing.of(stats),
                path=str(folder / EXAMPLES_FILE),
            )
        )  # fmt: skip
    return ExamplesResult(model=found[0].examples.model, saes=tuple(written))


def examples_file(given: Path | None, sae: SAE, saes: int = 1) -> Path | None:
    """The table of an SAE's examples by what a user named: the table itself, or a run of this command.

    Args:
        given: as it was named; None stays None.
        sae: whose examples they are.
        saes: how many are looked at together: of several, each has its own folder in the run.

    Raises:
        UserError: the run has none of this SAE's site.
    """
    if given is None or given.is_file():
        return given
    folders = [given / sae.info.site, *[given] * (saes == 1)]
    file = next((folder / EXAMPLES_FILE for folder in folders if (folder / EXAMPLES_FILE).is_file()), None)
    if file is None:
        raise UserError(f"examples {given}", f"there are none for {sae.info.site}", "name a run of `trimtab examples`")
    return file

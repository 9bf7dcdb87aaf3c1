"""`trimtab flags import`, `data` and `judge`: examples out of labelled text or written by a model; a judge of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trimtab.errors import UserError
from trimtab.flags.concepts import read_concepts
from trimtab.flags.data.checking import JUDGE_SUFFIX, read_judge
from trimtab.flags.data.importing import ImportedExamples, ImportOptions, import_examples
from trimtab.flags.data.writing import WritingOptions, WrittenExamples, write_examples
from trimtab.flags.examples import read_examples
from trimtab.judges import JudgeQuality
from trimtab.lm import ModelConfig
from trimtab.runs import OutputPath, SourceName, part_of

FIRST = {"heading": ""}
"""Metadata of options that stand at the top of the help."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig(ImportOptions):
    """Make examples for flags out of labelled text."""

    text: tuple[SourceName, ...]
    """Tables with a column of labels, directories or .zip files with a folder for each label, AxBench's files, files of
    examples; with --label any text."""
    concepts: Path = field(metadata=FIRST)
    """File of the concepts: `name: description` in each line."""
    run: Path
    """Directory for the examples."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(WritingOptions, ModelConfig):
    """Let a model write examples for flags."""

    needs = ("decode",)

    concepts: Path = field(metadata=FIRST)
    """File of the concepts: `name: description` in each line, where a description lists topics to ask for."""
    judge_data: Path | None = field(default=None, metadata=FIRST)
    """Labelled texts to fit a judge on that checks what is written (JSONL, as `trimtab flags import` makes it), or a
    judge that was saved (.npz). Without it a concept is where two words of its description are."""
    run: Path
    """Directory for the examples. The same command again goes on from there."""


def run_import(config: ImportConfig) -> ImportedExamples:
    """What `trimtab flags import` does. Raises a `UserError` as `import_examples` does."""
    options = part_of(config, ImportOptions)
    return import_examples(config.text, read_concepts(config.concepts), run=config.run, **options)


def run_data(config: DataConfig) -> WrittenExamples:
    """What `trimtab flags data` does. Raises a `UserError` as `write_examples` does."""
    concepts = read_concepts(config.concepts)
    judge = None if config.judge_data is None else read_judge(config.judge_data, list(concepts), config.seed)
    model = config.load_model()
    return write_examples(model, concepts, judge=judge, run=config.run, **part_of(config, WritingOptions))


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Fit a judge of concepts on labelled texts, say how good it is, and keep it."""

    judge_data: Path = field(metadata=FIRST)
    """Labelled texts to fit it on (JSONL, as `trimtab flags import` makes it), or a judge that was saved (.npz)."""
    concepts: Path = field(metadata=FIRST)
    """File of the concepts: `name: description` in each line."""
    data: tuple[Path, ...] = field(default=(), metadata=FIRST)
    """JSONL files of examples of another kind to measure it on instead, none of which it was fitted on."""
    save: OutputPath | None = field(default=None, metadata=FIRST)
    """File to keep it in (.npz), which other commands take as --judge-data."""
    seed: int = 0
    """Of which texts are held out, and of the fit."""


def run_judge(config: JudgeConfig) -> JudgeQuality:
    """What `trimtab flags judge` does.

    Raises:
        UserError: a file cannot be read, has too few texts of a concept, or would be saved under another suffix.
    """
    if config.save is not None and config.save.suffix != JUDGE_SUFFIX:
        raise UserError(f"save {config.save}", f"a judge is kept as {JUDGE_SUFFIX}", f"end the name in {JUDGE_SUFFIX}")
    names = list(read_concepts(config.concepts))
    judge = read_judge(config.judge_data, names, config.seed)
    if config.save is not None:
        judge.save(config.save)
    others = [example for path in config.data for example in read_examples(path, names)]
    texts, labels = [e.response for e in others], [e.concepts for e in others]
    return judge.measure(texts, labels, [e.unit for e in others]) if others else judge.quality

"""`trimtab flags import` and `trimtab flags data`: examples out of labelled text, and examples that a model writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimtab.flags.concepts import read_concepts
from trimtab.flags.data.checking import read_judge
from trimtab.flags.data.importing import ImportedExamples, ImportOptions, import_examples
from trimtab.flags.data.writing import WritingOptions, WrittenExamples, write_examples
from trimtab.lm import ModelConfig
from trimtab.runs import part_of


@dataclass(frozen=True, kw_only=True)
class ImportConfig(ImportOptions):
    """Make examples for flags out of labelled text."""

    text: tuple[str, ...]
    """Tables with a column of labels, directories or .zip files with a folder for each label, AxBench's files, files of
    examples; with --label any text."""
    concepts: Path
    """File of the concepts: `name: description` in each line."""
    run: Path
    """Directory for the examples."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(WritingOptions, ModelConfig):
    """Let a model write examples for flags."""

    concepts: Path
    """File of the concepts: `name: description` in each line, where a description lists topics to ask for."""
    judge_data: Path | None = None
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

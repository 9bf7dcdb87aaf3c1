"""Labelled examples for flags: out of labelled text, or written by the model itself and checked."""

from trimtab.flags.data.checking import read_judge
from trimtab.flags.data.command import DataConfig, ImportConfig, JudgeConfig, run_data, run_import, run_judge
from trimtab.flags.data.importing import ImportedExamples, import_examples
from trimtab.flags.data.prompts import NEUTRAL_PROMPTS
from trimtab.flags.data.writing import WrittenExamples, write_examples

__all__ = [
    "NEUTRAL_PROMPTS",
    "DataConfig",
    "ImportConfig",
    "ImportedExamples",
    "JudgeConfig",
    "WrittenExamples",
    "import_examples",
    "read_judge",
    "run_data",
    "run_import",
    "run_judge",
    "write_examples",
]

"""Flags: residual dimensions that a finetuning makes say what a model is about to write, and that decide it."""

from trimtab.flags.concepts import read_concepts
from trimtab.flags.config import FlagTraining
from trimtab.flags.curricula import CURRICULA, Curriculum, Phase
from trimtab.flags.data import NEUTRAL_PROMPTS, import_examples, read_judge, write_examples
from trimtab.flags.examples import Example, read_examples
from trimtab.flags.files import Snapshot, load_flagged, load_flags, save_flags, snapshots
from trimtab.flags.loss import LOSSES
from trimtab.flags.measuring import FlagMeasures, measure_flags
from trimtab.flags.placing import place_flags
from trimtab.flags.result import TrainedFlags
from trimtab.flags.spec import FlagSpec
from trimtab.flags.switches import FlagSource, switched
from trimtab.flags.training import train_flags

__all__ = [
    "CURRICULA",
    "LOSSES",
    "NEUTRAL_PROMPTS",
    "Curriculum",
    "Example",
    "FlagMeasures",
    "FlagSource",
    "FlagSpec",
    "FlagTraining",
    "Phase",
    "Snapshot",
    "TrainedFlags",
    "import_examples",
    "load_flagged",
    "load_flags",
    "measure_flags",
    "place_flags",
    "read_concepts",
    "read_examples",
    "read_judge",
    "save_flags",
    "snapshots",
    "switched",
    "train_flags",
    "write_examples",
]

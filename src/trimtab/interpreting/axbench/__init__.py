"""AxBench's test of steering (arXiv 2501.17148): steer, write, let a judge read, at doses that other texts chose.

Every way to bring a concept about is one more arm, so that features, vectors, prompts and flags are read alike.
"""

from trimtab.interpreting.axbench.arms import ARMS, Aim, Ground
from trimtab.interpreting.axbench.command import AxBenchConfig, run_axbench
from trimtab.interpreting.axbench.concepts import Concept, feature_concepts, labelled_concepts
from trimtab.interpreting.axbench.result import ArmUtility, AxBench, AxBenchResult
from trimtab.interpreting.axbench.running import AxBenchOptions, axbench
from trimtab.interpreting.axbench.writing import FluencyCheck, OwnArm

__all__ = [
    "ARMS",
    "Aim",
    "ArmUtility",
    "AxBench",
    "AxBenchConfig",
    "AxBenchOptions",
    "AxBenchResult",
    "Concept",
    "FluencyCheck",
    "Ground",
    "OwnArm",
    "axbench",
    "feature_concepts",
    "labelled_concepts",
    "run_axbench",
]

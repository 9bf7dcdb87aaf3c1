"""Circuits: which heads bring an answer about, found by patching, and how much of it they explain."""

from trimtab.evaluation.circuits.circuit import ROLES, Circuit, CircuitHead, gpt2_small_circuit
from trimtab.evaluation.circuits.command import CircuitConfig, CircuitResult, run_circuit
from trimtab.evaluation.circuits.completeness import Completeness, measure_completeness
from trimtab.evaluation.circuits.direct_effects import attention_from, direct_effects
from trimtab.evaluation.circuits.faithfulness import Faithfulness, measure_faithfulness
from trimtab.evaluation.circuits.finding import find_circuit
from trimtab.evaluation.circuits.knock_outs import KnockOuts
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.circuits.path_patching import logits_location, path_patch

__all__ = [
    "ROLES",
    "Circuit",
    "CircuitConfig",
    "CircuitHead",
    "CircuitResult",
    "Completeness",
    "Faithfulness",
    "KnockOuts",
    "Location",
    "attention_from",
    "direct_effects",
    "find_circuit",
    "gpt2_small_circuit",
    "head_location",
    "logits_location",
    "measure_completeness",
    "measure_faithfulness",
    "path_patch",
    "run_circuit",
]

"""Steer generation with features: doses, intervention sources, traces, replay."""

from trimtab.steering.command import SteerConfig, run_steer
from trimtab.steering.composed_sources import CombinedSource, ForkSource, ReplaySource
from trimtab.steering.controls import RandomFeatureSource, TopActiveSource
from trimtab.steering.direction_table import DirectionTable
from trimtab.steering.divergence import DivergenceRecorder
from trimtab.steering.doses import UNITS, Unit, check_doses, check_unit, coefficients
from trimtab.steering.effects import TokenEffects, TopTokens, token_effects
from trimtab.steering.equal_dose import DoseSummary, UnequalDoseError, assert_equal_dose, dose_summary
from trimtab.steering.operations import OPERATIONS, Slots, operation
from trimtab.steering.planning import SteerOptions
from trimtab.steering.replacing import PatchSource, ReconstructionSource
from trimtab.steering.result import Continuation, DoseResult, SteerResult
from trimtab.steering.saved_steering import Steering, load
from trimtab.steering.sources import Choice, DirectionSource, StaticSource, VectorSource
from trimtab.steering.steered import steer
from trimtab.steering.steering_facts import Evidence, SteeredModel, SteeringPart
from trimtab.steering.trace import Trace
from trimtab.steering.trace_replay import Mismatch, ReplayReport, replay, replay_trace
from trimtab.steering.traced import TracedSource

__all__ = [
    "OPERATIONS",
    "UNITS",
    "Choice",
    "CombinedSource",
    "Continuation",
    "DirectionSource",
    "DirectionTable",
    "DivergenceRecorder",
    "DoseResult",
    "DoseSummary",
    "Evidence",
    "ForkSource",
    "Mismatch",
    "PatchSource",
    "RandomFeatureSource",
    "ReconstructionSource",
    "ReplayReport",
    "ReplaySource",
    "Slots",
    "StaticSource",
    "SteerConfig",
    "SteerOptions",
    "SteerResult",
    "SteeredModel",
    "Steering",
    "SteeringPart",
    "TokenEffects",
    "TopActiveSource",
    "TopTokens",
    "Trace",
    "TracedSource",
    "UnequalDoseError",
    "Unit",
    "VectorSource",
    "assert_equal_dose",
    "check_doses",
    "check_unit",
    "coefficients",
    "dose_summary",
    "load",
    "operation",
    "replay",
    "replay_trace",
    "run_steer",
    "steer",
    "token_effects",
]

"""Steer generation with features: doses, intervention sources, traces, replay."""

from trimtab.steering.controls import RandomDirectionSource, RandomFeatureSource, TopActiveSource
from trimtab.steering.doses import UNITS, Unit, check_doses, check_unit, coefficients
from trimtab.steering.equal_dose import DoseSummary, UnequalDoseError, assert_equal_dose, dose_summary
from trimtab.steering.replaying import CombinedSource, ForkSource, ReplaySource
from trimtab.steering.sources import Choice, DirectionSource, ScheduleSource, StaticSource, VectorSource
from trimtab.steering.table import DirectionTable

__all__ = [
    "UNITS",
    "Choice",
    "CombinedSource",
    "DirectionSource",
    "DirectionTable",
    "DoseSummary",
    "ForkSource",
    "RandomDirectionSource",
    "RandomFeatureSource",
    "ReplaySource",
    "ScheduleSource",
    "StaticSource",
    "TopActiveSource",
    "UnequalDoseError",
    "Unit",
    "VectorSource",
    "assert_equal_dose",
    "check_doses",
    "check_unit",
    "coefficients",
    "dose_summary",
]

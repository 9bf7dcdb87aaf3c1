"""Supervised feature dictionaries: codes of known attributes, and tests of any dictionary against them."""

from trimtab.evaluation.supervised.approximation import Approximation, approximation
from trimtab.evaluation.supervised.codes import FITS, Codes, Factors, mean_codes, mse_codes
from trimtab.evaluation.supervised.control import (
    EditSuccess,
    edit_by_meaning,
    edit_greedy,
    edit_success,
    edit_supervised,
)
from trimtab.evaluation.supervised.cross_sections import CROSS_SECTIONS, PatchedPrompts, activations_of, cross_section

__all__ = [
    "CROSS_SECTIONS",
    "FITS",
    "Approximation",
    "Codes",
    "EditSuccess",
    "Factors",
    "PatchedPrompts",
    "activations_of",
    "approximation",
    "cross_section",
    "edit_by_meaning",
    "edit_greedy",
    "edit_success",
    "edit_supervised",
    "mean_codes",
    "mse_codes",
]

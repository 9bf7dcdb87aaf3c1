"""Supervised feature dictionaries: codes of known attributes, and tests of any dictionary against them."""

from trimtab.evaluation.supervised.approximation import Approximation, approximation
from trimtab.evaluation.supervised.attention_result import AttentionTerms
from trimtab.evaluation.supervised.attention_scores import score_locations
from trimtab.evaluation.supervised.attention_terms import attention_terms
from trimtab.evaluation.supervised.codes import FITS, Codes, Factors, mean_codes, mse_codes
from trimtab.evaluation.supervised.control import (
    EditSuccess,
    edit_by_meaning,
    edit_greedy,
    edit_success,
    edit_supervised,
)
from trimtab.evaluation.supervised.cross_sections import CROSS_SECTIONS, PatchedPrompts, activations_of, cross_section
from trimtab.evaluation.supervised.dictionary_files import LoadedDictionaries, load_dictionaries
from trimtab.evaluation.supervised.parts import FittedCodes
from trimtab.evaluation.supervised.rotation import (
    LearnedRotation,
    Rotation,
    difference_rotation,
    learn_rotation,
    random_rotation,
)
from trimtab.evaluation.supervised.saved_codes import build_codes, save_codes

__all__ = [
    "CROSS_SECTIONS",
    "FITS",
    "Approximation",
    "AttentionTerms",
    "Codes",
    "EditSuccess",
    "Factors",
    "FittedCodes",
    "LearnedRotation",
    "LoadedDictionaries",
    "PatchedPrompts",
    "Rotation",
    "activations_of",
    "approximation",
    "attention_terms",
    "build_codes",
    "cross_section",
    "difference_rotation",
    "edit_by_meaning",
    "edit_greedy",
    "edit_success",
    "edit_supervised",
    "learn_rotation",
    "load_dictionaries",
    "mean_codes",
    "mse_codes",
    "random_rotation",
    "save_codes",
    "score_locations",
]

"""Dictionaries: SAEs of several architectures, their files, their statistics, and metrics on rows of activations."""

from trimtab.dictionaries.architectures import ARCHITECTURES, architecture_class
from trimtab.dictionaries.architectures.gated import Gated
from trimtab.dictionaries.architectures.jumprelu import JumpReLU
from trimtab.dictionaries.architectures.standard import Standard
from trimtab.dictionaries.architectures.supervised import Supervised
from trimtab.dictionaries.architectures.topk import TopK
from trimtab.dictionaries.base import Dictionary, DictionaryInfo
from trimtab.dictionaries.config import AnyModelConfig, DictionaryConfig
from trimtab.dictionaries.converting import ConvertConfig, ConvertResult, convert_sae
from trimtab.dictionaries.core_metrics import CoreMetrics, CoreMetricsAccumulator, DocumentTotals
from trimtab.dictionaries.describing import SAEDescription, SAEInfoConfig, describe_sae
from trimtab.dictionaries.feature_stats import FeatureStats, FeatureStatsAccumulator
from trimtab.dictionaries.files import load_dictionary, save_dictionary
from trimtab.dictionaries.folding import fold_norms, fold_scale
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.shipped import shipped_names
from trimtab.dictionaries.sparse import SparseCodes

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "AnyModelConfig",
    "ConvertConfig",
    "ConvertResult",
    "CoreMetrics",
    "CoreMetricsAccumulator",
    "Dictionary",
    "DictionaryConfig",
    "DictionaryInfo",
    "DocumentTotals",
    "FeatureStats",
    "FeatureStatsAccumulator",
    "Gated",
    "JumpReLU",
    "SAEDescription",
    "SAEInfoConfig",
    "SparseCodes",
    "Standard",
    "Supervised",
    "TopK",
    "architecture_class",
    "convert_sae",
    "describe_sae",
    "fold_norms",
    "fold_scale",
    "load_dictionary",
    "save_dictionary",
    "shipped_names",
]

"""Load a language model; name, read and edit its sites; decode."""

from trimtab.lm.applying import AppliedEdits, applied
from trimtab.lm.batch import TokenBatch
from trimtab.lm.cache import GrowingCache
from trimtab.lm.capabilities import CAPABILITIES, Capabilities
from trimtab.lm.capturing import capture, last_activations
from trimtab.lm.catalogue import ModelList, cache_dir, list_models
from trimtab.lm.config import ModelConfig
from trimtab.lm.decode_stream import DecodeStep, DecodeStream
from trimtab.lm.decoding import Decoded, decode
from trimtab.lm.describing import ModelDetails, show
from trimtab.lm.editing import DecodeStart, EditRequest, InterventionSource, JoinableSource
from trimtab.lm.edits import Edit, EditLog, activation_hash, edit_delta
from trimtab.lm.fetching import pull
from trimtab.lm.loading import check_device, load_model, load_tokenizer
from trimtab.lm.model import LanguageModel
from trimtab.lm.not_finite import not_finite_error
from trimtab.lm.positions import PositionRule
from trimtab.lm.prompt_cache import PromptCache
from trimtab.lm.row import DecodeConfig, DecodingConfig, Row
from trimtab.lm.self_check import check_model
from trimtab.lm.sites import Site
from trimtab.lm.taps import RowDelta, edited, site_width
from trimtab.lm.zoo import Zoo, ZooEntry, survey

__all__ = [
    "CAPABILITIES",
    "AppliedEdits",
    "Capabilities",
    "DecodeConfig",
    "DecodeStart",
    "DecodeStep",
    "DecodeStream",
    "Decoded",
    "DecodingConfig",
    "Edit",
    "EditLog",
    "EditRequest",
    "GrowingCache",
    "InterventionSource",
    "JoinableSource",
    "LanguageModel",
    "ModelConfig",
    "ModelDetails",
    "ModelList",
    "PositionRule",
    "PromptCache",
    "Row",
    "RowDelta",
    "Site",
    "TokenBatch",
    "Zoo",
    "ZooEntry",
    "activation_hash",
    "applied",
    "cache_dir",
    "capture",
    "check_device",
    "check_model",
    "decode",
    "edit_delta",
    "edited",
    "last_activations",
    "list_models",
    "load_model",
    "load_tokenizer",
    "not_finite_error",
    "pull",
    "show",
    "site_width",
    "survey",
]

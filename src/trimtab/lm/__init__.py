"""Load a language model; name, read and edit its sites; decode."""

from trimtab.lm.batch import TokenBatch
from trimtab.lm.cache import GrowingCache
from trimtab.lm.capture import capture
from trimtab.lm.decode import DecodeConfig, Decoded, decode
from trimtab.lm.editing import (
    DecodeStart,
    Edit,
    EditLog,
    EditRequest,
    InterventionSource,
    PositionRule,
    edit_delta,
    edited,
)
from trimtab.lm.model import LanguageModel
from trimtab.lm.sites import RowDelta, Site, check_site, site_width

__all__ = [
    "DecodeConfig",
    "DecodeStart",
    "Decoded",
    "Edit",
    "EditLog",
    "EditRequest",
    "GrowingCache",
    "InterventionSource",
    "LanguageModel",
    "PositionRule",
    "RowDelta",
    "Site",
    "TokenBatch",
    "capture",
    "check_site",
    "decode",
    "edit_delta",
    "edited",
    "site_width",
]

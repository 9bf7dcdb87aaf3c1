"""Load a language model; name, read and edit its sites; decode."""

from trimtab.lm.batch import TokenBatch
from trimtab.lm.cache import GrowingCache
from trimtab.lm.capture import capture
from trimtab.lm.model import LanguageModel
from trimtab.lm.sites import Site

__all__ = ["GrowingCache", "LanguageModel", "Site", "TokenBatch", "capture"]

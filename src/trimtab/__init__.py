"""trimtab finds the features that control a language model, puts them to use, and proves what they do."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimtab.version import __version__

if TYPE_CHECKING:
    from trimtab.dictionaries import load_dictionary as load_sae
    from trimtab.evaluation import evaluate
    from trimtab.features import examples, feature
    from trimtab.finding import find
    from trimtab.lm import load_model
    from trimtab.policies import train_policy
    from trimtab.selection import rank
    from trimtab.steering import steer
    from trimtab.training import train_sae

__all__ = [
    "__version__",
    "evaluate",
    "examples",
    "feature",
    "find",
    "load_model",
    "load_sae",
    "rank",
    "steer",
    "train_policy",
    "train_sae",
]

# Of a notebook without widgets, at the import of transformers; bars here are none.
warnings.filterwarnings("ignore", message="IProgress not found")

_PLACES = {
    "evaluate": "evaluation.evaluate",
    "examples": "features.examples",
    "feature": "features.feature",
    "find": "finding.find",
    "load_model": "lm.load_model",
    "load_sae": "dictionaries.load_dictionary",
    "rank": "selection.rank",
    "steer": "steering.steer",
    "train_policy": "policies.train_policy",
    "train_sae": "training.train_sae",
}


def __getattr__(name: str) -> Any:
    """What `import trimtab` offers, each loaded when it is asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}; there is {', '.join(_PLACES)}")
    room, _, function = _PLACES[name].partition(".")
    return getattr(import_module(f"trimtab.{room}"), function)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])

"""The SAE architectures, one file each: inference class, config of the training, training class with the paper's loss.

A new architecture is a new file here. Its classes register themselves by their `architecture`: inference classes under
the names that SAELens's files use, training classes under their own.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from trimtab.dictionaries.sae import ARCHITECTURES, SAE
from trimtab.dictionaries.trainable import TRAINABLE, TrainableSAE
from trimtab.errors import UserError, did_you_mean

__all__ = ["ARCHITECTURES", "TRAINABLE", "architecture_class", "trainable_class"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def architecture_class(name: object) -> type[SAE]:
    """The inference class of an architecture. Raises a `UserError` if there is none of that name."""
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    raise UserError(
        f"architecture {name!r}",
        f"trimtab reads {', '.join(sorted(ARCHITECTURES))}",
        "batchtopk and matryoshka SAEs are read once saved for inference, which makes them jumprelu",
    )


def trainable_class(name: object) -> type[TrainableSAE]:
    """The training class of an architecture. Raises a `UserError` if there is none of that name."""
    if isinstance(name, str) and name in TRAINABLE:
        return TRAINABLE[name]
    fix = did_you_mean(str(name), TRAINABLE, "choose one")
    raise UserError(f"arch {name!r}", f"it is one of {', '.join(sorted(TRAINABLE))}", fix)

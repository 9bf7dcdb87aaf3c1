"""The SAE architectures: for inference by the names that SAELens's files use, in training by their own."""

from __future__ import annotations

from trimtab.dictionaries.batchtopk import TrainableBatchTopK
from trimtab.dictionaries.gated import Gated, TrainableGated
from trimtab.dictionaries.jumprelu import JumpReLU, TrainableJumpReLU
from trimtab.dictionaries.matryoshka import TrainableMatryoshka
from trimtab.dictionaries.panneal import TrainablePAnneal
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.standard import Standard, TrainableReLU
from trimtab.dictionaries.topk import TopK, TrainableTopK
from trimtab.dictionaries.trainable import TrainableSAE
from trimtab.errors import UserError

ARCHITECTURES: dict[str, type[SAE]] = {cls.architecture: cls for cls in (Standard, Gated, TopK, JumpReLU)}
"""Every architecture that can be loaded. A new one needs its file and a place here."""

TRAINABLE: dict[str, type[TrainableSAE]] = {
    cls.architecture: cls
    for cls in (
        TrainableReLU,
        TrainableTopK,
        TrainableBatchTopK,
        TrainableJumpReLU,
        TrainableGated,
        TrainableMatryoshka,
        TrainablePAnneal,
    )
}
"""Every architecture that can be trained."""


def architecture_class(name: object) -> type[SAE]:
    """The inference class of an architecture.

    Raises:
        UserError: there is none of that name.
    """
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    raise UserError(
        f"architecture {name!r}",
        f"trimtab reads {', '.join(ARCHITECTURES)}",
        "batchtopk and matryoshka SAEs are read once saved for inference, which makes them jumprelu",
    )

"""SAEs of SAELens and dictionary_learning that are in memory, known by their public attributes: neither is imported.

What such an object says of itself is read as its files are. That it computes what it says is then checked on rows, so
that a subclass or a switch that changes it is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.dictionaries.checked_weights import FoundSAE
from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.foreign.dictionary_learning import CLASSES, found_in_trainer
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.saelens_layout import found_in_saelens
from trimtab.errors import UserError

_ROWS = 64
_STRENGTHS = (0.3, 3.0, 30.0)


def found_in_object(sae: Any) -> FoundSAE:
    """Understand an SAE of another library; its weights are copied.

    Args:
        sae: one of SAELens has a `cfg` with `to_dict()`; one of dictionary_learning is known by its class's name, and
            has `activation_dim` and `dict_size`.

    Raises:
        UserError: it is neither, or of a kind that trimtab does not compute.
    """
    name = f"the {type(sae).__name__} in memory"
    if hasattr(getattr(sae, "cfg", None), "to_dict"):
        return found_in_saelens(Fields(sae.cfg.to_dict(), f"the config of {name}"), _tensors(sae), name)
    known = next((kind.__name__ for kind in type(sae).__mro__ if kind.__name__ in CLASSES), "")
    if not known or not hasattr(sae, "dict_size"):
        raise UserError(
            name,
            f"it has neither SAELens's cfg.to_dict() nor one of dictionary_learning's classes {', '.join(CLASSES)}",
            "give a file or such an SAE, or subclass trimtab.dictionaries.Dictionary",
        )
    says = {"dict_class": known, "dict_size": int(sae.dict_size), "activation_dim": int(sae.activation_dim)}
    says |= {"k": int(sae.k)} if hasattr(sae, "k") else {}
    says |= {"apply_b_dec_to_input": sae.apply_b_dec_to_input} if hasattr(sae, "apply_b_dec_to_input") else {}
    return found_in_trainer(Fields(says, name), _tensors(sae), name)


@torch.no_grad()
def check_same(ours: SAE, theirs: Any) -> None:
    """Raise a `UserError` unless a dictionary reconstructs what the object does, on rows where its features fire."""
    weight = next(iter(theirs.parameters()))
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(ours.n_features, (len(_STRENGTHS), _ROWS, 2), generator=generator)
    scale = torch.tensor(_STRENGTHS)[:, None, None]
    rows = (ours.b_dec + scale * ours.directions.cpu()[some].sum(dim=2)).flatten(0, 1).detach()
    rows = torch.cat([rows, rows.norm(dim=1).mean() * torch.randn(rows.shape, generator=generator)])
    if ours.info.is_centred:
        rows -= rows.mean(dim=1, keepdim=True)
    found, expected = ours(rows), _theirs_of(theirs, rows.to(weight)).to(rows)
    off = (found - expected).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-6)
    if not float(off.quantile(0.9)) <= 1e-4 + 4 * torch.finfo(weight.dtype).eps ** 0.75:
        raise UserError(
            f"the {type(theirs).__name__} in memory",
            f"it does not compute what its attributes say (reconstructions are {float(off.quantile(0.9)):.1%} apart)",
            "undo what was changed on the object, or subclass trimtab.dictionaries.Dictionary",
        )


def _theirs_of(theirs: Any, rows: Tensor) -> Tensor:
    """What the object makes of rows; one that joins heads is given each row as one head, and forgets it again."""
    joins = getattr(theirs, "turn_on_forward_pass_hook_z_reshaping", None)
    if joins is None or theirs.cfg.reshape_activations != "hook_z":
        return theirs(rows)
    made = theirs(rows[:, None]).reshape(rows.shape)
    joins()
    return made


def _tensors(sae: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in sae.state_dict().items()}

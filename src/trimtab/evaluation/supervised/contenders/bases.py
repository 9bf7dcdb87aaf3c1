"""Orthonormal bases: principal components, and the random one that they are held against.

A basis is a dictionary of twice as many features as dimensions, one for each sign: f = relu(±(x − ā) · v). It rebuilds
every activation exactly, so that its sufficiency says nothing; what its edits and features say does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries import DictionaryInfo, Standard
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.contenders.contender import Contender, Ground, kind
from trimtab.evaluation.supervised.contenders.dictionaries import Dictionaries


def basis_dictionary(rows: Float[Tensor, "n width"], mean: Float[Tensor, " width"], about: DictionaryInfo) -> Standard:
    """Both signs of orthonormal rows as features of activations about their mean."""
    both = torch.cat([rows, -rows]).contiguous()
    nothing = torch.zeros(len(both))
    return Standard(both.T.contiguous(), nothing, both, mean.clone(), apply_b_dec_to_input=True, info=about)


def _bases(ground: Ground, name: str, random: bool) -> list[Contender]:
    generator = torch.Generator().manual_seed(ground.seed)
    found: dict[Location, Standard] = {}
    for place, x in ground.activations.items():
        width = x.shape[1]
        of = torch.randn(width, width, generator=generator) if random else (x - x.mean(0)).T @ (x - x.mean(0))
        rows = torch.linalg.qr(of).Q.T if random else torch.linalg.eigh(of.double()).eigenvectors.T.flip(0).float()
        info = DictionaryInfo(architecture="standard", model=ground.model.name, site=str(place.site))
        found[place] = basis_dictionary(rows, x.mean(0), info)
    return [Dictionaries(name, found, ground)]


@kind("pca")
def principal_components(ground: Ground) -> list[Contender]:
    """All principal components of the training prompts' activations."""
    return _bases(ground, "principal components", random=False)


@kind("random")
def random_directions(ground: Ground) -> list[Contender]:
    """A random orthonormal basis."""
    return _bases(ground, "random basis", random=True)

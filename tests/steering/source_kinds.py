"""One source of every kind of edit, so that each rule of steering can be checked for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from steering_checks import head_width
from torch import Tensor

from trimtab.dictionaries import Standard
from trimtab.lm import InterventionSource, LanguageModel
from trimtab.steering import (
    CombinedSource,
    DirectionTable,
    PatchSource,
    RandomFeatureSource,
    ReconstructionSource,
    StaticSource,
    TopActiveSource,
    VectorSource,
)

SITE, LATER, HEAD = "resid_post.1", "resid_post.2", "attn_z.2.1"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


def two_sites(model: LanguageModel, sae: Standard) -> InterventionSource:
    tables = {SITE: sae, LATER: DirectionTable(random(7, 32))}
    return StaticSource(tables, {SITE: [3, 5], LATER: [6]}, {SITE: [0.5, -0.4], LATER: 0.6})


def heads(model: LanguageModel, sae: Standard) -> InterventionSource:
    width = head_width(model)
    vectors = {"attn_z.1": random(2, model.hf.config.num_attention_heads, width), HEAD: random(width)}
    return VectorSource(vectors, doses=0.9, operation="clamp")


def patched_head(model: LanguageModel, sae: Standard) -> InterventionSource:
    """Another value at each position, beyond the longest prompt and its answer."""
    values = {HEAD: 3 * random(1, 64, head_width(model)), SITE: 3 * random(1, 64, 32)}
    return PatchSource(values, positions="generated", keep_replacements=True)


def patched_everywhere(model: LanguageModel, sae: Standard) -> InterventionSource:
    return PatchSource({SITE: 3 * random(32)}, positions="generated", keep_replacements=True)


def reconstructed(model: LanguageModel, sae: Standard) -> InterventionSource:
    return ReconstructionSource(sae, positions="generated", keep_replacements=True)


def patched_and_pushed(model: LanguageModel, sae: Standard) -> InterventionSource:
    patch = PatchSource({SITE: 3 * random(32)}, positions="generated", keep_replacements=True)
    return CombinedSource([StaticSource(sae, [2, 3], 0.3), patch, StaticSource(sae, 4, 0.4, LATER)])


KINDS: dict[str, Callable[[LanguageModel, Standard], InterventionSource]] = {
    "clamp": lambda model, sae: StaticSource(sae, [3, 5], 4.0, operation="clamp", unit="absolute"),
    "scale": lambda model, sae: TopActiveSource(sae, -3.0, k=2, operation="scale"),
    "overwrite": lambda model, sae: StaticSource(sae, [3, 5], [0.4, -0.5], operation="overwrite"),
    "axes": lambda model, sae: StaticSource(
        DirectionTable.axes(32, [4, 9, 30]), [0, 2], [3.3, -0.1], SITE, operation="overwrite", unit="absolute"
    ),
    "ablated vectors": lambda model, sae: VectorSource(random(5, 32) + 0.5, SITE, operation="ablate"),
    "kept length": lambda model, sae: VectorSource(random(32), SITE, keep_length=True),
    "two sites": two_sites,
    "random at two sites": lambda model, sae: RandomFeatureSource({SITE: sae, LATER: sae}, 0.5, k=2),
    "heads": heads,
    "patched head": patched_head,
    "patched everywhere": patched_everywhere,
    "reconstructed": reconstructed,
    "patched and pushed": patched_and_pushed,
}
"""Edits at the default positions, strong enough for the checks."""

"""A small random dictionary for any model, with statistics."""

from __future__ import annotations

import torch

from trimtab.dictionaries import Standard
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.feature_stats import FeatureStatsAccumulator
from trimtab.lm import LanguageModel, TokenBatch, capture

LAYER = 1
N_FEATURES = 48


def make_dictionary(model: LanguageModel, site: str = f"resid_post.{LAYER}", n: int = N_FEATURES) -> Standard:
    """Random ReLU SAE with decoder rows of unequal norm, one feature in seven dead, and its statistics, where the model
    is."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(6, 100, (8, 24), generator=generator)
    x = capture(model, TokenBatch.full(ids.to(model.device)), [site])[model.site(site)].cpu()
    rows = torch.randn(n, x.shape[-1], generator=generator)
    W_dec = rows * (0.5 + torch.rand(n, 1, generator=generator))
    W_enc = rows.T / rows.norm(dim=1)
    b_enc = -0.2 * x.flatten(0, 1).norm(dim=-1).mean() * torch.rand(n, generator=generator)
    b_enc[::7] = -1e6  # these never fire
    info = DictionaryInfo(architecture="standard", model=model.name, site=site)
    sae = Standard(W_enc, b_enc, W_dec, x.mean((0, 1)), info=info)
    statistics = FeatureStatsAccumulator(sae.decoder_norms)
    statistics.update(sae.encode(x))
    sae.feature_stats = statistics.result()
    return sae.to(model.device)

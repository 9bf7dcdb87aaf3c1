"""A dictionary that is nothing but rows, and tiny models in which one direction controls the next token."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from trimtab.dictionaries import Dictionary, DictionaryInfo, FeatureStats
from trimtab.lm import LanguageModel


class Rows(Dictionary):
    """Decoder rows without an encoder: all that ranking needs."""

    architecture = "standard"

    def __init__(self, rows: Tensor, site: str = "resid_post.1") -> None:
        super().__init__(DictionaryInfo(architecture="standard", site=site))
        self.W_dec = nn.Parameter(rows, requires_grad=False)


def stats_of(max_activation: Tensor | np.ndarray, firing_rate: Tensor | np.ndarray | None = None) -> FeatureStats:
    largest = np.asarray(max_activation, dtype=np.float32)
    rate = (largest > 0) * 0.01 if firing_rate is None else np.asarray(firing_rate)
    return FeatureStats(max_activation=largest, mean_activation=largest / 2, firing_rate=rate, n_tokens=1000)


@pytest.fixture
def make_rows() -> Callable[..., Rows]:
    """Random rows of various lengths with statistics."""

    def make(n: int, d: int = 32, seed: int = 0, site: str = "resid_post.1") -> Rows:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(n, d, generator=generator) * torch.rand(n, 1, generator=generator).add(0.5)
        dictionary = Rows(rows, site)
        dictionary.feature_stats = stats_of(torch.rand(n, generator=generator) + 0.5)
        return dictionary

    return make


class Planted(NamedTuple):
    """A model, rows of equal strength, and the one among them that brings out `token`."""

    model: LanguageModel
    dictionary: Rows
    feature: int
    token: int


@pytest.fixture
def planted(any_tiny: LanguageModel) -> Planted:
    """Quiet upper layers, and a head that reads one direction u into one token and nothing of u into the others."""
    generator = torch.Generator().manual_seed(5)
    hf = copy.deepcopy(any_tiny.hf)
    model = LanguageModel.from_hf(hf, any_tiny.tokenizer, "planted")
    token, feature, d = 77, 137, model.d_model
    u = torch.randn(d, generator=generator)
    u = (u - u.mean()) / (u - u.mean()).norm()  # LayerNorm sees nothing of the mean
    head = model.layout.head.weight
    with torch.no_grad():
        for layer in model.layout.layers[2:]:
            for branch in (layer.attn_branch, layer.mlp_branch):
                last = getattr(branch, "down_proj", None) or getattr(branch, "c_proj", None) or branch
                if last.weight.ndim == 1:  # Gemma's branches end in a norm of weight 1 + w
                    last.weight.fill_(-0.9)
                else:
                    last.weight.div_(10)
        head.mul_(0.3).sub_(torch.outer(head @ u, u))
        head[token] = 3 * u
    rows = torch.randn(400, d, generator=generator)
    rows[feature] = u
    dictionary = Rows(rows / rows.norm(dim=-1, keepdim=True))
    dictionary.feature_stats = stats_of(torch.ones(400))
    return Planted(model, dictionary, feature, token)

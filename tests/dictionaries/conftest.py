"""Random SAEs of every architecture; tests may import modules of this directory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries import ARCHITECTURES, SAE, DictionaryInfo

sys.path.append(str(Path(__file__).parent))

RandomSAE = Callable[..., SAE]


@pytest.fixture(scope="session")
def random_sae() -> RandomSAE:
    """Make an SAE with random weights: decoder norms from about 0.5 to 2, biases and thresholds away from 0."""

    def make(
        architecture: str,
        *,
        d: int = 7,
        n: int = 20,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        info: DictionaryInfo | None = None,
        unit_rows: bool = False,
        **settings: object,
    ) -> SAE:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        cls = ARCHITECTURES[architecture]
        sizes = {"n": n, "d": d}
        weights = {name: 0.3 * draw(*(sizes[s] for s in shape.split())) for name, shape in cls.shapes.items()}
        weights["W_enc"] = draw(d, n) / d**0.5
        norms = torch.ones(n, 1) if unit_rows else 0.5 + 1.5 * torch.rand(n, 1, generator=generator).double()
        weights["W_dec"] = draw(n, d)
        weights["W_dec"] *= norms / weights["W_dec"].norm(dim=1, keepdim=True)
        for name in {"threshold", "size"} & weights.keys():
            weights[name] = weights[name].abs()
        if architecture == "topk":
            settings.setdefault("k", max(1, n // 4))
        if architecture == "supervised":
            settings.setdefault("factors", [n] if n < 3 else [n - n // 3, n // 3])
        info = info or DictionaryInfo(architecture=architecture)
        return cls(**{name: w.to(dtype) for name, w in weights.items()}, **settings, info=info)

    return make

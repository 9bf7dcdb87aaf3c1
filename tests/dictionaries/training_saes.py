"""SAEs in training, away from their start, with rows; and mistakes put into their source."""

from __future__ import annotations
import __future__

import dataclasses
import inspect
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.architectures.jumprelu import TrainableJumpReLU

D, N, K, ROWS = 10, 48, 5, 37
ROW_NORM = 2.0
"""What a JumpReLU SAE here takes for the mean norm of the rows."""
GROUPS = (1 / 12, 1 / 6, 1 / 4, 1 / 2)


def settings_of(arch: str, **settings: Any) -> dict[str, Any]:
    """Settings, with what they leave open: how sparse codes become, and groups that N can be divided into."""
    names = {field.name for field in dataclasses.fields(TRAINABLE[arch].config_class)}
    usual = {"k": K, "groups": GROUPS} if "l0" not in settings else {}
    usual |= {"sparsity_weight": 0.7} if "l0" not in settings else {}
    return {"n_features": N, "block_rows": 16, **{n: v for n, v in usual.items() if n in names}, **settings}


def build(arch: str, **settings: Any) -> Any:
    """An SAE in float64, away from W_enc = W_decᵀ, unit rows and zero biases, where errors could cancel."""
    cls = TRAINABLE[arch]
    sae = cls(cls.config_class(**settings_of(arch, **settings)), D, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if isinstance(sae, TrainableJumpReLU):
            sae.row_norm.fill_(ROW_NORM)
            sae.theta.add_(0.75).clamp_(min=0.0)
            sae.target_weight.fill_(3.0)
    return sae


def batch(rows: int = ROWS) -> Tensor:
    return 2 * torch.randn(rows, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5


def make_dead(sae: Any, count: int) -> Tensor:
    """Let some features count as dead; `dead_after` must be below 1,000."""
    dead = torch.randperm(N, generator=torch.Generator().manual_seed(5))[:count]
    sae.tokens_since_fired[dead] = 1_000
    return dead


def mutate(patch: pytest.MonkeyPatch, owner: type, method: str, old: str, new: str) -> None:
    """Replace a piece of a method's source."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, method)))
    assert old in source, f"{owner.__name__}.{method} has no {old!r}"
    names = dict(vars(sys.modules[owner.__module__]))
    code = compile(source.replace(old, new), f"<{method} with {new!r}>", "exec", __future__.annotations.compiler_flag)
    exec(code, names)
    patch.setattr(owner, method, names[method])

"""A dense training step of each architecture as one writes it: autograd through all features, and a fused Adam.

Rows are `[B, d]`, encoder weights `[d, n]`, decoder rows have norm 1. Nothing is done about dead features, sparsity
targets, logging or values that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

GROUPS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""Where the nested dictionaries of a Matryoshka SAE end."""
BANDWIDTH = 0.5
EXPONENT = 0.5
"""p of p-annealing, about half way."""

Weights = dict[str, Tensor]
Loss = Callable[[Tensor, Weights, int, float], Tensor]


def _pre_activations(x: Tensor, w: Weights) -> Tensor:
    return (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]


def _squared_error(x: Tensor, f: Tensor, w: Weights) -> Tensor:
    return (x - (f @ w["W_dec"] + w["b_dec"])).square().sum(1).mean()


def topk(x: Tensor, w: Weights, k: int, _weight: float) -> Tensor:
    """Each row keeps its k largest."""
    h = _pre_activations(x, w)
    top = h.topk(k, dim=1)
    return _squared_error(x, torch.zeros_like(h).scatter(1, top.indices, top.values.relu()), w)


def _batch_kept(x: Tensor, w: Weights, k: int) -> Tensor:
    h = _pre_activations(x, w)
    least = h.detach().flatten().topk(k * len(x), sorted=False).values.min()
    return h.relu() * (h >= least)


def batchtopk(x: Tensor, w: Weights, k: int, _weight: float) -> Tensor:
    """The batch keeps its k·B largest."""
    return _squared_error(x, _batch_kept(x, w, k), w)


def matryoshka(x: Tensor, w: Weights, k: int, _weight: float) -> Tensor:
    """BatchTopK, in which each prefix of the dictionary reconstructs."""
    f, rebuilt, start, total = _batch_kept(x, w, k), w["b_dec"], 0, x.new_zeros(())
    for share in GROUPS:
        end = round(share * f.shape[1])
        rebuilt = rebuilt + f[:, start:end] @ w["W_dec"][start:end]
        total, start = total + (x - rebuilt).square().sum(1).mean(), end
    return total


def relu(x: Tensor, w: Weights, _k: int, weight: float) -> Tensor:
    """λ Σ f."""
    f = _pre_activations(x, w).relu()
    return _squared_error(x, f, w) + weight * f.sum(1).mean()


def panneal(x: Tensor, w: Weights, _k: int, weight: float) -> Tensor:
    """λ Σ f^p, a straight line below a small code."""
    f = _pre_activations(x, w).relu()
    penalty = f * f.clamp_min(w["linear_below"]).pow(EXPONENT - 1)
    return _squared_error(x, f, w) + weight * penalty.sum(1).mean()


def jumprelu(x: Tensor, w: Weights, _k: int, weight: float) -> Tensor:
    """λ L0 by straight-through estimators of a threshold's derivative."""
    h, theta = _pre_activations(x, w), w["theta"]
    kernel = ((h - theta).abs() < BANDWIDTH / 2).to(h.dtype) / BANDWIDTH
    through = theta.detach() - theta
    fires = h > theta
    f = h * fires + theta.detach() * kernel * through
    return _squared_error(x, f, w) + weight * (fires + kernel * through).sum(1).mean()


def gated(x: Tensor, w: Weights, _k: int, weight: float) -> Tensor:
    """Gate and magnitude, and a reconstruction by the gate through a decoder that does not learn from it."""
    p = (x - w["b_dec"]) @ w["W_enc"]
    gate = (p + w["b_enc"]).relu()
    f = (gate > 0) * (w["r_mag"].exp() * p + w["b_mag"]).relu()
    frozen = gate @ w["W_dec"].detach() + w["b_dec"].detach()
    return _squared_error(x, f, w) + weight * gate.sum(1).mean() + (x - frozen).square().sum(1).mean()


LOSSES: dict[str, Loss] = {
    "topk": topk, "batchtopk": batchtopk, "jumprelu": jumprelu, "gated": gated, "relu": relu,
    "matryoshka": matryoshka, "panneal": panneal,
}  # fmt: skip
"""Loss of rows, weights, k and the sparsity weight, by trimtab's name of the architecture."""
EXTRA = {"jumprelu": ("theta",), "gated": ("r_mag", "b_mag")}
FIXED = {"panneal": ("linear_below",)}


class PlainStep:
    """Weights, Adam, and a step.

    Args:
        architecture: of `LOSSES`.
        d, n, k: sizes.
        device: of the weights.
        compiled: whether the loss and its gradients go through `torch.compile`.
    """

    def __init__(self, architecture: str, *, d: int, n: int, k: int, device: str, compiled: bool = False) -> None:
        generator = torch.Generator(device).manual_seed(0)
        rows = F.normalize(torch.randn(n, d, generator=generator, device=device), dim=1)
        weights = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_dec": rows.new_zeros(d)}
        weights |= {name: rows.new_full((n,), 0.1) for name in ("b_enc", *EXTRA.get(architecture, ()))}
        self.learnt = {name: weight.requires_grad_() for name, weight in weights.items()}
        self.weights = self.learnt | {name: rows.new_full((), 0.1) for name in FIXED.get(architecture, ())}
        self.k, self.weight = k, 1.0
        loss = LOSSES[architecture]
        self.loss: Loss = torch.compile(loss, dynamic=False) if compiled else loss
        self.adam = torch.optim.Adam([*self.learnt.values()], lr=1e-4, fused=True)

    def __call__(self, x: Tensor, *, bf16: bool = False) -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = self.loss(x, self.weights, self.k, self.weight)
        loss.backward()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            rows = self.learnt["W_dec"]
            rows.div_(rows.norm(dim=1, keepdim=True))

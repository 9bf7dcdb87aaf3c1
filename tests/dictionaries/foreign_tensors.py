"""Tensors of every class of dictionary_learning, and what its code computes from them, written from its formulas."""

from __future__ import annotations

import torch
from torch import Tensor

D, N, K = 6, 16, 4
Tensors = dict[str, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scaled_rows(seed: int) -> Tensor:
    rows = draw(N, D, seed=seed)
    return rows / rows.norm(dim=1, keepdim=True) * (0.5 + torch.arange(N)[:, None] / N)


LINEAR = {
    "encoder.weight": draw(N, D, seed=1) / 2,
    "encoder.bias": 0.3 * draw(N, seed=2),
    "decoder.weight": scaled_rows(3).T.contiguous(),
}
PLAIN = {
    "W_enc": draw(D, N, seed=1) / 2,
    "b_enc": 0.3 * draw(N, seed=2),
    "W_dec": scaled_rows(3),
    "b_dec": draw(D, seed=4),
}
TOPK = {**LINEAR, "b_dec": draw(D, seed=4), "k": torch.tensor(K, dtype=torch.int32)}
TENSORS: dict[str, Tensors] = {
    "AutoEncoder": {**LINEAR, "bias": draw(D, seed=4)},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": draw(D, seed=4)},
    "GatedAutoEncoder": {
        "encoder.weight": LINEAR["encoder.weight"],
        "decoder.weight": LINEAR["decoder.weight"],
        "r_mag": 0.3 * draw(N, seed=5),
        "gate_bias": 0.3 * draw(N, seed=6),
        "mag_bias": 0.3 * draw(N, seed=7),
        "decoder_bias": draw(D, seed=4),
    },
    "JumpReluAutoEncoder": {**PLAIN, "threshold": draw(N, seed=8).abs()},
    "AutoEncoderTopK": {**TOPK, "threshold": torch.tensor(0.9)},
    "BatchTopKSAE": {**TOPK, "threshold": torch.tensor(0.4)},
    "MatryoshkaBatchTopKSAE": {
        **PLAIN,
        "k": torch.tensor(K, dtype=torch.int32),
        "threshold": torch.tensor(0.4),
        "group_sizes": torch.tensor([4, 12]),
    },
}


def top(h: Tensor) -> Tensor:
    """A row's k largest entries, by sorting."""
    return torch.stack([torch.where(row >= row.sort(descending=True).values[K - 1], row, 0.0) for row in h])


def codes(dict_class: str, t: Tensors, x: Tensor) -> Tensor:
    """The library's `encode` at inference, written from its formulas."""
    b = next((t[name] for name in ("bias", "b_dec", "decoder_bias") if name in t), torch.zeros(D)).double()
    w = (t["W_enc"] if "W_enc" in t else t["encoder.weight"].T).double()
    if dict_class == "GatedAutoEncoder":
        p = (x - b) @ w
        return ((p + t["gate_bias"]) > 0) * (t["r_mag"].double().exp() * p + t["mag_bias"]).clamp_min(0)
    bias = t.get("b_enc", t.get("encoder.bias")).double()
    if dict_class == "AutoEncoderNew":
        return (x @ w + bias).clamp_min(0)
    if dict_class == "JumpReluAutoEncoder":
        h = x @ w + bias
        return (h * (h > t["threshold"])).clamp_min(0)
    h = ((x - b) @ w + bias).clamp_min(0)
    if dict_class == "AutoEncoderTopK":
        return top(h)
    if dict_class == "AutoEncoder":  # opened with normalize_decoder=True, the default: codes of unit rows
        return h * t["decoder.weight"].double().norm(dim=0)
    return h * (h > t["threshold"])


def rebuilt(dict_class: str, t: Tensors, f: Tensor) -> Tensor:
    """The library's `decode`."""
    w = (t["W_dec"] if "W_dec" in t else t["decoder.weight"].T).double()
    if dict_class == "AutoEncoder":
        w = w / w.norm(dim=1, keepdim=True)
    b = next(t[name] for name in ("bias", "b_dec", "decoder_bias", "decoder.bias") if name in t)
    return f @ w + b.double()

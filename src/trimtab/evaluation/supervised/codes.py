"""Supervised codes (Makelov, Lange and Nanda 2024, arXiv 2405.08366): a vector for each value of each attribute.

An activation is modelled as a mean plus one code per factor, a factor being an attribute or several together:
â = ā + Σ_i u_{i, value_i(prompt)}. *Mean codes* are the means over a value's prompts, less ā; *MSE codes* are least
squares on the one-hots of all factors together. Both have mean zero over the prompts that they were fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.tasks.ioi_prompts import IOIPrompt

Parametrisation = Literal["independent", "coupled", "names"]
FACTORS: Mapping[Parametrisation, tuple[tuple[str, ...], ...]] = {
    "independent": (("IO",), ("S",), ("Pos",)),
    "coupled": (("IO", "Pos"), ("S", "Pos")),
    "names": (("first",), ("second",), ("third",)),
}


class Factors(NamedTuple):
    """The values that codes stand for: one row per (factor, value), factors one after the other."""

    factors: tuple[tuple[str, ...], ...]
    values: tuple[tuple[str, ...], ...]  # per factor

    @classmethod
    def of(cls, prompts: Sequence[IOIPrompt], parametrisation: Parametrisation = "independent") -> Self:
        """All values that prompts have."""
        factors = FACTORS[parametrisation]
        found = [tuple(sorted({_value(prompt, factor) for prompt in prompts})) for factor in factors]
        return cls(factors, tuple(found))

    @property
    def names(self) -> list[str]:
        """`IO=Mary`, in the order of the rows; several attributes are joined: `IO,Pos=Mary,ABB`."""
        return [
            f"{','.join(factor)}={value}"
            for factor, values in zip(self.factors, self.values, strict=True)
            for value in values
        ]

    def rows(self, prompts: Sequence[IOIPrompt]) -> Int[Tensor, "P F"]:
        """Which rows make up each prompt.

        Raises:
            UserError: a value that has no code, as a name that was in no prompt they were fitted on.
        """
        number = {name: i for i, name in enumerate(self.names)}
        found = [[f"{','.join(factor)}={_value(prompt, factor)}" for factor in self.factors] for prompt in prompts]
        missing = next((name for names in found for name in names if name not in number), None)
        if missing is not None:
            raise UserError(f"value {missing}", "it has no code", "fit the codes on prompts that have it, or on more")
        return torch.tensor([[number[name] for name in names] for names in found]).reshape(len(prompts), -1)

    def centred(self, codes: Float[Tensor, "n w"], rows: Int[Tensor, "P F"]) -> Float[Tensor, "n w"]:
        """Codes less each factor's mean over prompts."""
        start, out = 0, codes.clone()
        for factor, values in enumerate(self.values):
            end = start + len(values)
            out[start:end] -= codes[rows[:, factor]].mean(0)
            start = end
        return out


def _value(prompt: IOIPrompt, factor: Sequence[str]) -> str:
    known = {"first": prompt.first, "second": prompt.second, "third": prompt.actor} | prompt.attributes
    return ",".join(known[attribute] for attribute in factor)


class Codes(NamedTuple):
    """Codes of activations of one width."""

    mean: Tensor  # [w]
    vectors: Tensor  # [n, w]

    def reconstruct(self, rows: Int[Tensor, "P F"]) -> Float[Tensor, "P w"]:
        """ā + Σ_i u_i."""
        return self.mean + self.vectors[rows].sum(1)


def mean_codes(activations: Float[Tensor, "P w"], factors: Factors, rows: Int[Tensor, "P F"]) -> Codes:
    """The mean over each value's prompts, less the mean over all."""
    x = activations.double()
    mean, n = x.mean(0), sum(map(len, factors.values))
    sums, times = x.new_zeros(n, x.shape[1]), x.new_zeros(n)
    for factor in rows.T:
        sums.index_add_(0, factor, x - mean)
        times.index_add_(0, factor, torch.ones_like(x[:, 0]))
    return Codes(mean.to(activations), (sums / times.clamp_min(1)[:, None]).to(activations))


def mse_codes(activations: Float[Tensor, "P w"], factors: Factors, rows: Int[Tensor, "P F"]) -> Codes:
    """Least squares on the concatenated one-hots; of all solutions the one whose factors have mean zero."""
    x = activations.double()
    mean, n = x.mean(0), sum(map(len, factors.values))
    ones = x.new_zeros(len(x), n).scatter_(1, rows, 1.0)
    ones -= ones.mean(0)
    # One-hots of a factor sum to 1, so that the design lacks rank: the pseudo-inverse gives one of the solutions.
    found = torch.linalg.pinv(ones.T @ ones, hermitian=True) @ (ones.T @ (x - mean))
    return Codes(mean.to(activations), factors.centred(found, rows).to(activations))


FITS: Mapping[str, Callable[[Tensor, Factors, Tensor], Codes]] = {"mean": mean_codes, "mse": mse_codes}

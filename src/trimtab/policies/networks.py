"""Actor, critic and the normaliser of what they see.

The actor maps an activation to one logit per feature and one, the last, for no intervention. For wide dictionaries the
head has no weights per feature: it makes a query of the site's width and multiplies it with the decoder rows.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Head = Literal["auto", "full", "decoder"]
WIDE = 65_536
"""Features from which on `auto` uses the head over decoder rows."""
LIMIT = 10.0
"""What normalised activations are cut off at."""


class Actor(nn.Module):
    """MLP from activations to the logits of n features and of no intervention.

    Args:
        directions: unit decoder rows; kept as a buffer only by the head that uses them.
        hidden: units of each hidden layer (tanh).
        head: `full` has a weight vector per feature, `decoder` a query of rank `rank` against the decoder rows, `auto`
            the latter from 65,536 features on.
        rank: of the query.
        seed: of the initial weights.
    """

    def __init__(
        self,
        directions: Float[Tensor, "n d"],
        *,
        hidden: tuple[int, ...] = (256,),
        head: Head = "auto",
        rank: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        n, d = directions.shape
        self.n_features = n
        self.head_kind = head if head != "auto" else ("decoder" if n >= WIDE else "full")
        generator = torch.Generator().manual_seed(seed)
        self.body = mlp(d, hidden, generator)
        width = hidden[-1] if hidden else d
        if self.head_kind == "full":
            self.head = _linear(width, n + 1, 0.01, generator)
        else:
            self.query = nn.Sequential(_linear(width, rank, 1.0, generator), _linear(rank, d, 0.01, generator))
            self.no_edit = _linear(width, 1, 0.01, generator)
            self.register_buffer("rows", directions.detach().clone(), persistent=False)

    def forward(self, observation: Float[Tensor, "... d"]) -> Float[Tensor, "... n_and_none"]:
        h = self.body(observation)
        if self.head_kind == "full":
            return self.head(h)
        rows: Tensor = self.rows  # type: ignore[assignment]
        return torch.cat([self.query(h) @ rows.T, self.no_edit(h)], dim=-1)

    @torch.no_grad()
    def lean_to_no_edit(self, share: float, allowed: float) -> None:
        """Let an untrained actor leave the activation alone in about this share of cases.

        Args:
            share: above 0 and below 1.
            allowed: how many features it may choose from, on average.
        """
        last = self.head if self.head_kind == "full" else self.no_edit
        last.bias[-1] = math.log(share / (1 - share)) + math.log(allowed)


class Critic(nn.Module):
    """MLP from activations to the expected return, `[..., 1]`."""

    def __init__(self, d: int, *, hidden: tuple[int, ...] = (256,), seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.body = mlp(d, hidden, generator)
        self.head = _linear(hidden[-1] if hidden else d, 1, 1.0, generator)

    def forward(self, observation: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        return self.head(self.body(observation))


class ObservationNormaliser(nn.Module):
    """Brings activations to mean 0 and variance 1 per dimension, by sums over everything it was shown.

    It is frozen while a batch is rolled out and learnt from, and shown the batch afterwards, so that the logarithm of
    the probability ratio is 0 before the first update.
    """

    mean: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(d, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def show(self, x: Float[Tensor, "R d"]) -> None:
        """Take rows into the mean and the variance (Chan et al. 1983)."""
        if not len(x):
            return
        x = x.double()
        mean, total = x.mean(0), self.count + len(x)
        shift = mean - self.mean
        self.squares += (x - mean).square().sum(0) + shift.square() * self.count * len(x) / total
        self.mean += shift * len(x) / total
        self.count.copy_(total)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        deviation = (self.squares / self.count).sqrt().clamp_min(1e-6)
        brought = ((x.double() - self.mean) / deviation).clamp(-LIMIT, LIMIT).float()
        return torch.where(self.count < 2, x.float(), brought)  # no `if`, which would wait for a GPU


class Policy(nn.Module):
    """Actor, critic and normaliser, as they are trained, saved and used together."""

    def __init__(self, actor: Actor, critic: Critic, normaliser: ObservationNormaliser) -> None:
        super().__init__()
        self.actor, self.critic, self.normaliser = actor, critic, normaliser

    def __repr__(self) -> str:
        return (
            f"<Policy over {self.actor.n_features:,} features: {sum(p.numel() for p in self.parameters()):,} weights>"
        )

    @classmethod
    def build(
        cls, directions: Float[Tensor, "n d"], *, hidden: tuple[int, ...] = (256,), seed: int = 0, **options: Any
    ) -> Policy:
        """A fresh policy over a dictionary's directions; `options` are further arguments of `Actor`."""
        d = directions.shape[1]
        actor = Actor(directions, hidden=hidden, seed=seed, **options)
        return cls(actor, Critic(d, hidden=hidden, seed=seed + 1), ObservationNormaliser(d))


def mlp(d: int, hidden: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Linear and tanh layers."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [_linear(d, width, math.sqrt(2), generator), nn.Tanh()]
        d = width
    return nn.Sequential(*layers)


def _linear(d: int, width: int, gain: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(d, width)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer

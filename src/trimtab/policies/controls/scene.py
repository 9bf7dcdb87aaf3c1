"""Where an arm plays: items, how they are decoded, what the policy did with them, and what came of an arm there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trimtab.lm import Decoded, EditLog, EditRequest, InterventionSource, PromptCache, TokenBatch, capture
from trimtab.policies.controls.adapter import Adapter
from trimtab.policies.controls.answers import divergence
from trimtab.policies.episodes import Episodes
from trimtab.policies.rollout import roll_out
from trimtab.policies.setup import Setup
from trimtab.steering import Choice, DirectionSource
from trimtab.tasks import Outcome


class Played(NamedTuple):
    """What came of an arm: one outcome per item and repeat, copies side by side."""

    outcomes: list[Outcome]
    decoded: Decoded | None = None
    """None where nothing was decoded."""
    kl: Float[Tensor, " P"] | None = None
    """KL to the unsteered model of each answer, in nats, where it was measured."""

    @property
    def reward(self) -> NDArray[np.float64]:
        """Of each outcome."""
        return np.array([outcome.reward for outcome in self.outcomes], dtype=np.float64)

    @property
    def edits(self) -> EditLog:
        """Empty where nothing was decoded."""
        return EditLog.empty() if self.decoded is None else self.decoded.edits


@dataclass(frozen=True)
class Schedule:
    """At which decisions the policy edited, and how strongly."""

    relative: Float[Tensor, "P T"]
    """Signed length of each edit over ‖x‖; 0 where it left the activation alone."""

    @classmethod
    def of(cls, played: Played) -> Schedule:
        """What the log of a policy says. Rows are items."""
        decoded, log = played.decoded, played.edits
        assert decoded is not None
        first = torch.tensor([decoded.first_position(row) - 1 for row in range(len(decoded))])
        relative = torch.zeros(len(decoded), max(map(len, decoded.token_ids)))
        if len(log):
            dose = torch.where(log.feature[:, 0] >= 0, log.coefficient[:, 0] / log.x_norm.clamp_min(1e-30), 0)
            relative[log.row, log.position - first[log.row]] = dose.float()
        return cls(relative)

    @property
    def mean(self) -> float:
        """Mean length of the edits; 0 if there is none."""
        return float(self.relative[self.relative != 0].abs().mean()) if self.edits else 0.0

    @property
    def edits(self) -> int:
        return int((self.relative != 0).sum())

    @property
    def rows(self) -> int:
        """Items that were edited at all."""
        return int((self.relative != 0).any(1).sum())


class MatchedSource(DirectionSource):
    """Another source's features, at the policy's decisions and relative doses.

    Args:
        inner: picks features; its own doses are not used.
        schedule: of the policy on the same items.
        scale: multiplies all doses.
    """

    def __init__(self, inner: DirectionSource, schedule: Schedule, scale: float = 1.0) -> None:
        super().__init__(inner.table, inner.sites[0], unit="relative")
        self.inner, self.relative, self.scale = inner, schedule.relative, scale

    def start(self, start: object) -> None:
        super().start(start)  # type: ignore[arg-type]
        self.inner.start(self.begun)
        device = self.begun.device
        self.relative = self.relative.to(device)
        self._first = torch.tensor([len(prompt) - 1 for prompt in self.begun.prompts], device=device)

    def pick(self, request: EditRequest) -> Choice | None:
        choice = self.inner.pick(request)
        if choice is None:
            return None
        step = request.position - self._first[request.row]
        known = step < self.relative.shape[1]
        dose = self.relative[request.row, step.clamp_max(self.relative.shape[1] - 1)] * known * self.scale
        return Choice(torch.where(dose[:, None] != 0, choice.feature[:, :1], -1), dose[:, None])


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Items of one split under one run's config; `schedule` is what its policy did with them."""

    setup: Setup
    episodes: Episodes
    cache: PromptCache
    schedule: Schedule | None = None

    @classmethod
    def of(cls, setup: Setup, episodes: Episodes) -> Scene:
        """A scene with the setup's prompt cache, or one of its own."""
        return cls(setup=setup, episodes=episodes, cache=setup.prompt_cache or PromptCache(setup.model))

    def __len__(self) -> int:
        return len(self.episodes)

    def take(self, which: Iterable[int]) -> Scene:
        """Some of the items."""
        kept = list(which)
        schedule = None if self.schedule is None else Schedule(self.schedule.relative[kept])
        return replace(self, episodes=self.episodes.take(kept), schedule=schedule)

    def play(
        self,
        source: InterventionSource | None = None,
        *,
        adapter: Adapter | None = None,
        episodes: Episodes | None = None,
        repeats: int = 1,
        seed: int | None = None,
        temperature: float | None = None,
        kl: bool = False,
    ) -> Played:
        """Decode all items.

        Args:
            source: what steers.
            adapter: what changes the model.
            episodes: other prompts for the same items.
            repeats: rows per item.
            seed: of the draws; the config's by default.
            temperature: of tokens; the config's by default.
            kl: measure the divergence from the unsteered model.
        """
        model, config = self.setup.model, self.setup.config
        with adapter.active() if adapter else nullcontext():
            rollouts = roll_out(
                model,
                source,
                episodes or self.episodes,
                repeats=repeats,
                seed=config.seed if seed is None else seed,
                temperature=config.temperature if temperature is None else temperature,
                batch_size=config.batch_size,
                prompt_cache=self.cache if adapter is None else adapter.cache(self.cache),
            )
        measured = divergence(model, rollouts.decoded, self.cache, source, adapter) if kl else None
        return Played(rollouts.outcomes, rollouts.decoded, measured)

    def activations(self) -> Float[NDArray[np.float32], "P d"]:
        """Activations at the site at each item's last prompt token."""
        model, site = self.setup.model, self.setup.site
        parts: list[Tensor] = []
        for prompts in self.batches(list(self.episodes.prompts)):
            heads = [list(prompt[:-1]) for prompt in prompts]
            batch = TokenBatch.full(torch.tensor([[prompt[-1]] for prompt in prompts], device=model.device))
            past = torch.tensor([len(head) for head in heads], device=model.device)
            held = self.cache.load(heads, max(map(len, heads)) + 1)
            parts.append(capture(model, batch, [site], cache=held, past_lengths=past)[site][:, -1].float())
        return torch.cat(parts).cpu().numpy()

    def batches(self, rows: list) -> Iterable[list]:
        """Parts of a list, of at most 64 or the config's batch size."""
        size = min(64, self.setup.config.batch_size)
        return (rows[start : start + size] for start in range(0, len(rows), size))


Play = Callable[[Scene, float], list[Played]]
"""Plays an arm, its doses multiplied by a number; several results are repeated draws."""

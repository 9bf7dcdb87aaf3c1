"""Items of a split under a setting, an arm's answers to them, and where a reference arm edited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trimtab.control.adapter import Adapter
from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts, last_prompt_activations
from trimtab.errors import UserError
from trimtab.lm import Decoded, DecodeStart, EditLog, EditRequest, InterventionSource, LanguageModel, PromptCache
from trimtab.steering import Choice, DirectionSource, DivergenceRecorder
from trimtab.tasks import Outcome


class Answers(NamedTuple):
    """An arm's answers: one outcome per item and repeat, copies side by side."""

    outcomes: list[Outcome]
    decoded: Decoded | None = None
    """None where nothing was decoded."""
    kl: Float[Tensor, " P"] | None = None
    """KL to the unsteered model of each answer, in nats, where it was measured."""

    def __repr__(self) -> str:
        return f"<Answers: {len(self.outcomes)}, mean reward {self.reward.mean():.3f}>"

    @property
    def reward(self) -> NDArray[np.float64]:
        """Of each outcome."""
        return np.array([outcome.reward for outcome in self.outcomes], dtype=np.float64)

    @property
    def edits(self) -> EditLog:
        """Empty where nothing was decoded."""
        return EditLog.empty() if self.decoded is None else self.decoded.edits


def mean_kl(draws: Sequence[Answers]) -> float:
    """Nats per answer, over items and draws; NaN where it was not measured."""
    values = [one.kl for one in draws if one.kl is not None]
    return float(torch.cat(values).double().mean()) if values else float("nan")


@dataclass(frozen=True)
class EditSchedule:
    """At which decisions a reference arm edited, and how strongly."""

    relative: Float[Tensor, "P T"]
    """Signed length of each edit over ‖x‖; 0 where it left the activation alone."""

    @classmethod
    def of(cls, answers: Answers) -> EditSchedule:
        """What the log of a reference arm says. Rows are items.

        Raises:
            UserError: it edits prompts, or at several sites, so that no single dose per decision says what it does.
        """
        decoded, log = answers.decoded, answers.edits
        assert decoded is not None
        log = log.take((log.feature >= 0).any(1) | (log.replaced != 0))
        first = torch.tensor([decoded.first_position(row) - 1 for row in range(len(decoded))])
        relative = torch.zeros(len(decoded), max(map(len, decoded.token_ids)))
        if len(log):
            if len(log.site.unique()) > 1 or bool((log.position < first[log.row]).any()):
                raise UserError(
                    "equal dose", "the reference edits prompts, or at several sites", "compare with another reference"
                )
            one_direction = (
                log.feature.shape[1] == 1 and bool(log.target.isnan().all()) and not bool(log.replaced.any())
            )
            signed = log.coefficient[:, 0] if one_direction else log.delta_norm
            relative[log.row, log.position - first[log.row]] = (signed / log.x_norm.clamp_min(1e-30)).float()
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
    """Another source's features, at a reference arm's decisions and relative doses.

    Args:
        inner: picks one feature at a time; its own doses are not used.
        schedule: of the reference arm on the same items.
        scale: multiplies all doses.

    Raises:
        UserError: the other source does more than add directions at one site; while decoding, if it picks several
            features at once.
    """

    def __init__(self, inner: DirectionSource, schedule: EditSchedule, scale: float = 1.0) -> None:
        site, *more = inner.sites
        if more or inner.operation != "add":
            raise UserError(
                "equal dose", "only what adds a direction at one site can take another's doses", "compare it as it is"
            )
        super().__init__(inner.table, site, unit="relative")
        self.inner, self.relative, self.scale = inner, schedule.relative, scale

    def start(self, start: DecodeStart) -> None:
        assert len(start.prompts) == len(self.relative), "a schedule has a row for each item that is answered"
        super().start(start)
        self.inner.start(start)
        self.relative = self.relative.to(start.device)

    def pick(self, request: EditRequest) -> Choice | None:
        choice = self.inner.pick(request)
        if choice is None:
            return None
        if choice.feature.shape[1] > 1:
            raise UserError(
                "equal dose",
                f"the arm adds {choice.feature.shape[1]} features at once",
                "give it their sum as a vector",
            )
        step = request.position - request.prompt_length + 1
        known = step < self.relative.shape[1]
        dose = self.relative[request.row, step.clamp_max(self.relative.shape[1] - 1)] * known * self.scale
        return Choice(torch.where(dose[:, None] != 0, choice.feature, -1), dose[:, None])


@dataclass(frozen=True, kw_only=True)
class ItemSet:
    """Items of one split under a setting; `schedule` is what the reference arm did with them."""

    setting: Setting
    prompts: TaskPrompts
    cache: PromptCache
    schedule: EditSchedule | None = None

    @classmethod
    def of(cls, setting: Setting, prompts: TaskPrompts) -> ItemSet:
        """Items with the setting's prompt cache, or one of their own."""
        return cls(setting=setting, prompts=prompts, cache=setting.prompt_cache or PromptCache(setting.model))

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, which: Iterable[int]) -> ItemSet:
        """Some of the items."""
        kept = list(which)
        schedule = None if self.schedule is None else EditSchedule(self.schedule.relative[kept])
        return replace(self, prompts=self.prompts.take(kept), schedule=schedule)

    def answer(
        self,
        source: InterventionSource | None = None,
        *,
        adapter: Adapter | None = None,
        model: LanguageModel | None = None,
        prompts: TaskPrompts | None = None,
        repeats: int = 1,
        seed: int | None = None,
        temperature: float | None = None,
        kl: bool = False,
    ) -> Answers:
        """Decode and score all items.

        Args:
            source: what steers.
            adapter: what changes the model.
            model: another model of the same tokenizer, in place of the setting's; its divergence is from the setting's.
            prompts: other prompts for the same items.
            repeats: rows per item.
            seed: of the draws; the setting's by default.
            temperature: of tokens; the setting's by default.
            kl: measure the divergence from the unsteered model; that of answers to other prompts means nothing, and is
                not measured.
        """
        kl = kl and prompts is None
        setting, asked, recorder = self.setting, prompts or self.prompts, None
        cache: PromptCache | None = self.cache
        other = model if model is not setting.model else None
        assert adapter is None or other is None, "an adapter is of the setting's model"
        if adapter is not None:
            cache = adapter.cache(self.cache)
        elif other is not None:
            cache = None
        if kl and any(changed is not None for changed in (source, adapter, other)):
            to = None if other is None else setting.model
            recorder = DivergenceRecorder(other or setting.model, None if adapter else source, to=to)
        with adapter.active() if adapter else nullcontext():
            decoded = asked.decode(
                other or setting.model,
                source,
                repeats=repeats,
                seed=setting.seed if seed is None else seed,
                temperature=setting.temperature if temperature is None else temperature,
                batch_size=setting.batch_size,
                prompt_cache=cache,
                progress=setting.meter.advance,
                observe=recorder,
            )
        measured = torch.zeros(len(decoded)) if kl else None
        if recorder is not None:
            measured = recorder.measure(decoded, self.cache).sum(1)
        return Answers(asked.outcomes(decoded), decoded, measured)

    def activations(self) -> Float[np.ndarray, "P d"]:
        """Activations at the site at each item's last prompt token."""
        setting, size = self.setting, min(64, self.setting.batch_size)
        return last_prompt_activations(
            setting.model, self.prompts, setting.needed_site(), self.cache, batch_size=size
        )  # fmt: skip

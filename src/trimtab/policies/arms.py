"""The controls that stand beside a policy, each under the names of what its strength equals.

`own` is a control as it would be used by itself. `dose` edits at the policy's decisions with the policy's relative
doses, so that ‖Δ‖/‖x‖ and the number of edits agree. `kl` is the same with all doses multiplied by one number, found
on validation, at which the mean divergence from the unsteered model is the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from trimtab.control.adapter import AdapterPositions
from trimtab.control.answers import Answer, Answers, ItemSet, MatchedSource
from trimtab.control.arms.corrsteer import CorrSteerChoice, corrsteer, corrsteer_source
from trimtab.control.arms.gated import GateFit, fit_gate, gated_like_reference, gated_source
from trimtab.control.arms.letters import LetterBias, always, letter_bias, without_prior
from trimtab.control.arms.lora import learn_adapter
from trimtab.control.arms.prompting import PromptChoice, best_instruction, instructed
from trimtab.control.arms.random_allowed import AllowedRandomSource
from trimtab.control.arms.static import StaticChoice, best_static, static_source
from trimtab.control.arms.vector import learn_vector
from trimtab.control.dose_search import KlMatch, match_kl
from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.steering import DirectionSource, DirectionTable, RandomFeatureSource, StaticSource, TopActiveSource

Control = Literal[
    "random",
    "random-allowed",
    "most-active",
    "static",
    "gated",
    "corrsteer",
    "shuffled",
    "vector",
    "lora",
    "prompting",
    "letters",
]
CONTROLS: tuple[str, ...] = get_args(Control)
Match = Literal["own", "dose", "kl"]
MAIN = ("unsteered", "policy", "random", "static", "vector", "lora", "prompting")
"""Shown on companion tasks too."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to answer the items."""

    name: str
    match: Match
    answer: Answer
    """Answers items, with all doses multiplied by a number."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """How it was chosen or trained."""
    per_run: bool = True
    """Whether it depends on the policy or on the run's seed."""
    scale: float = 1.0
    kl: KlMatch | None = None

    @property
    def label(self) -> str:
        return self.name if self.match == "own" else f"{self.name} at equal {self.match}"

    def answers(self, items: ItemSet) -> list[Answers]:
        """What comes of items under the arm, at its scale."""
        return self.answer(items, self.scale)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Choices that all runs share; what is None was not asked for, or cannot be had."""

    static: StaticChoice | None = None
    gate: GateFit | None = None
    corrsteer: CorrSteerChoice | None = None
    prompt: PromptChoice | None = None
    letters: LetterBias | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """Controls that cannot be had, and why."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is spent on choosing and training controls."""

    draws: int = 3
    finalists: int = 16
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    vector_steps: int = 100
    lora_steps: int = 100
    lora_rank: int = 8
    lora_positions: AdapterPositions = "generated"
    batch: int = 16


def choose_shared(
    train: ItemSet,
    validation: ItemSet,
    controls: Sequence[str],
    candidates: dict[str, Sequence[int]],
    *,
    effort: Effort,
    instructions: Sequence[str] = (),
) -> Shared:
    """Make the choices that need training and validation items, but no policy.

    Args:
        train: training items.
        validation: validation items.
        controls: which are asked for.
        candidates: static features to try, by origin.
        effort: how many are tried.
        instructions: for prompting.
    """
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}

    def make(name: str, choose: Callable[[], Any]) -> None:
        try:
            found[name] = choose()
        except UserError as error:
            missing[name] = f"{error.what}: {error.why}"

    if {"static", "gated"} & set(controls):
        make(
            "static",
            lambda: best_static(validation, candidates, factors=effort.factors, finalists=effort.finalists),
        )
    if "gated" in controls and "static" in found:
        make("gate", lambda: fit_gate(train, validation, found["static"]))
    if "corrsteer" in controls:
        make("corrsteer", lambda: corrsteer(train))
    if "prompting" in controls:
        make("prompt", lambda: best_instruction(validation, instructions))
    if "letters" in controls:
        make("letters", lambda: letter_bias(validation))
    return Shared(**found, missing=missing)


def arms_of_run(
    setup: Setup,
    policy: Policy,
    train: ItemSet,
    validation: ItemSet,
    shared: Shared,
    controls: Sequence[str],
    effort: Effort,
    missing: dict[str, str],
) -> list[Arm]:
    """The arms of one run, the unsteered model and the policy first; `kl` arms are still to be scaled.

    Args:
        setup: the run's.
        policy: the run's.
        train, validation: its items; `validation` with the policy's schedule.
        shared: choices made for all runs.
        controls: which are asked for.
        effort: of training.
        missing: filled with controls that cannot be had, and why.
    """
    assert validation.schedule is not None
    arms = [Arm(name="unsteered", match="own", answer=lambda items, _: [items.answer(kl=True)], per_run=False)]
    arms.append(Arm(name="policy", match="own", answer=policy_answer(setup, policy)))
    edits = validation.schedule.edits > 0
    if not edits:
        missing["arms at equal dose and equal KL"] = "the policy edits none of the validation items"

    def matched(
        name: str, inner: Callable[[ItemSet, int], DirectionSource], chosen: dict[str, Any], draws: int
    ) -> None:
        def answer(items: ItemSet, scale: float) -> list[Answers]:
            assert items.schedule is not None
            sources = [MatchedSource(inner(items, draw), items.schedule, scale) for draw in range(draws)]
            return [items.answer(source, kl=True) for source in sources]

        if edits:
            about = chosen | ({"draws": draws} if draws > 1 else {})
            arms.extend(Arm(name=name, match=match, answer=answer, chosen=about) for match in ("dose", "kl"))

    seed = validation.setting.seed
    if "random" in controls:
        matched("random", lambda items, draw: _random(items, seed * 1000 + draw), {}, effort.draws)
    if "random-allowed" in controls:
        matched(
            "random-allowed",
            lambda items, draw: AllowedRandomSource(items.setting, seed * 1000 + draw),
            {"mask": validation.setting.mask},
            effort.draws,
        )
    if "most-active" in controls:
        matched(
            "most-active",
            lambda items, _: TopActiveSource(items.setting.needed_dictionary(), 1.0, items.setting.needed_site()),
            {},
            1,
        )
    if shared.static is not None and "static" in controls:
        choice = shared.static
        about = choice.to_json()
        arms.append(_own("static", lambda items: static_source(items, choice), about, per_run=False))
        matched("static", lambda items, _: static_source(items, choice), about, 1)
    if shared.static is not None and shared.gate is not None:
        arms += _gated(shared.static, shared.gate, edits)
    if shared.corrsteer is not None:
        found = shared.corrsteer
        about = found.to_json()
        arms.append(_own("corrsteer", lambda items: corrsteer_source(items, found), about, per_run=False))
        matched("corrsteer", lambda items, _: corrsteer_source(items, found), about, 1)
    if "shuffled" in controls:
        arms += _shuffled(setup, policy, effort.draws, seed, edits)
    if "vector" in controls and edits:
        dose = validation.schedule.mean
        vector, learned = learn_vector(
            train, validation, dose, steps=effort.vector_steps, batch=effort.batch, seed=seed
        )
        about = learned.to_json() | {"relative_dose": dose}
        arms.append(_own("vector", lambda items: vector.source(items), about, per_run=True))
        matched("vector", lambda items, _: vector.source(items), about, 1)
    if "lora" in controls:
        try:
            arms += _lora(train, validation, effort, seed, edits)
        except UserError as error:
            missing["lora"] = f"{error.what}: {error.why}"
    if shared.prompt is not None:
        prompt = shared.prompt
        arms.append(
            Arm(
                name="prompting",
                match="own",
                answer=lambda items, _: [items.answer(prompts=instructed(items, prompt.instruction))],
                chosen=prompt.to_json(),
                per_run=False,
            )
        )
    if shared.letters is not None:
        arms += _letters(shared.letters)
    return arms


def scale_to_kl(arm: Arm, validation: ItemSet, target: float, *, tolerance: float) -> Arm:
    """The arm with its doses scaled to a mean divergence on validation items."""

    def divergence(scale: float) -> float:
        return mean_kl(arm.answer(validation, scale))

    found = match_kl(divergence, target, tolerance=tolerance)
    return replace(arm, scale=found.scale, kl=found)


def mean_kl(played: Sequence[Answers]) -> float:
    """Nats per answer, over items and draws."""
    values = [one.kl for one in played if one.kl is not None]
    return float(torch.cat(values).double().mean()) if values else float("nan")


def policy_answer(setup: Setup, policy: Policy) -> Answer:
    """The policy, greedy."""

    def answer(items: ItemSet, scale: float) -> list[Answers]:
        source = setup.source(policy, greedy=True, dose=setup.dose * scale)
        return [items.answer(source, kl=True)]

    return answer


def _own(name: str, source: Callable[[ItemSet], StaticSource], chosen: dict[str, Any], *, per_run: bool) -> Arm:
    return Arm(
        name=name,
        match="own",
        answer=lambda items, _: [items.answer(source(items), kl=True)],
        chosen=chosen,
        per_run=per_run,
    )


def _random(items: ItemSet, seed: int) -> RandomFeatureSource:
    return RandomFeatureSource(items.setting.needed_dictionary(), 1.0, items.setting.needed_site(), seed=seed)


def _gated(choice: StaticChoice, fit: GateFit, edits: bool) -> list[Arm]:
    about = choice.to_json() | {"gate": fit.to_json()}
    arms = [_own("gated", lambda items: gated_source(items, choice, fit.gate), about, per_run=False)]

    def answer(items: ItemSet, scale: float) -> list[Answers]:
        return [items.answer(gated_like_reference(items, choice, fit.gate, scale), kl=True)]

    if edits:
        arms += [Arm(name="gated", match=match, answer=answer, chosen=about) for match in ("dose", "kl")]
    return arms


def shuffled_table(dictionary: Dictionary, seed: int) -> DirectionTable:
    """The decoder with the rows of live features exchanged at random; what is not live stays where it is.

    Lengths stay with the features' numbers, so that doses in `max_activation` stay what they were.
    """
    table = DirectionTable.of(dictionary)
    live = table.live_ids()
    order = torch.from_numpy(np.random.default_rng([seed, 31]).permutation(len(live)))
    rows = table.rows.clone()
    rows[live.to(rows.device)] = table.rows[live[order].to(rows.device)]
    return DirectionTable(rows, max_activation=table.max_activation, live=table.live)


def _shuffled(setup: Setup, policy: Policy, draws: int, seed: int, edits: bool) -> list[Arm]:
    def answer(items: ItemSet, scale: float) -> list[Answers]:
        found = []
        for draw in range(draws):
            table = shuffled_table(setup.dictionary, seed * 1000 + draw)
            source = setup.source(policy, greedy=True, directions=table, dose=setup.dose * scale)
            found.append(items.answer(source, kl=True))
        return found

    about = {"draws": draws}
    return [Arm(name="shuffled", match=match, answer=answer, chosen=about) for match in ("dose", "kl")] if edits else []


def _lora(train: ItemSet, validation: ItemSet, effort: Effort, seed: int, edits: bool) -> list[Arm]:
    control, learned = learn_adapter(
        train,
        validation,
        rank=effort.lora_rank,
        positions=effort.lora_positions,
        steps=effort.lora_steps,
        batch=effort.batch,
        seed=seed,
    )
    about = learned.to_json() | {"rank": effort.lora_rank, "positions": effort.lora_positions}

    def answer(items: ItemSet, scale: float) -> list[Answers]:
        return [control.answer(items, kl=True, scale=scale)]

    matches: tuple[Match, ...] = ("own", "kl") if edits and learned.best_step else ("own",)
    return [Arm(name="lora", match=match, answer=answer, chosen=about) for match in matches]


def _letters(bias: LetterBias) -> list[Arm]:
    return [
        Arm(
            name="letters: always the same",
            match="own",
            answer=lambda items, _: [Answers(always(items, bias.place))],
            chosen=bias.to_json(),
            per_run=False,
        ),
        Arm(
            name="letters: prior removed",
            match="own",
            answer=lambda items, _: [without_prior(items, bias)],
            chosen={"prior": bias.to_json()["prior"]},
            per_run=False,
        ),
    ]

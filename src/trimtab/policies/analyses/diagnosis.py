"""Whose fault a wrong answer is: nobody's, because no action helps; the actor's; or the critic's.

Read within items that the unsteered model gets wrong (or right), else a critic that only tells hard prompts from easy
ones would seem to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.stats import Interval

Label = Literal["policy_limited", "improvable", "critic_error", "critic_untested", "undecided"]
CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A judgement with the numbers that it rests on."""

    group: str
    """`unsteered wrong` or `unsteered right`."""
    label: Label
    """`policy_limited`: the critic knows and no action helps. `improvable`: it knows and actions would help.
    `critic_error`: it does not know what the activations tell. `critic_untested`: all answers end alike, so that there
    is nothing to know; what actions do is in the reason. `undecided`: anything else."""
    reason: str
    critic: Interval | None
    """AUC of the critic for the outcome."""
    probe: Interval | None
    """AUC of a cross-fitted probe on the same activations."""
    difference: Interval | None
    """AUC of the probe minus that of the critic."""
    helped: Interval | None
    """Share of the items that end wrong for which some action gives a larger reward."""
    helped_is_lower_bound: bool
    """Whether actions that were not tried may help more of them."""


def diagnose(
    group: str,
    *,
    critic: Interval | None,
    probe: Interval | None,
    difference: Interval | None,
    helped: Interval | None,
    lower_bound: bool = False,
) -> Diagnosis:
    """Judge one group of items.

    Args:
        group: its name.
        critic: AUC of the critic for the outcome; None where all end alike.
        probe: AUC of the probe; None where it could not be fitted.
        difference: the probe's minus the critic's.
        helped: share of the items that end wrong which some action helps; None if that was not measured.
        lower_bound: not every action was tried, so that more items may be helped.
    """
    label, reason = _judge(critic, probe, difference, helped, lower_bound)
    return Diagnosis(
        group=group, label=label, reason=reason, critic=critic, probe=probe, difference=difference, helped=helped,
        helped_is_lower_bound=lower_bound,
    )  # fmt: skip


def _judge(
    critic: Interval | None,
    probe: Interval | None,
    difference: Interval | None,
    helped: Interval | None,
    lower_bound: bool,
) -> tuple[Label, str]:
    if critic is not None and not critic.low > CHANCE:
        told = probe is not None and probe.low > CHANCE
        if told and difference is not None and difference.low > 0:
            return "critic_error", "the activations tell the outcome and the critic does not read it from them"
        if told:
            return "undecided", "the activations tell the outcome; whether the critic reads less is not settled"
        return "undecided", "neither the critic nor a probe tells the outcome from the activations"
    label, said = _effect(helped, lower_bound)
    if critic is None:
        return "critic_untested", f"all answers end alike, so the critic is not tested; {said}"
    return label, f"the critic knows which answers go wrong; {said}"


def _effect(helped: Interval | None, lower_bound: bool) -> tuple[Label, str]:
    """What actions do, and what that says of a policy whose critic knows."""
    if helped is None:
        return "undecided", "whether an action would help was not measured"
    if helped.low > CHANCE:
        return "improvable", "for most of those that end wrong some action helps"
    if helped.high < CHANCE:
        if lower_bound:
            return "undecided", "the actions tried do not help most of those that end wrong, and others were not tried"
        return "policy_limited", "no action helps most of those that end wrong"
    return "undecided", "some action helps a share of those that end wrong that is not clear of a half"

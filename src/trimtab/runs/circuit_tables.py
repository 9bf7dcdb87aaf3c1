"""Tables of circuits, of results as of their JSON: terminals, notebooks and pages show the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, cast

from trimtab.runs.figures import Head, Point
from trimtab.runs.tables import Column, Table
from trimtab.stats import Interval

NOTHING, ROLE, RANDOM, BESIDE = "nothing", "a role", "random heads", "random heads of a random circuit"
"""Kinds of sets of heads that are taken away."""
_MEASURES = {
    "accuracy": "accuracy of the plain model", "full": "plain model", "none": "every head at its mean",
    "circuit": "the circuit alone", "without": "the model without the circuit",
    "faithfulness": "circuit / model", "normalised": "between none (0) and model (1)",
}  # fmt: skip


def field(row: Any, name: str) -> Any:
    """Of an object or a mapping; an interval that lies in JSON is made one again."""
    return Column("", name).cell(row)


def heads_table(circuit: Any, through: Mapping[str, str] | None = None) -> Table:
    """Heads by role.

    Args:
        circuit: a `Circuit`.
        through: by what each role's effect is measured; what lies in JSON does not say.
    """
    columns = [
        Column("role", "role"), Column("head", head_name, whole=True), Column("effect", "effect", "+.3f"),
        Column("attention", "attention", ".2f"),
    ]  # fmt: skip
    shown = [Column("through", lambda head: through[field(head, "role")])] if through else []
    accuracy, difference = field(circuit, "accuracy"), field(circuit, "logit_difference")
    found = f"{accuracy.n} prompts that found them: accuracy {accuracy:.2f}" if accuracy else ""
    found += f", logit difference {difference:.2f}" if accuracy and difference else ""
    return Table(columns=[*columns, *shown], rows=field(circuit, "heads"), caption=f"{found}." if found else "")


def head_name(head: Any) -> str:
    """`LAYER.HEAD`."""
    return f"{field(head, 'layer')}.{field(head, 'head')}"


def drawn_heads(heads: Iterable[Any]) -> list[Head]:
    """What `plot_heads` draws."""
    effects = [(head, cast("Interval | None", field(head, "effect"))) for head in heads]
    return [
        Head(field(head, "layer"), field(head, "head"), field(head, "role"), effect.estimate if effect else None)
        for head, effect in effects
    ]


def faithfulness_table(measured: Any) -> Table:
    """Accuracy, logit differences and what follows from them.

    Args:
        measured: a `Faithfulness`.
    """
    rows = [{"measured": what, "value": field(measured, name)} for name, what in _MEASURES.items()]
    shares = sorted(cast("Sequence[float]", field(measured, "random")))
    if shares:
        low, high = (_quantile(shares, share) for share in (0.025, 0.975))
        found = Interval(estimate=fmean(shares), low=low, high=high, n=len(shares), method="quantiles")
        rows.append({"measured": f"{len(shares)} random circuits, 95% of them", "value": found})
    columns = [Column("logit difference, right name minus wrong one", "measured"), Column("value", "value", ".3f")]
    return Table(columns=columns, rows=rows, caption=f"{field(measured, 'full').n} prompts that found no head.")


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def completeness_table(found: Any) -> Table:
    """What is left of circuit and model without each role, and without the set where they are farthest apart.

    Args:
        found: a `Completeness`.
    """
    own = [one for one in field(found, "knock_outs") if field(one, "kind") != BESIDE]
    worst = max(own, key=lambda one: abs(field(one, "difference").estimate))
    columns = [
        Column("taken from both", lambda one: f"{field(one, 'taken')}{' (worst found)' if one is worst else ''}"),
        Column("circuit", "circuit", ".3f"), Column("model", "model", ".3f"),
        Column("difference", "difference", "+.3f"),
    ]  # fmt: skip
    shown = [one for one in own if field(one, "kind") != RANDOM or one is worst]
    beside = cast("Interval | None", field(found, "beside"))
    rows = [("random sets of heads", field(found, "incompleteness"))]
    rows += [("random circuits", beside)] if beside else []
    caption = "; ".join(f"{what}: {value:.2f}" for what, value in rows)
    return Table(columns=columns, rows=shown, caption=f"|circuit − model| as a share of the model's: {caption}.")


def minimality_table(found: Any) -> Table:
    """What each head adds.

    Args:
        found: a `Completeness`.
    """
    columns = [
        Column("head", "head", whole=True), Column("roles", "roles", spare=1),
        Column("circuit loses with it", "alone", "+.3f"), Column("as the last of its role", "last", "+.3f"),
    ]  # fmt: skip
    return Table(columns=columns, rows=field(found, "heads"))


def knock_out_points(found: Any) -> list[Point]:
    """What `plot_points` draws: model and circuit without the same heads.

    Args:
        found: a `Completeness`.
    """
    return [
        Point(field(one, "model").estimate, field(one, "circuit").estimate, field(one, "kind"))
        for one in field(found, "knock_outs")
    ]

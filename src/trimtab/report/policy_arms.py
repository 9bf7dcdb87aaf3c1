"""The policy beside its controls, as `trimtab policy evaluate` found them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from trimtab.report.drawing import Mark, interval_plot
from trimtab.report.page import Column, Html, details, escape, figure, join, paragraph, table, tag
from trimtab.report.policy_choices import choices
from trimtab.report.policy_files import PolicyFiles
from trimtab.report.policy_numbers import absent, cell, notes, plain_number, sentence
from trimtab.stats import Interval, interval_of

POINTS = 100.0


def evaluate_command(files: PolicyFiles) -> str:
    """The command that makes this part."""
    return f"trimtab policy evaluate {files.path}"


def evaluation_section(files: PolicyFiles) -> list[Html]:
    """Tables of arms for the task and its companions, and what must be said beside them."""
    found = files.evaluation
    if found is None:
        return [absent("The policy has not been evaluated beside its controls.", evaluate_command(files))]
    content = _task(found["result"], found)
    content += _groups(files.items, found["result"]["task"])
    for companion in found["companions"]:
        content.append(tag("h3", escape(f"Beside it: {companion['task']}, {companion['split']}")))
        if companion["why"]:
            content.append(paragraph(companion["why"]))
        content += _task(companion, found)
    content += notes("Missing", [f"{name}: {why}" for name, why in found["missing"].items()])
    content += notes("Warnings", found["warnings"])
    content += _settings(found)
    if not files.hides_text:  # how arms were chosen quotes instructions
        content += choices(found["result"]["arms"])
    return content


def above(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Labels of the arms that the policy is clearly above (the difference's 95% interval is), and of the others."""
    clear: list[str] = []
    others: list[str] = []
    for arm in result["arms"]:
        difference = interval_of(arm["difference"])
        if difference is not None:
            (clear if difference.low > 0 else others).append(arm["label"])
    return clear, others


def _task(result: dict[str, Any], found: dict[str, Any]) -> list[Html]:
    arms: list[dict[str, Any]] = result["arms"]
    compared = [arm for arm in arms if arm["difference"] is not None]
    seeds = len(found["seeds"])
    content: list[Html] = []
    if compared:
        marks = [
            Mark(arm["label"], Interval.from_dict(arm["difference"]), strong=arm["name"] == "unsteered")
            for arm in compared
        ]
        drawn = interval_plot(
            marks, "reward of the policy minus the arm's (points of 100)", "Paired differences", factor=POINTS
        )
        content.append(figure(drawn, "The policy minus each arm, paired by item, with 95% intervals over items."))
    columns = [
        Column("Arm", numeric=False),
        Column("Reward", "95%"),
        Column("Policy − arm", "paired, 95%"),
        Column("Accuracy", "95%"),
        Column("Well-formed accuracy", "95%"),
        Column("Malformed", "95%"),
        Column("KL", "nats per answer"),
        Column("‖Δ‖/‖x‖"),
        Column("Edits"),
    ]
    rows = [
        [
            escape(arm["label"]),
            cell(arm["reward"]),
            cell(arm["difference"], signed=True),
            cell(arm["accuracy"]),
            cell(arm["accuracy_well_formed"]),
            cell(arm["malformed"]),
            plain_number(arm["kl"]),
            _dose(arm),
            escape("0" if arm["dose"] is None else f"{arm['dose']['n_edits']:,}"),
        ]
        for arm in arms
    ]
    own = next((i for i, arm in enumerate(arms) if arm["name"] == "policy"), -1)
    content.append(
        table(
            columns,
            rows,
            f"{result['task']}, {result['split']}: {result['items']:,} items, {seeds} seed{'s' if seeds != 1 else ''}. "
            "95% intervals, bootstrapped over items with seeds inside. ≠: not within 1% of the policy's dose or edits.",
            emphasis=own,
        )
    )
    content.append(paragraph(gain_line(result)))
    content += notes("Doses that are not equal", [f"{a['label']}: {a['dose_note']}" for a in arms if a["dose_note"]])
    content.append(_by_seed(arms))
    return content


def gain_line(result: dict[str, Any]) -> str:
    """The gain over the unsteered model, divided into format and answers."""
    gain = result["gain"]
    said = (
        f"The policy's gain over the unsteered model is {sentence(gain['total'])}: {sentence(gain['format'])} where "
        f"the answer became well formed or malformed, {sentence(gain['answer'])} where that did not change."
    )
    if Interval.from_dict(gain["total"]).low > 0 and not Interval.from_dict(gain["answer"]).low > 0:
        said += " Without the change of format the gain is not shown."
    return said


def _dose(arm: dict[str, Any]) -> Html:
    if arm["dose"] is None:
        return plain_number(None)
    shown = plain_number(arm["dose"]["relative"])
    return join([shown, escape(" ≠")]) if arm["equal_dose"] is False else shown


def _by_seed(arms: list[dict[str, Any]]) -> Html:
    rows = [
        [
            escape(arm["label"]),
            escape(", ".join(f"{value:.3f}" for value in arm["by_seed"])),
            escape(", ".join(f"{name} {value:.3f}" for name, value in arm["metrics"].items())),
        ]
        for arm in arms
    ]
    columns = [
        Column("Arm", numeric=False),
        Column("Reward", "by run and draw", numeric=False),
        Column("Metrics of the task", numeric=False),
    ]
    return details("Every run and draw, and the task's own metrics", table(columns, rows))


def _groups(items: list[dict[str, Any]] | None, task: str) -> list[Html]:
    """Mean reward of the unsteered model and the policy by group of items."""
    if not items:
        return []
    rewards: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for item in items:
        if item["task"] == task and item["arm"] in ("unsteered", "policy"):
            rewards[item["group"] or "–", item["arm"]].append(item["reward"])
    groups = sorted({group for group, _ in rewards})
    if len(groups) < 2:
        return []
    rows: list[list[Html]] = []
    for group in groups:
        means = {arm: sum(of) / len(of) for arm in ("unsteered", "policy") if (of := rewards[group, arm])}
        change = means["policy"] - means["unsteered"] if len(means) == 2 else None
        rows.append(
            [
                escape(group),
                escape(f"{len(rewards[group, 'unsteered']):,}"),
                *(plain_number(means.get(arm), ".3f") for arm in ("unsteered", "policy")),
                plain_number(change, "+.3f"),
            ]
        )
    columns = [
        Column("Group", numeric=False),
        Column("Items"),
        Column("Unsteered"),
        Column("Policy"),
        Column("Policy − unsteered"),
    ]
    return [
        details(f"Mean reward by group ({len(groups)})", table(columns, rows, "Without intervals: groups are small."))
    ]


def _settings(found: dict[str, Any]) -> list[Html]:
    compared: list[dict[str, Any]] = found["settings_compared"]
    if len(compared) < 2:
        return []
    names = [name for name in compared[0] if name != "validation_reward"]
    columns = [Column(names[0].capitalize(), numeric=False)]
    columns += [Column(name.capitalize(), numeric=False) for name in names[1:]] + [Column("Validation reward")]
    rows = [
        [*(escape(_shown(one[name])) for name in names), plain_number(one["validation_reward"], ".3f")]
        for one in compared
    ]
    shown = table(columns, rows, "Settings compared on validation; the best is the one that is reported.")
    return [tag("h3", escape("Settings")), shown]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)  # pyright: ignore[reportUnknownArgumentType]

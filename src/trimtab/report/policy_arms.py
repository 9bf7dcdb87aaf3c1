"""The policy beside its controls, as `trimtab policy evaluate` found them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from trimtab.report.page import Figure, figure, number
from trimtab.report.run_files import RunFiles, flat, plain
from trimtab.runs.figures import ROW, Mark, plot_intervals
from trimtab.runs.tables import COUNT, INTERVAL, NUMBER, SIGNED, Column, Table
from trimtab.stats import Interval

GROUPS = {"own": "At their own strength", "dose": "At the policy's dose", "kl": "At the policy's divergence"}
"""Arms by what their strength equals."""


def answer(files: RunFiles) -> tuple[str, bool]:
    """What the page says first, and whether the policy is above all that it is compared with.

    The first sentence names the best control: what another way of control gets as well is no gain of the policy's.
    """
    found, results = files.evaluation, files.results
    if found is None:
        if "best_validation_reward" not in results:
            return "Not finished: the training goes on with the same command.", False
        best, unsteered = (number(results[f"{name}_validation_reward"]) for name in ("best", "unsteered"))
        return (
            f"Validation reward {best} at iteration {results['best_iteration']}, which was chosen there; unsteered "
            f"{unsteered}. Not evaluated on other items yet.",
            False,
        )
    result = found["result"]
    own = next(arm for arm in result["arms"] if arm["name"] == "policy")
    others = [arm for arm in result["arms"] if arm["difference"] is not None]
    controls = [arm for arm in others if arm["name"] != "unsteered"] or others
    not_above = [arm for arm in others if not _low(arm["difference"]) > 0]
    where = f"on {result['items']:,} items ({result['split']}) its reward is {number(own['reward'])}"
    gain = f"{number(result['gain']['total'], SIGNED)} over the unsteered model"
    if not controls:
        return f"{where.capitalize()}, {gain}.", _low(result["gain"]["total"]) > 0
    best = max(controls, key=lambda arm: arm["reward"]["estimate"])
    gap = Interval.from_dict(best["difference"])
    ahead = "More than" if gap.low > 0 else "Less than" if gap.high < 0 else "Not shown to gain more than"
    short = [arm["label"] for arm in not_above[:5]] + [f"{len(not_above) - 5} more"] * (len(not_above) > 5)
    said = (
        f"{ahead} its best control, {best['label']}: {where}, the control's {number(best['reward'])}, the "
        f"difference {number(gap, SIGNED)}. It is {gain}, and clearly above {len(others) - len(not_above)} of "
        f"{len(others)} arms"
    )
    said += f", not above: {', '.join(short)}." if not_above else "."
    return said, not not_above


def _low(interval: Mapping[str, Any]) -> float:
    return Interval.from_dict(dict(interval)).low


def arms(files: RunFiles, found: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """A task's figure and tables, and what must be said beside them."""
    rows = [arm | {"group": name} for match, name in GROUPS.items() for arm in result["arms"] if arm["match"] == match]
    gain = result["gain"]
    return {
        **result,
        "figure": _differences([arm for arm in rows if arm["difference"] is not None]),
        "table": _table(rows, result, len(found["seeds"])),
        "format_alone": _low(gain["total"]) > 0 and not _low(gain["answer"]) > 0,
        "unequal": [f"{arm['label']}: {arm['dose_note']}" for arm in rows if arm["dose_note"]],
        "by_seed": _by_seed(rows),
        "groups": _by_group(files, result["task"]) if result is found["result"] else None,
        # How arms were chosen quotes instructions.
        "choices": None if files.hides_text else _choices(files, rows),
        "settings": _settings(found["settings_compared"]) if result is found["result"] else None,
    }


def _differences(rows: Sequence[dict[str, Any]]) -> Figure | None:
    if not rows:
        return None
    several = len({arm["group"] for arm in rows}) > 1
    marks = [
        Mark(
            arm["label"], Interval.from_dict(arm["difference"]), arm["group"] if several else "",
            strong=arm["name"] == "unsteered",
        )
        for arm in rows
    ]  # fmt: skip
    lines = len(marks) + len({mark.group for mark in marks if mark.group})
    caption = "The policy minus each arm, paired by item, with 95% intervals over items."
    return figure(
        plot_intervals, "Paired differences", caption, height=ROW * lines + 0.7, marks=marks,
        axis="reward of the policy minus the arm's",
    )  # fmt: skip


def _table(rows: Sequence[dict[str, Any]], result: Mapping[str, Any], seeds: int) -> Table:
    return Table(
        columns=[
            Column("Arm", "label"),
            Column("Reward", "reward", INTERVAL, note="95%"),
            Column("Policy − arm", "difference", SIGNED, note="paired, 95%"),
            Column("Accuracy", "accuracy", INTERVAL, note="95%"),
            Column("Well-formed accuracy", "accuracy_well_formed", INTERVAL, note="95%"),
            Column("Malformed", "malformed", INTERVAL, note="95%"),
            Column("KL", "kl", NUMBER, note="nats per answer"),
            Column("‖Δ‖/‖x‖", _dose, NUMBER),
            Column("Edits", lambda arm: 0 if arm["dose"] is None else arm["dose"]["n_edits"], COUNT),
        ],
        rows=rows,
        caption=f"{result['task']}, {result['split']}: {result['items']:,} items, {seeds} seed{'s' * (seeds != 1)}. "
        "95% intervals, bootstrapped over items with seeds inside. ≠: not within 1% of the policy's dose or edits.",
        emphasis=next((arm for arm in rows if arm["name"] == "policy"), None),
        group=(lambda arm: arm["group"]) if len({arm["group"] for arm in rows}) > 1 else None,
    )  # fmt: skip


def _dose(arm: dict[str, Any]) -> str:
    return number(arm["dose"] and arm["dose"]["relative"], NUMBER) + " ≠" * (arm["equal_dose"] is False)


def _by_seed(rows: Sequence[dict[str, Any]]) -> Table:
    return Table(
        columns=[
            Column("Arm", "label"),
            Column("Reward", lambda arm: ", ".join(map(number, arm["by_seed"])), note="by run and draw"),
            Column(
                "Metrics of the task",
                lambda arm: ", ".join(f"{name} {number(value)}" for name, value in arm["metrics"].items()),
            ),
        ],
        rows=rows,
    )


def _by_group(files: RunFiles, task: str) -> Table | None:
    """Mean reward of the unsteered model and the policy by group of items."""
    rewards: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in files.rows("evaluation_items.parquet", ("task", "arm", "group", "reward")) or []:
        if item["task"] == task and item["arm"] in ("unsteered", "policy"):
            rewards[item["group"] or "–"][item["arm"]].append(item["reward"])
    if len(rewards) < 2:
        return None
    rows: list[dict[str, Any]] = []
    for group, of in sorted(rewards.items()):
        means = {arm: sum(found) / len(found) for arm, found in of.items()}
        change = means["policy"] - means["unsteered"] if len(means) == 2 else None
        rows.append({"group": group, "items": len(of["unsteered"]), **means, "change": change})
    columns = [
        Column("Group", "group"),
        Column("Items", "items", COUNT),
        Column("Unsteered", "unsteered", INTERVAL),
        Column("Policy", "policy", INTERVAL),
        Column("Policy − unsteered", "change", SIGNED),
    ]
    return Table(columns=columns, rows=rows, caption="Without intervals: groups are small.")


def _settings(compared: Sequence[dict[str, Any]]) -> Table | None:
    if len(compared) < 2:
        return None
    names = [name for name in compared[0] if name != "validation_reward"]
    columns = [Column(name.capitalize(), lambda one, name=name: plain(one[name])) for name in names]
    columns.append(Column("Validation reward", "validation_reward", INTERVAL))
    caption = "Settings compared on validation; the best is the one that is reported."
    return Table(columns=columns, rows=compared, caption=caption)


def _choices(files: RunFiles, rows: Sequence[dict[str, Any]]) -> Table:
    """How controls were chosen, trained and scaled: a row for each arm, or for each run where they differ."""
    found: list[dict[str, Any]] = []
    for arm in rows:
        # One choice or match stands for all runs where they share the arm.
        runs = range(max(len(arm["chosen"]), len(arm["kl_matches"])))
        lines = [_chosen(files, arm["chosen"], run) + _matched(arm["kl_matches"], run) for run in runs]
        if len(set(lines)) == 1:
            found.append({"arm": arm["label"], "runs": "all" if len(lines) > 1 else "–", "lines": lines[0]})
        else:
            found += [{"arm": arm["label"], "runs": str(run), "lines": line} for run, line in enumerate(lines, start=1)]
    columns = [Column("Arm", "arm"), Column("Run", "runs"), Column("Choice", "lines")]
    return Table(columns=columns, rows=found, caption="On training and validation items.")


def _chosen(files: RunFiles, chosen: Sequence[dict[str, Any]], run: int) -> Markup:
    named = flat(chosen[min(run, len(chosen) - 1)]) if chosen else []
    lines = [(name, files.feature_link(int(value)) if name == "feature" else value) for name, value in named]
    return Markup("").join(Markup("<p>{}: {}</p>").format(*line) for line in lines)


def _matched(matches: Sequence[dict[str, Any]], run: int) -> Markup:
    if not matches:
        return Markup("")
    match = matches[min(run, len(matches) - 1)]
    scale, reached, target = (number(match[name], ".4g") for name in ("scale", "reached", "target"))
    said = f"doses × {scale}: KL {reached} nats on validation, the policy's {target}"
    return Markup("<p>{}</p>").format(said + f"; not equal within {match['tolerance']:.0%}" * (not match["within"]))

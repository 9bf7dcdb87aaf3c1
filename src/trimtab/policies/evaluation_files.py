"""What an evaluation leaves in its directory: each item's outcome under each arm, and the trace of the policy's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from trimtab.control.answers import Answers, ItemSet
from trimtab.lm import DecodeConfig
from trimtab.policies.arms import Arm
from trimtab.policies.evaluation import AnsweredArm, PolicyEvaluation
from trimtab.policies.files import EVALUATION_FILE, ITEMS_FILE
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.runs import Run, write_json, write_table
from trimtab.steering import Trace, token_effects
from trimtab.tasks import Task

ITEM_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("split", pa.string()),
        ("arm", pa.string()),
        ("run", pa.string()),  # empty for an arm that no run changes
        ("seed", pa.int64()),
        ("draw", pa.int64()),
        ("item", pa.string()),
        ("group", pa.string()),
        ("reward", pa.float64()),
        ("correct", pa.bool_()),
        ("malformed", pa.bool_()),
        ("answer", pa.string()),  # what the task read from the text, such as a letter or "refusal"
        ("text", pa.string()),  # null for tasks with harmful prompts, unless texts are kept
        ("kl", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A trained policy with its open run and its surroundings."""

    run: Run
    setup: Setup
    policy: Policy


@dataclass
class Player:
    """One run while it is evaluated."""

    entry: Entry
    train: ItemSet
    validation: ItemSet
    played: Answers
    """The policy on validation."""
    arms: list[Arm] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return self.entry.setup.seed


def item_rows(
    task: Task, split: str, played: Sequence[AnsweredArm], players: Sequence[Player], *, keep_texts: bool = False
) -> list[dict[str, Any]]:
    """A row for each arm, run, draw and item; texts of a task that hides them only if they are to be kept."""
    hidden = task.hides_text and not keep_texts
    rows = []
    for one in played:
        for i, run in enumerate(one.runs):
            shared = len(one.runs) < len(players)
            for draw, drawn in enumerate(run):
                for j, outcome in enumerate(drawn.outcomes):
                    rows.append(
                        {
                            "task": task.name,
                            "split": split,
                            "arm": one.arm.label,
                            "run": "" if shared else str(players[i].entry.run.path),
                            "seed": None if shared else players[i].seed,
                            "draw": draw,
                            "item": outcome.item,
                            "group": outcome.group,
                            "reward": float(outcome.reward),
                            "correct": outcome.correct,
                            "malformed": outcome.malformed,
                            "answer": outcome.answer,
                            "text": None if hidden or drawn.decoded is None else drawn.decoded.texts[j],
                            "kl": None if drawn.kl is None else float(drawn.kl[j]),
                        }
                    )
    return rows


def write_evaluation(place: Path, evaluation: PolicyEvaluation, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write an evaluation and the rows of its items into a directory."""
    columns = {name: [row[name] for row in rows] for name in ITEM_SCHEMA.names}
    write_table(place / ITEMS_FILE, pa.table(columns, schema=ITEM_SCHEMA))
    write_json(place / EVALUATION_FILE, evaluation.to_json())


def write_traces(
    players: Sequence[Player],
    item_sets: list[ItemSet],
    played: Sequence[AnsweredArm],
    home: Run | None,
    *,
    keep_texts: bool = False,
) -> None:
    """The trace of each policy's own arm, in its run's directory or below the results; without tokens and texts
    of a task that hides them unless they are to be kept."""
    policy = next(one for one in played if one.arm.label == "policy")
    for player, items, (mine,) in zip(players, item_sets, policy.runs, strict=True):
        setup, config = player.entry.setup, player.entry.setup.config
        assert mine.decoded is not None
        source = setup.source(player.entry.policy, greedy=True)
        decoding = DecodeConfig(
            max_new_tokens=items.prompts.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            batch_size=config.batch_size,
        )
        trace = Trace.of(
            setup.model,
            mine.decoded,
            decoding,
            source,
            effects=token_effects(setup.model, mine.decoded, source),
            run=player.entry.run.path.name,
            rewards=mine.reward.tolist(),
        )
        if setup.task.hides_text and not keep_texts:
            trace = _without_texts(trace)
        if home is None:
            trace.write(player.entry.run)
        elif len(players) == 1:
            trace.write(home)
        else:
            path = home.path / player.entry.run.path.name
            with Run.open(path, "policy evaluate", {"run": str(player.entry.run.path)}) as run:
                run.record(hides_text=setup.task.hides_text)
                trace.write(run)
                run.finish()


def _without_texts(trace: Trace) -> Trace:
    """The trace with neither prompts nor answers: numbers, positions and edits are left."""
    tokens = trace.tokens
    for name in ("token_id", "text", "top_with", "top_without"):
        kind = tokens.schema.field(name)
        tokens = tokens.set_column(tokens.schema.get_field_index(name), kind, pa.nulls(len(tokens), kind.type))
    rows = [{**row, "prompt": [], "forced": []} for row in trace.facts["rows"]]
    return replace(trace, tokens=tokens, facts={**trace.facts, "rows": rows})

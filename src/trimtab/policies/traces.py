"""The traces of evaluated policies: each one's own arm, with the effect of every edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from trimtab.control.comparison import Compared
from trimtab.dictionaries.meanings import name_features
from trimtab.lm import DecodeConfig
from trimtab.policies.arms import PolicyArm
from trimtab.policies.trained import TrainedRun
from trimtab.runs import Run
from trimtab.steering import Trace, token_effects


def write_traces(
    entries: Sequence[TrainedRun], compared: Compared, home: Run | None, *, keep_texts: bool = False
) -> None:
    """The trace of each policy's own arm, in its run's directory or below the results; without tokens and texts
    of a task that hides them unless they are to be kept."""
    (own,) = (one for one in compared.answered if one.arm.label == PolicyArm.name)
    for entry, items, (mine,) in zip(entries, compared.items, own.runs, strict=True):
        setup, source = entry.setup, entry.arm.source()
        assert mine.decoded is not None
        decoding = DecodeConfig(
            max_new_tokens=items.prompts.max_new_tokens,
            temperature=setup.temperature,
            seed=setup.seed,
            batch_size=setup.batch_size,
        )
        trace = Trace.of(
            setup.model,
            mine.decoded,
            decoding,
            source,
            effects=token_effects(setup.model, mine.decoded, source),
            run=entry.run.path.name,
            rewards=mine.reward.tolist(),
        )
        if setup.task.hides_text and not keep_texts:
            trace = _without_texts(trace)
        name_features(home or entry.run, setup.model, setup.dictionary, mine.edits.feature.unique().tolist())
        if home is None:
            trace.write(entry.run)
        elif len(entries) == 1:
            trace.write(home)
        else:
            path = home.path / entry.run.path.name
            with Run.open(path, "policy evaluate", {"policy": entry.run.path}) as run:
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

"""Replay of a run: the logged edits are applied again and every token is re-decided given the logged past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from trimtab.dictionaries import Dictionary, load_dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, Decoded, EditLog, InterventionSource, LanguageModel, decode, load_model
from trimtab.runs import path_of_run, read_record, versions
from trimtab.runs.tables import NUMBER, Column, result_table
from trimtab.steering.composed_sources import ReplaySource
from trimtab.steering.direction_table import DirectionTable
from trimtab.steering.random_arms import pool_of, saes_of
from trimtab.steering.saved_steering import load
from trimtab.steering.trace import Trace
from trimtab.steering.traced import TracedSource

NEAR_TIE = 1e-3
"""Nats between two tokens below which rounding may decide."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """A token that was decided otherwise."""

    sample: int
    branch: int
    position: int
    logged: int
    decided: int
    gap: float
    """Log-probability of the decided token minus that of the logged one, in nats."""


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """How far a replay agrees with its run."""

    run: str
    n_rows: int
    n_tokens: int
    """Tokens re-decided."""
    n_edits: int
    """Edited (token, site) pairs."""
    mismatches: list[Mismatch]
    max_logp_difference: float
    """Largest |difference| of a token's log-probability, in nats; 0 if bit-exact."""
    edits_equal: bool
    """Whether every edit was applied again, at the same place with the same coefficient."""
    changed_versions: dict[str, str]
    """Packages whose version is not the run's, as `then → now`."""

    @property
    def matches(self) -> int:
        """Tokens decided as they were."""
        return self.n_tokens - len(self.mismatches)

    @property
    def near_ties(self) -> int:
        """Mismatches between tokens that rounding may swap."""
        return sum(abs(m.gap) < NEAR_TIE for m in self.mismatches)

    @property
    def exact(self) -> bool:
        """Same tokens, same edits, same bits of every log-probability."""
        return not self.mismatches and self.edits_equal and self.max_logp_difference == 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "matches": self.matches, "near_ties": self.near_ties, "exact": self.exact}

    def render(self) -> RenderableType:
        """For the terminal."""
        lines = [
            f"[bold]{'exact' if self.exact else 'not exact'}[/bold]: {self.matches} of {self.n_tokens} tokens in "
            f"{self.n_rows} rows re-decided as they were, {self.n_edits} edits "
            f"{'applied again' if self.edits_equal else '[bold]not all equal[/bold]'}",
            f"largest difference of a log-probability: {self.max_logp_difference:.2g} nats",
        ]
        lines += [f"{name}: {change}" for name, change in self.changed_versions.items()]
        if not self.mismatches:
            return Text.from_markup("\n".join(lines))
        names = ("sample", "branch", "position", "logged", "decided")
        columns = [*(Column(name, name, "d") for name in names), Column("gap (nats)", "gap", NUMBER)]
        table = result_table(columns, self.mismatches[:20])
        lines.append(f"{len(self.mismatches)} mismatches, {self.near_ties} of them near-ties (below {NEAR_TIE} nats):")
        return Group("\n".join(lines), table)


def replay(
    run: str | Path,
    *,
    model: LanguageModel | None = None,
    dictionary: Dictionary | DirectionTable | Sequence[Dictionary | DirectionTable] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReplayReport:
    """Replay a run that holds a trace, whatever steered it, at all sites of the trace.

    Args:
        run: its directory.
        model: its model, if loaded already.
        dictionary: its dictionary, if loaded already; or all dictionaries and tables of directions that it used. What a
            run replaced needs none, nor do axes that it recorded.
        progress: called with the number of rows whenever some have ended.

    Raises:
        UserError: there is no trace, or model or dictionary are not those of the run.
    """
    record = read_record(run)
    trace = Trace.read(run)
    if trace.tokens["token_id"].null_count:
        raise UserError(f"run {run}", "its trace holds no tokens", "evaluate the policy with --keep-texts")
    config = record["config"]
    if model is None and "model" not in config:
        raise UserError(f"run {run}", "its config does not name the model", "give the model that it used")
    if model is None:
        of_run = {"dtype": config["dtype"], "device": config["device"], "allow": config.get("allow", ())}
        model = load_model(path_of_run(record, config["model"]), **of_run)
    check_hash(run, "model", record, model.fingerprint)
    if dictionary is None and config.get("steering"):
        saved = [load(path_of_run(record, path)) for path in config["steering"]]
        dictionary = [table for one in saved for table in one.direction_tables().values()]
        if config.get("controls"):
            n_texts = len(config["prompt"]) * config["samples"]
            dictionary += pool_of(saes_of(saved), model, n_texts, config["seed"]).values()
    if dictionary is None and "sae" in config:  # hashes of model and dictionary are checked instead of their names
        sae = path_of_run(record, config["sae"])
        dictionary = load_dictionary(sae, model=model, any_model=True, device=config["device"])
    if isinstance(dictionary, Dictionary) and "dictionary" in record["hashes"]:
        check_hash(run, "dictionary", record, dictionary.fingerprint)
    if dictionary is None and "axes" in record:
        dictionary = DirectionTable.axes(record["axes"]["width"], record["axes"]["dims"])
    dictionary = [] if dictionary is None else dictionary
    dictionary = dictionary if isinstance(dictionary, Sequence) else [dictionary]
    source = TracedSource(trace, dictionary) if trace.facts["sites"] else None
    then = record["versions"]
    changed = {k: f"{then.get(k)} → {now}" for k, now in versions().items() if then.get(k) != now}
    return replay_trace(model, trace, source, run=str(run), changed_versions=changed, progress=progress)


def replay_trace(
    model: LanguageModel,
    trace: Trace,
    source: InterventionSource | None,
    *,
    run: str = "",
    changed_versions: dict[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ReplayReport:
    """Apply a trace's edits again, in the same batches, and compare every token.

    Args:
        model: the model that decoded.
        trace: what it did.
        source: the source of the edits, for its directions, sites and positions; None if there was none.
        run: name of the run, for the report.
        changed_versions: for the report.
        progress: called with the number of rows whenever some have ended.
    """
    rows, repeats = trace.facts["rows"], trace.facts["repeats"]
    logged = trace.per_row("token_id")
    log = EditLog.empty() if source is None else trace.edit_log(source)
    config = replace(trace.decoding, stop=(), stop_at_eos=False)  # rows end where the logged ones did
    found, start = list[Decoded](), 0
    for n in trace.facts.get("calls") or [len(rows)]:
        mine = slice(start, start + n)
        first, ahead = rows[mine][::repeats], rows[start].get("ahead", 1)
        again = decode(
            model,
            [row["prompt"] for row in first],
            config,
            None if source is None else ReplaySource(log, source, rows=range(start, start + n), ahead=ahead > 1),
            forced=[row["forced"] for row in first],
            repeats=repeats,
            teacher=logged[mine],
            samples=[row["sample"] for row in first],
            branches=[row["draw_branch"] for row in rows[mine]],
            lengths=[_given_length(row, tokens, config) for row, tokens in zip(rows[mine], logged[mine], strict=True)],
            progress=progress,
            ahead=ahead,
        )
        found, start = [*found, again], start + n
    again = found[0] if len(found) == 1 else Decoded.joined(found)
    mismatches = [
        Mismatch(
            sample=rows[r]["sample"],
            branch=rows[r]["branch"],
            position=again.first_position(r) + i,
            logged=token,
            decided=again.decided_ids[r][i],
            gap=again.decided_logp[r][i] - again.token_logp[r][i],
        )
        for r, tokens in enumerate(logged)
        for i, token in enumerate(tokens[: len(again.decided_ids[r])])
        if again.decided_ids[r][i] != token
    ]
    differences = [
        abs(then - now)
        for before, after in zip(trace.per_row("token_logp"), again.token_logp, strict=True)
        for then, now in zip(before, after, strict=True)
    ]
    return ReplayReport(
        run=run,
        n_rows=len(rows),
        n_tokens=sum(map(len, logged)),
        n_edits=len(log),
        mismatches=mismatches,
        max_logp_difference=max(differences, default=0.0),
        edits_equal=_same_edits(log, again.edits),
        changed_versions=changed_versions or {},
    )


def _given_length(row: dict[str, Any], tokens: Sequence[int], config: DecodeConfig) -> int:
    """How many tokens a row was given, which says how many steps were taken before what they chose was looked at."""
    return len(tokens) if row["finish"] == "length" else config.max_new_tokens


def check_hash(run: str | Path, name: str, record: dict[str, Any], found: str) -> None:
    """Raise a `UserError` if a model or dictionary is not the one that a run recorded."""
    expected = record["hashes"].get(name)
    if expected is None:
        raise UserError(
            f"run {run}", f"it does not say with which {name} it was made",
            f"record hashes={{{name!r}: {name}.fingerprint}} when you write it",
        )  # fmt: skip
    if expected != found:
        raise UserError(
            f"{name} {record['config'].get('sae' if name == 'dictionary' else name)}",
            f"its hash is {found}, that of run {run} was {expected}",
            f"give the {name} that the run used",
        )


def _same_edits(first: EditLog, second: EditLog) -> bool:
    first, second = (log.take((log.feature >= 0).any(dim=1)) for log in (first, second))
    if len(first) != len(second):
        return False
    width = max(first.feature.shape[1], second.feature.shape[1])
    first, second = (EditLog.cat([log, EditLog.empty(width)]) for log in (first, second))
    names = ("site", "row", "position", "feature", "coefficient", "target", "replaced")
    return all(torch.equal(*(log.columns[name].double().nan_to_num() for log in (first, second))) for name in names)

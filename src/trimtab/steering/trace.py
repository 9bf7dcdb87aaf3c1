"""The trace of a decode call: one row per token, one row per edit, and what is needed to decode it again.

Rows are named by sample and branch. `position` is absolute: in `tokens.parquet` the token's own, in `edits.parquet`
that of the input token whose activation was edited. The edit at position p acts on the choice of the token at p + 1, so
`kl_local`, `kl_total`, `value` and the top tokens of a token belong to the edit one position before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, Decoded, EditLog, InterventionSource, LanguageModel, Site
from trimtab.runs import Run, read_record, read_typed, write_table
from trimtab.steering.composed_sources import blocks_of
from trimtab.steering.effects import TokenEffects, TopTokens
from trimtab.steering.kept_activations import hash_from_hex, hex_of_hash, read_activations, write_activations

if TYPE_CHECKING:
    import pandas as pd

TOKENS_FILE, EDITS_FILE, REPLACEMENTS_FILE = "tokens.parquet", "edits.parquet", "replacements.safetensors"

_TOP = pa.list_(pa.struct([("token_id", pa.int32()), ("text", pa.string()), ("logp", pa.float32())]))
TOKEN_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("sample", pa.int64()),
        ("branch", pa.int64()),
        ("parent_branch", pa.int64()),
        ("position", pa.int64()),
        ("token_id", pa.int32()),
        ("text", pa.string()),
        ("token_logp", pa.float32()),
        ("entropy", pa.float32()),
        ("value", pa.float32()),
        ("reward", pa.float32()),
        ("kl_local", pa.float32()),
        ("kl_total", pa.float32()),
        ("unsteered_logp", pa.float32()),
        ("top_with", _TOP),
        ("top_without", _TOP),
    ]
)
EDIT_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("sample", pa.int64()),
        ("branch", pa.int64()),
        ("position", pa.int64()),
        ("site", pa.string()),
        ("slot", pa.int32()),
        ("operation", pa.string()),
        ("feature", pa.int64()),
        ("unit", pa.string()),
        ("requested_dose", pa.float64()),
        ("applied_dose", pa.float64()),  # coefficient along the unit direction, in model units; exact
        ("relative_dose", pa.float64()),  # applied_dose / x_norm
        ("x_norm", pa.float64()),  # ‖x‖ before the edit
        ("delta_norm", pa.float64()),  # ‖Δ‖ of all slots together
        ("action_logp", pa.float64()),
        ("n_allowed", pa.int64()),
        ("value", pa.float64()),
        ("dictionary_hash", pa.string()),
        ("target", pa.float64()),  # coordinate that was set bit for bit, along an axis
        ("replacement_hash", pa.string()),  # SHA-256 (16 hex characters) of what took the activation's place
    ]
)
_LATER_COLUMNS = ("target", "replacement_hash")
"""Traces of earlier versions have none; nothing was set or replaced then."""


@dataclass(frozen=True)
class Trace:
    """What was done at each token. Made by `of` or `read`; `write` puts it into a run."""

    tokens: pa.Table
    """`TOKEN_SCHEMA`, ordered by row and position; what was not measured is null."""
    edits: pa.Table
    """`EDIT_SCHEMA`. A token that a source looked at without editing has a row with feature −1 if it logged a value or
    log-probability, and none otherwise."""
    facts: dict[str, Any]
    """Decoding config, sites, positions, and per row its names, prompt ids, forced ids and keys of random draws."""
    replacements: Mapping[int, Tensor] = field(default_factory=dict)
    """What took activations' places, by `activation_hash`, if the source kept it."""

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        decoded: Decoded,
        config: DecodeConfig,
        source: InterventionSource | None = None,
        *,
        effects: TokenEffects | None = None,
        run: str = "",
        branches: Sequence[int] | None = None,
        parents: Sequence[int | None] | None = None,
        rewards: Sequence[float] | None = None,
        calls: Sequence[int] = (),
    ) -> Trace:
        """Trace of a decode call.

        Args:
            model: the model that decoded.
            decoded: its result.
            config: its config.
            source: its source, if it was steered.
            effects: of `token_effects`, if measured.
            run: name of the run.
            branches: per row, its branch in the trace, if draws were keyed by another number (arms that share draws).
            parents: per row, the branch that it was forked from.
            rewards: per row, credited to its last token.
            calls: how many rows were decoded together, where there were several calls.
        """
        names = list(zip(decoded.sample, decoded.branch if branches is None else branches, strict=True))
        assert len(set(names)) == len(names), "sample and branch must name each row"
        ahead = decoded.ahead or [1] * len(decoded)
        facts = {
            "decoding": asdict(config),
            "repeats": decoded.repeats,
            "sites": [] if source is None else [str(site) for site in source.sites],
            "positions": None if source is None else str(source.positions),
            "unit": None if source is None else source.unit,
            "operation": None if source is None else source.operation,
            "rows": [
                {
                    "sample": names[row][0],
                    "branch": names[row][1],
                    "draw_branch": decoded.branch[row],
                    "prompt": decoded.prompts[row],
                    "forced": decoded.forced[row],
                    "finish": decoded.finish[row],
                    **({"ahead": ahead[row]} if ahead[row] > 1 else {}),
                }
                for row in range(len(decoded))
            ],
        }
        facts |= {"calls": list(calls)} if calls else {}
        tokens = _token_table(model, decoded, names, effects, run, parents, rewards)
        return cls(tokens, _edit_table(decoded, source, names, run), facts, decoded.edits.kept)

    def write(self, run: Run) -> None:
        """Write the tables and what was kept of replaced activations, and the facts into `run.json` under `trace`."""
        write_table(run.file(TOKENS_FILE), self.tokens)
        write_table(run.file(EDITS_FILE), self.edits)
        if self.replacements:
            write_activations(run.file(REPLACEMENTS_FILE), self.replacements)
        run.record(trace=self.facts)

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Read the trace in a run directory.

        Raises:
            UserError: there is no run, it holds no trace, or a table is damaged.
        """
        facts = read_record(path).get("trace")
        if not isinstance(facts, dict):
            raise UserError(f"run {path}", "it holds no trace", "name a run that `trimtab steer` finished")
        tokens, edits = _read(Path(path) / TOKENS_FILE, TOKEN_SCHEMA), _read(Path(path) / EDITS_FILE, EDIT_SCHEMA)
        return cls(tokens, edits, facts, read_activations(Path(path) / REPLACEMENTS_FILE))

    def __repr__(self) -> str:
        rows, edits = len(self.facts["rows"]), self.edits.num_rows
        return f"<Trace: {self.tokens.num_rows:,} tokens in {rows:,} rows, {edits:,} edits>"

    def to_frame(self, table: str = "tokens") -> pd.DataFrame:
        """One of its tables, `tokens` or `edits`, as a frame of pandas."""
        if table not in ("tokens", "edits"):
            raise UserError(f"table {table!r} of a trace", "there is tokens, edits", "choose one of them")
        return (self.tokens if table == "tokens" else self.edits).to_pandas()

    @property
    def decoding(self) -> DecodeConfig:
        """The config of the decode call."""
        return read_typed(DecodeConfig, self.facts["decoding"], "the trace's decoding")

    def per_row(self, column: str) -> list[list[Any]]:
        """A column of the token table as one list per row, in order of position."""
        index = self._row_index()
        rows: list[list[Any]] = [[] for _ in index]
        columns = (self.tokens.column(name).to_pylist() for name in ("sample", "branch", column))
        for sample, branch, value in zip(*columns, strict=True):
            rows[index[sample, branch]].append(value)
        return rows

    def edit_log(self, source: InterventionSource) -> EditLog:
        """The edits as a log that indexes a source's directions.

        Raises:
            UserError: the trace holds edits by another dictionary or operation than the source's.
        """
        index = self._row_index()
        sites = [Site.parse(site) for site in self.facts["sites"]]
        if missing := [str(site) for site in sites if site not in source.sites]:
            raise UserError(
                f"edits at {', '.join(missing)}", "the given source has no such site", "give the run's source"
            )
        place = {str(site): source.sites.index(site) for site in sites}
        blocks = {(str(site), *block[2:5]): block.start for site in sites for block in blocks_of(source, site)}
        edits = self.edits.to_pylist()
        if not edits:
            return EditLog.empty()
        keys = [(index[edit["sample"], edit["branch"]], edit["position"], place[edit["site"]]) for edit in edits]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        feature = torch.full((len(number), 1 + max(edit["slot"] for edit in edits)), -1)
        coefficient, requested = torch.zeros(2, *feature.shape, dtype=torch.float64)
        target = torch.full_like(coefficient, torch.nan)
        replaced = torch.zeros(len(number), dtype=torch.long)
        for edit, key in zip(edits, keys, strict=True):
            if edit["feature"] < 0:
                continue
            block = (edit["site"], edit["unit"], edit["operation"], edit["dictionary_hash"])
            if block not in blocks:
                raise UserError(
                    f"edits of dictionary {edit['dictionary_hash']} ({edit['operation']}, {edit['unit']})",
                    f"the given source has {', '.join(sorted({b[3] for b in blocks}))}",
                    "give the source or dictionary that the run used",
                )
            at = number[key], edit["slot"]
            feature[at] = edit["feature"] + blocks[block]
            coefficient[at], requested[at] = edit["applied_dose"], edit["requested_dose"]
            target[at] = torch.nan if edit["target"] is None else edit["target"]
            if edit["replacement_hash"] is not None:
                replaced[number[key]] = hash_from_hex(edit["replacement_hash"])
        first = dict(zip(reversed(keys), reversed(edits), strict=True))

        def column(name: str, missing: float = float("nan")) -> torch.Tensor:
            found = [first[key][name] for key in number]
            return torch.tensor([missing if value is None else value for value in found], dtype=torch.float64)

        row, position, site = torch.tensor(list(number)).unbind(1)
        return EditLog(
            site=site,
            row=row,
            position=position,
            feature=feature,
            coefficient=coefficient,
            requested=requested,
            x_norm=column("x_norm"),
            delta_norm=column("delta_norm"),
            action_logp=column("action_logp"),
            n_allowed=column("n_allowed", -1).long(),
            value=column("value"),
            target=target,
            replaced=replaced,
            kept=self.replacements,
        ).sorted()

    def _row_index(self) -> dict[tuple[int, int], int]:
        return {(row["sample"], row["branch"]): i for i, row in enumerate(self.facts["rows"])}


def _token_table(
    model: LanguageModel,
    decoded: Decoded,
    names: Sequence[tuple[int, int]],
    effects: TokenEffects | None,
    run: str,
    parents: Sequence[int | None] | None,
    rewards: Sequence[float] | None,
) -> pa.Table:
    log = decoded.edits
    values = {
        (row, position): value
        for row, position, value in zip(log.row.tolist(), log.position.tolist(), log.value.tolist(), strict=True)
        if not math.isnan(value)
    }
    text: dict[int, str] = {}

    def text_of(token: int) -> str:
        if token not in text:
            text[token] = model.token_text(token)
        return text[token]

    def listed(top: TopTokens) -> list[dict[str, Any]]:
        return [{"token_id": i, "text": text_of(i), "logp": p} for i, p in zip(top.ids, top.logp, strict=True)]

    columns: dict[str, list[Any]] = {name: [] for name in TOKEN_SCHEMA.names}
    for row, tokens in enumerate(decoded.token_ids):
        n, (sample, branch) = len(tokens), names[row]
        positions = range(decoded.first_position(row), decoded.first_position(row) + n)
        found: dict[str, Iterable[Any]] = {
            "run": [run] * n,
            "sample": [sample] * n,
            "branch": [branch] * n,
            "parent_branch": [None if parents is None else parents[row]] * n,
            "position": positions,
            "token_id": tokens,
            "text": map(text_of, tokens),
            "token_logp": decoded.token_logp[row],
            "entropy": decoded.entropy[row],
            "value": [values.get((row, position - 1)) for position in positions],
            "reward": [*[None] * (n - 1), None if rewards is None else rewards[row]],
        }
        if effects is not None:
            found |= {name: getattr(effects, name)[row] for name in ("kl_local", "kl_total", "unsteered_logp")}
            found |= {name: map(listed, getattr(effects, name)[row]) for name in ("top_with", "top_without")}
        for name, column in columns.items():
            column += found.get(name, [None] * n)
    return pa.table(columns, schema=TOKEN_SCHEMA)


def _edit_table(
    decoded: Decoded, source: InterventionSource | None, names: Sequence[tuple[int, int]], run: str
) -> pa.Table:
    rows: list[dict[str, Any]] = []
    sites = () if source is None else source.sites
    blocks = [blocks_of(source, site) for site in sites if source]
    log = {name: column.tolist() for name, column in decoded.edits.columns.items()}
    for i in range(len(decoded.edits)):
        slots = [k for k, feature in enumerate(log["feature"][i]) if feature >= 0]
        noted = not math.isnan(log["action_logp"][i]) or not math.isnan(log["value"][i])
        for slot in slots or [0] * noted:
            feature = log["feature"][i][slot]
            known = blocks[log["site"][i]]
            block = next((b for b in known if b.start <= feature < b.start + b.n), known[0])
            applied, norm = log["coefficient"][i][slot], log["x_norm"][i]
            row = {
                "run": run,
                "sample": names[log["row"][i]][0],
                "branch": names[log["row"][i]][1],
                "position": log["position"][i],
                "site": str(sites[log["site"][i]]),
                "slot": slot,
                "operation": block.operation if feature >= 0 else "none",
                "feature": feature - block.start if feature >= 0 else -1,
                "unit": block.unit,
                "requested_dose": log["requested"][i][slot],
                "applied_dose": applied,
                "relative_dose": applied / norm if norm else 0.0,
                "x_norm": norm,
                "delta_norm": log["delta_norm"][i],
                "action_logp": _number(log["action_logp"][i]),
                "n_allowed": log["n_allowed"][i] if log["n_allowed"][i] >= 0 else None,
                "value": _number(log["value"][i]),
                "dictionary_hash": block.dictionary_hash,
                "target": _number(log["target"][i][slot]),
                "replacement_hash": hex_of_hash(log["replaced"][i]) if block.replaces and feature >= 0 else None,
            }
            rows.append(row)
    return pa.Table.from_pylist(rows, schema=EDIT_SCHEMA)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "name a run that `trimtab steer` finished") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(str(path), f"not readable as Parquet ({error})".splitlines()[0], "run it again") from error
    for name in (n for n in _LATER_COLUMNS if n in schema.names and n not in table.schema.names):
        table = table.append_column(schema.field(name), pa.nulls(len(table), schema.field(name).type))
    if table.schema.names != schema.names:
        raise UserError(str(path), "its columns are not those of a trace", "run it again with this version")
    return table

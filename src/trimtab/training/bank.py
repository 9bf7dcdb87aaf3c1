"""Banks: many SAEs from one harvest and one order of rows, each in a run of its own below `members/`."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.text import Text

from trimtab.distributed import Ranks
from trimtab.errors import UserError
from trimtab.runs import Run, config_dict, read_record, read_typed
from trimtab.runs.record import RECORD_NAME
from trimtab.training.bank_table import TABLE, MemberRow, render_rows, write_rows
from trimtab.training.checkpoint import checkpoint_files, discard_checkpoints
from trimtab.training.loop import Threads, Training, train_all
from trimtab.training.members import Member
from trimtab.training.result import TrainResult
from trimtab.training.rows import SiteRows
from trimtab.training.sources import SHARDS, harvest_text_of
from trimtab.training.trainer import CHECKPOINTS

MEMBERS = "members"
NOT_THE_RESULT = ("run", "checkpoint_every", "log_every", "workers", "keep_harvest")
"""Fields that may differ between openings of one run."""


@dataclass(frozen=True, kw_only=True)
class TrainedBank:
    """What became of a bank."""

    run: Path
    rows: tuple[MemberRow, ...]
    harvest_bytes: int = 0
    """Size of the activations that were kept in the run."""

    @property
    def problem(self) -> UserError | None:
        """Which members failed, if any did."""
        failed = [row for row in self.rows if row.status == "failed"]
        if not failed:
            return None
        done = len(failed) < len(self.rows)
        names = ", ".join(row.name for row in failed[:3]) + (", …" if len(failed) > 3 else "")
        return UserError(
            f"{len(failed)} of {len(self.rows)} members failed ({names})",
            f"the reasons are in {self.run / TABLE}" + "; the other members are done" * done,
            f"the same command again tries {'only these' if done else 'them all'}",
        )

    def render(self) -> Group:
        """One line for each member, and what failed."""
        done = sum(row.status == "done" for row in self.rows)
        end = Text(f"{done} of {len(self.rows)} members done; table in {self.run / TABLE}")
        end.append("\n".join(["", *harvest_text_of(self.run / SHARDS, self.harvest_bytes)]))
        return Group(*render_rows(self.rows), end)

    def to_json(self) -> dict[str, Any]:
        """The rows as plain values."""
        members = [row.flat() for row in self.rows]
        return {"run": str(self.run), "members": members, "harvest_bytes": self.harvest_bytes}


class Place(NamedTuple):
    """Where a bank is trained."""

    directory: Path
    """Of the bank."""
    device: str = "cpu"
    workers: int | None = None
    """Members side by side on this rank; by default as many as there are threads (one on an accelerator)."""


def unfinished(members: Sequence[Member], place: Place) -> list[Member]:
    """The members that can be trained and have not been. Raises a `UserError` that names the first setting that differs
    from those that a member was trained with."""
    left: list[Member] = []
    for member in members:
        if member.config is None:
            continue
        directory = place.directory / MEMBERS / member.name
        if (directory / RECORD_NAME).exists() and read_record(directory)["status"] == "done":
            _open_member(member, place).close()
        else:
            left.append(member)
    return left


def train_members(
    members: Sequence[Member], left: Sequence[Member], rows: Mapping[str, SiteRows], place: Place, ranks: Ranks
) -> list[MemberRow] | None:
    """Train members of a bank, spread over the ranks; one that fails does not stop the others.

    A member's SAE does not depend on which rank trains it, nor on how many run side by side, as long as all ranks
    together have equally many threads.

    Args:
        members: of the bank.
        left: those that are not done, the same on all ranks.
        rows: of their sites.
        place: where to write and compute.
        ranks: the processes that share the work.

    Returns:
        What became of every member, in order; None on all ranks but the first.

    Raises:
        UserError: rows that cannot be read, another process at work here, or a rank that is gone.
    """
    mine = _deal(left, rows, ranks.size)[ranks.rank]
    threads = _threads(len(members), len(mine), place, ranks)
    ended: dict[str, MemberRow] = {}
    todo: dict[Training, Member] = {}

    def on_end(training: Training) -> None:
        member = todo[training]
        row = ended[member.name] = _close(member, training)
        print(row.line, file=sys.stderr, flush=True)

    with ExitStack() as stack:
        for member in mine:
            assert member.config is not None
            delay = members.index(member) * member.config.checkpoint_every // len(members)
            run = _open_member(member, place)
            stack.callback(run.close)
            todo[Training(member.config, rows[member.site], run, delay)] = member
        if todo:
            train_all([*todo], device=ranks.device(place.device), threads=threads, on_end=on_end)
    gathered = ranks.gather(ended)
    if gathered is None:
        return None
    found = {name: row for part in gathered for name, row in part.items()}
    table = [found.get(member.name) or _known_row(member, place.directory) for member in members]
    write_rows(place.directory / TABLE, table)
    return table


def open_run(path: Path | str, config: Any, seed: int | None, device: str, inputs: Any = None) -> Run:
    """The run of a training, or of a bank, which has no seed. Raises a `UserError` as `Run.open` does."""
    seeds = None if seed is None else [seed]
    return Run.open(path, "train", config, seeds=seeds, device=device, ignore_fields=NOT_THE_RESULT, inputs=inputs)


def _open_member(member: Member, place: Place) -> Run:
    assert member.config is not None
    config = {"site": member.site, **config_dict(member.config)}
    return open_run(place.directory / MEMBERS / member.name, config, member.config.seed, place.device)


def _close(member: Member, training: Training) -> MemberRow:
    """Record how a member has ended, in its run and for the table."""
    run, error = training.run, training.error
    if error is None:
        assert training.result is not None
        run.finish(training.result)
        discard_checkpoints(run.file(CHECKPOINTS))
        run.close()
        return MemberRow.done(member, training.result)
    files = checkpoint_files(run.file(CHECKPOINTS))
    row = MemberRow.failed(member, error, str(run.path), str(files[-1]) if files else "")
    run.fail(row.error)
    run.close()
    if not isinstance(error, UserError):
        traceback.print_exception(error, file=sys.stderr)
    return row


def _known_row(member: Member, directory: Path) -> MemberRow:
    """The row of a member that was not trained now: it was done before, or could not begin."""
    if member.error is not None:
        return MemberRow.failed(member, member.error)
    run = directory / MEMBERS / member.name
    return MemberRow.done(member, read_typed(TrainResult, read_record(run)["results"], f"run {run}"))


def _deal(members: Sequence[Member], rows: Mapping[str, SiteRows], ranks: int) -> list[list[Member]]:
    """The members of each rank: the costliest first, each to the rank with the least to do."""

    def cost(member: Member) -> float:
        assert member.config is not None
        source = rows[member.site].source
        return member.config.steps(source.rows_total) * member.config.batch_size * member.config.n_features * source.d

    dealt: list[list[Member]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for member in sorted(members, key=cost, reverse=True):
        least = load.index(min(load))
        dealt[least].append(member)
        load[least] += cost(member)
    return dealt


def _threads(members: int, mine: int, place: Place, ranks: Ranks) -> Threads:
    """As many members side by side as there are threads; where threads are left over, several for each.

    The threads of one member follow from the whole bank and all ranks, so that results do not change when a bank
    resumes with fewer members left.
    """
    here = torch.get_num_threads()
    each = max(1, min(here, math.floor(here * ranks.size / members)))
    on_cpu = torch.device(place.device).type == "cpu"
    if not on_cpu and (place.workers or 1) > 1:
        why = "on a card trainings take turns, since the precision of its products is set for all of them at once"
        raise UserError(f"--workers {place.workers}", why, "leave it out, or train on several cards by torchrun")
    usual = here // each if on_cpu else 1
    return Threads(max(1, min(place.workers or usual, mine)), each)

"""Banks: members equal single trainings bit for bit, fail alone, resume, and may be extended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from planted_rows import MemorySource, Planted
from safetensors.torch import load_file
from torch import Tensor

from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.distributed import Ranks
from trimtab.errors import UserError
from trimtab.runs import Run, read_metrics, read_record
from trimtab.training import SiteRows, Threads, TrainConfig, TrainedBank, Training, expand, train, train_all
from trimtab.training.bank import MEMBERS, Place, train_members, unfinished
from trimtab.training.bank_table import TABLE, MemberRow
from trimtab.training.checkpoint import checkpoint_files
from trimtab.training.members import Member

SMALL = {
    "n_features": (24,),
    "rows": (40 * 64,),
    "batch_size": (64,),
    "heldout_rows": (200,),
    "sample_rows": (200,),
    "dead_after": (300,),
    "checkpoint_every": (10,),
    "log_every": (8,),
}


@pytest.fixture(scope="module")
def sites() -> dict[str, SiteRows]:
    found = {}
    for number, site in enumerate(("resid_post.0", "resid_post.1")):
        planted = Planted(12, 8, 2.0, seed=number)
        found[site] = SiteRows(MemorySource(planted.rows(1_500)), MemorySource(planted.rows(200), 1))
    return found


def members(site: Sequence[str] = ("resid_post.0",), **settings: Sequence[object]) -> list[Member]:
    return expand({**SMALL, "site": site, **settings})


def run_bank(
    bank: list[Member], sites: dict[str, SiteRows], directory: Path, workers: int | None = None
) -> list[MemberRow]:
    place = Place(directory, workers=workers)
    rows = train_members(bank, unfinished(bank, place), sites, place, Ranks())
    assert rows is not None
    return rows


def weights(directory: Path, name: str) -> dict[str, Tensor]:
    return load_file(directory / MEMBERS / name / "sae" / "sae_weights.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_member_equals_a_single_training_bit_for_bit(
    sites: dict[str, SiteRows], tmp_path: Path, workers: int
) -> None:
    bank = members(site=tuple(sites), arch=tuple(TRAINABLE), l0=(2,))
    assert len(bank) == 2 * len(TRAINABLE)
    rows = run_bank(bank, sites, tmp_path / "bank", workers)
    assert [(row.name, row.status) for row in rows] == [(member.name, "done") for member in bank]
    for member in bank[:: len(bank) // 4]:
        assert member.config is not None
        with Run.open(tmp_path / member.name, "train", {}) as run:
            single = sites[member.site]
            result = train(member.config, single.source, run, heldout=single.heldout)
        assert equal(load_file(result.sae / "sae_weights.safetensors"), weights(tmp_path / "bank", member.name))
        row = rows[bank.index(member)]
        assert row.result is not None
        assert (row.result.l0, row.result.explained_variance) == (result.l0, result.explained_variance)
        logged, expected = (read_metrics(path) for path in (tmp_path / "bank" / MEMBERS / member.name, run.path))
        for line in (*logged, *expected):
            line.pop("rows_per_second")
        assert logged == expected


def test_members_of_several_batch_sizes_see_their_own_streams(sites: dict[str, SiteRows], tmp_path: Path) -> None:
    bank = members(l0=(2,), batch_size=(64, 32))
    rows = run_bank(bank, sites, tmp_path / "bank", workers=3)
    assert [row.flat()["steps"] for row in rows] == [40, 80]
    alone = run_bank(bank[1:], sites, tmp_path / "alone")
    assert equal(weights(tmp_path / "bank", bank[1].name), weights(tmp_path / "alone", bank[1].name))
    one, other = alone[0].flat(), rows[1].flat()
    assert (one["l0"], one["explained_variance"]) == (other["l0"], other["explained_variance"])
    assert not checkpoint_files(tmp_path / "bank" / MEMBERS / bank[0].name / "checkpoints"), "kept beyond the end"


def test_the_table_on_disk_tells_every_member(sites: dict[str, SiteRows], tmp_path: Path) -> None:
    bank = members(l0=(2,), seed=(0, 1)) + members(k=(40,))
    run_bank(bank, sites, tmp_path)
    rows = pq.read_table(tmp_path / TABLE).to_pylist()
    assert [row["status"] for row in rows] == ["done", "done", "failed"]
    assert [row["seed"] for row in rows] == [0, 1, 0]
    assert rows[0]["l0_target"] == 2
    assert rows[0]["path"] == str(tmp_path / MEMBERS / "resid_post.0-topk-n24-l0_2-seed0" / "sae")
    assert json.loads(rows[1]["config"])["rows"] == 40 * 64
    assert rows[2]["error"] == "k 40: it must be from 1 to n_features − 1 = 23; choose a smaller k"
    assert rows[2]["path"] == ""


class _Poisoned(MemorySource):
    """Rows whose batch of one step holds NaN."""

    def __init__(self, rows: Tensor, step: int) -> None:
        super().__init__(rows)
        self.step = step

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Tensor]:
        for step, batch in enumerate(super().batches(batch_size, start_step), start_step):
            if step == self.step:
                batch[3, 2] = torch.nan
            yield batch


def test_a_member_that_diverges_stops_alone_and_keeps_no_state_that_blew_up(
    sites: dict[str, SiteRows], tmp_path: Path
) -> None:
    bank = members(l0=(2,), lr=(3e-3, 1e30), checkpoint_every=(1,), scaling=("none",), warmup_share=(0.0,))
    bank += members(l0=(3,))
    good, bad, other = run_bank(bank, sites, tmp_path, workers=2)
    assert (good.status, bad.status, other.status) == ("done", "failed", "done")
    assert "training diverged; there is no good checkpoint; lower --lr" in bad.error
    assert not checkpoint_files(tmp_path / MEMBERS / bad.name / "checkpoints")
    assert bad.checkpoint == ""
    record = read_record(tmp_path / MEMBERS / bad.name)
    assert (record["status"], record["reason"]) == ("failed", bad.error)
    bank_result = TrainedBank(run=tmp_path, rows=(good, bad, other))
    problem = bank_result.problem
    assert problem is not None
    assert problem.line == (
        f"1 of 3 members failed ({bad.name}): the reasons are in {tmp_path / TABLE}; the other members are done; "
        "the same command again tries only these"
    )
    problem = TrainedBank(run=tmp_path, rows=(bad, bad)).problem
    assert problem is not None
    assert problem.line == (
        f"2 of 2 members failed ({bad.name}, {bad.name}): the reasons are in {tmp_path / TABLE}; "
        "the same command again tries them all"
    )


def test_bad_rows_stop_the_members_of_their_site_only(sites: dict[str, SiteRows], tmp_path: Path) -> None:
    poisoned = {**sites, "resid_post.1": SiteRows(_Poisoned(sites["resid_post.1"].source.rows, 25))}
    bank = members(site=tuple(sites), l0=(2, 3))
    rows = run_bank(bank, poisoned, tmp_path, workers=4)
    assert [row.status for row in rows] == ["done", "done", "failed", "failed"]
    for row in rows:
        if row.status == "failed":
            assert row.site == "resid_post.1"
            assert "1 of 64 rows in the batch of step 25: they hold NaN or infinity" in row.error
            assert row.checkpoint.endswith(("step-000000025.safetensors", "step-000000017.safetensors"))  # staggered


def test_a_bug_in_one_member_does_not_stop_the_others(
    sites: dict[str, SiteRows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trimtab.training.trainer import Trainer

    step = Trainer._step

    def failing(self: Trainer, batch: object) -> object:
        if self.config.seed == 1 and self.step == 5:
            raise RuntimeError("out of luck")
        return step(self, batch)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Trainer, "_step", failing)
    rows = run_bank(members(l0=(2,), seed=(0, 1, 2)), sites, tmp_path)
    assert [row.status for row in rows] == ["done", "failed", "done"]
    assert rows[1].error == "RuntimeError: out of luck"
    assert "out of luck" in capsys.readouterr().err
    monkeypatch.undo()
    again = run_bank(members(l0=(2,), seed=(0, 1, 2)), sites, tmp_path)
    assert [row.status for row in again] == ["done"] * 3
    assert again[0] == rows[0], "a member that was done was trained again"


def test_members_resume_from_checkpoints_at_different_steps(
    sites: dict[str, SiteRows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = members(arch=("topk", "gated"), l0=(2, 3), checkpoint_every=(9,))
    run_bank(bank, sites, tmp_path / "whole")
    from trimtab.training.loop import Stream

    read = Stream.read

    def cut(self: Stream) -> bool:
        if self._first > 25:
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(Stream, "read", cut)
    with pytest.raises(KeyboardInterrupt):
        run_bank(bank, sites, tmp_path / "cut", workers=2)
    monkeypatch.undo()
    steps = {checkpoint_files(tmp_path / "cut" / MEMBERS / member.name / "checkpoints")[-1].name for member in bank}
    assert len(steps) > 1, "checkpoints were not staggered"
    run_bank(bank, sites, tmp_path / "cut")
    for member in bank:
        assert equal(weights(tmp_path / "whole", member.name), weights(tmp_path / "cut", member.name)), member.name


def test_a_bank_may_grow_but_not_change(sites: dict[str, SiteRows], tmp_path: Path) -> None:
    first = run_bank(members(l0=(2,)), sites, tmp_path)
    grown = run_bank(members(l0=(2, 3)), sites, tmp_path)
    assert grown[0] == first[0]
    assert grown[1].status == "done"
    with pytest.raises(UserError, match=r"resid_post.0-topk-n24-l0_2-seed0: rows was 2560 and is now 640"):
        run_bank(members(l0=(2,), rows=(640,)), sites, tmp_path)


def test_members_with_fewer_rows_end_earlier(sites: dict[str, SiteRows], tmp_path: Path) -> None:
    rows = run_bank(members(l0=(2,), rows=(640, 2560), seed=(0, 1)), sites, tmp_path)
    assert [row.flat()["steps"] for row in rows] == [10, 10, 40, 40]


def test_rows_are_read_once_for_all_members_and_a_failing_source_stops_the_bank(tmp_path: Path) -> None:
    class Counting(MemorySource):
        read = 0

        def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Tensor]:
            for batch in super().batches(batch_size, start_step):
                Counting.read += 1
                if Counting.read > 60:
                    raise UserError("shard x", "it is truncated", "harvest again")
                yield batch

    rows = {"resid_post.0": SiteRows(Counting(Planted(12, 8, 2.0).rows(1_500)))}
    run_bank(members(l0=(2, 3), seed=(0, 1)), rows, tmp_path / "whole", workers=2)
    assert Counting.read == 40
    with pytest.raises(UserError, match="shard x: it is truncated"):
        run_bank(members(l0=(2, 3)), rows, tmp_path / "cut", workers=2)
    Counting.read = -1_000
    bank = run_bank(members(l0=(2, 3)), rows, tmp_path / "cut")
    assert equal(weights(tmp_path / "whole", bank[0].name), weights(tmp_path / "cut", bank[0].name))


def test_a_reached_and_a_missed_target_are_told(sites: dict[str, SiteRows], tmp_path: Path) -> None:
    config = TrainConfig(arch="relu", l0=20, rows=64, batch_size=64, n_features=24, lr=1e-6, heldout_rows=200)
    reached = []
    for asked, target in ((config, 20.0), (TrainConfig(k=3, n_features=24, rows=2560, batch_size=64), 3.0)):
        with Run.open(tmp_path / f"{target}", "train", {}) as run:
            single = sites["resid_post.0"]
            result = train(asked, single.source, run, heldout=single.heldout)
        assert result.l0_target == target
        assert result.l0_reached_target == (abs(result.l0 - target) <= 0.1 * target)
        reached.append(result.l0_reached_target)
        if not result.l0_reached_target:
            assert result.advice.startswith(f"L0 {result.l0:.2f} was reached, not the {target:g} asked for; ")
    assert reached == [False, True]
    assert not result.advice


def test_trainings_leave_torchs_threads_as_they_were(sites: dict[str, SiteRows], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with Run.open(tmp_path / "run", "train", {}) as run:
        config = TrainConfig(k=2, n_features=16, rows=640, batch_size=64, heldout_rows=64)
        train_all([Training(config, sites["resid_post.0"], run)], threads=Threads(2, before + 1))
    assert torch.get_num_threads() == before

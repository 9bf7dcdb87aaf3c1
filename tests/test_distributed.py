"""Two real processes with gloo, joined through the environment as torchrun sets it."""

from __future__ import annotations

import signal
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from trimtab.distributed import Ranks
from trimtab.errors import UserError

PRELUDE = """
import os, pathlib, sys, time
import torch
from trimtab.distributed import Ranks, RankLostError
"""

Start = Callable[..., list[subprocess.Popen[str]]]


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def end(processes: list[subprocess.Popen[str]], seconds: float = 180) -> list[Ended]:
    results = []
    for process in processes:
        out, err = process.communicate(timeout=seconds)
        results.append(Ended(process.returncode, out.strip(), err))
    return results


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Ranks.from_environment() as ranks:
        assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
        assert (ranks.gather("a"), ranks.broadcast(3), ranks.device("cuda")) == (["a"], 3, "cuda")
        alone = torch.ones(2)
        ranks.add_up([alone])
        assert torch.equal(alone, torch.ones(2))
        ranks.barrier()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE 'two': it must be a number; start the command with torchrun"),
        ({"WORLD_SIZE": "2"}, r"RANK '': it must be a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"RANK 2: it must be below WORLD_SIZE, 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""}, r"rank 0 of 2: the ranks could not join \(.*MASTER_ADDR"),
    ],
)
def test_a_wrong_environment(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        if value:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        Ranks.from_environment()


def test_objects_and_tensors_go_from_rank_to_rank_and_a_process_can_join_again(start_ranks: Start) -> None:
    script = """
    for turn in range(2):
        with Ranks.from_environment() as ranks:
            assert ranks.device("cuda") == f"cuda:{ranks.rank}" and ranks.device("cpu") == "cpu"
            got = ranks.gather({"rank": ranks.rank, "turn": turn})
            assert got == ([{"rank": r, "turn": turn} for r in range(3)] if ranks.is_first else None)
            assert ranks.broadcast([turn, 5] if ranks.is_first else None) == [turn, 5]
            x = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3) * (ranks.rank + 1)
            if ranks.is_first:
                into = [torch.empty(2, 3, dtype=torch.bfloat16) for _ in (1, 2)]
                for transfer in [ranks.receive(t, r) for t, r in zip(into, (1, 2))]:
                    transfer.wait()
                assert torch.equal(into[0], 2 * x) and torch.equal(into[1], 3 * x)
            else:
                ranks.send(x, 0).wait()
            parts = [torch.full((2, 3), float(ranks.rank)), torch.ones(3, 2).T * ranks.rank]
            ranks.add_up(parts)
            assert all(torch.equal(part, torch.full((2, 3), 3.0)) for part in parts)
            ranks.barrier()
    print("ranks", ranks.size)
    """
    assert [(r.status, r.out) for r in end(start_ranks(PRELUDE + textwrap.dedent(script), 3))] == [(0, "ranks 3")] * 3


WAITS = {
    "object": "ranks.gather(1) if ranks.is_first else ranks.broadcast()",
    "tensor": "x = torch.ones(4000000); (ranks.receive(x, 1) if ranks.is_first else ranks.send(x, 0)).wait()",
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_reaches_whoever_waits(failing: int, wait: str, start_ranks: Start) -> None:
    script = f"""
    try:
        with Ranks.from_environment() as ranks:
            if ranks.rank == {failing}:
                time.sleep(0.5)
                raise KeyError("no such thing")
            {wait}
    except RankLostError as error:
        print(error.line)
    except KeyError:
        print("mine")
    """
    ended = end(start_ranks(PRELUDE + textwrap.dedent(script)))
    assert [rank.status for rank in ended] == [0, 0]
    assert ended[failing].out == "mine"
    lost = f"rank {failing}: it stopped: KeyError: 'no such thing'; start the same command again: it goes on from here"
    assert ended[1 - failing].out == lost


@pytest.mark.slow
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_noticed(killed: int, wait: str, start_ranks: Start) -> None:
    script = f"""
    try:
        with Ranks.from_environment() as ranks:
            print("joined", flush=True)
            if ranks.rank == {killed}:
                time.sleep(1000)
            {wait}
    except RankLostError as error:
        print(error.line)
    """
    processes = start_ranks(PRELUDE + textwrap.dedent(script))
    out = processes[killed].stdout
    assert out is not None
    assert out.readline() == "joined\n"
    time.sleep(0.3)
    processes[killed].send_signal(signal.SIGKILL)
    survivor = end([processes[1 - killed]])[0]
    assert survivor.status == 0
    assert f"rank {killed}: it " in survivor.out
    assert "start the same command again" in survivor.out


DEATH_OF_A_THIRD = """
noticed = pathlib.Path({noticed!r})
try:
    with Ranks.from_environment() as ranks:
        ranks.barrier()
        if ranks.rank == 2:
            os.kill(os.getpid(), 9)
        deadline = time.monotonic() + {seconds}
        while ranks.is_first and not noticed.exists() and time.monotonic() < deadline:
            time.sleep(0.05)  # at work
        if ranks.is_first:
            print("noticed" if noticed.exists() else "not noticed")
        ranks.broadcast(1)
except RankLostError as error:
    noticed.touch()
    print(error.line)
"""


def check_death_of_a_third(start_ranks: Start, noticed: Path, seconds: float, mutation: str = "") -> None:
    """Rank 1 waits for rank 0, which works on, and learns at once that rank 2 has died; all name rank 2."""
    script = DEATH_OF_A_THIRD.format(noticed=str(noticed), seconds=seconds)
    first, second, _ = end(start_ranks(PRELUDE + mutation + script, 3))
    assert first.out.startswith("noticed\nrank 2: it is gone (")
    assert second.out.startswith("rank 2: it is gone (")


@pytest.mark.slow
def test_whoever_waits_learns_of_a_death_even_of_a_third(start_ranks: Start, tmp_path: Path) -> None:
    check_death_of_a_third(start_ranks, tmp_path / "noticed", 100)


MUTATIONS = {
    "an exchange does not begin with all": "Ranks.barrier = lambda ranks: None\n",
    "the next rank is blamed": "Ranks._lost = lambda ranks, _: RankLostError((ranks.rank + 2) % 3, 'it is gone (')\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_mutation(mutation: str, start_ranks: Start, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_death_of_a_third(start_ranks, tmp_path / "noticed", 3, mutation)


def test_connections_are_kept_alive(start_ranks: Start) -> None:
    """Gloo's and the store's, so that a machine that vanishes is noticed."""
    script = """
    import socket
    with Ranks.from_environment() as ranks:
        ends = []
        for name in os.listdir("/proc/self/fd"):
            try:
                with socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM) as end:
                    end.getpeername(), end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                    ends.append(end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            except OSError:
                pass
        print(len(ends) >= 2, all(ends))
    """
    assert [ended.out for ended in end(start_ranks(PRELUDE + textwrap.dedent(script)))] == ["True True"] * 2


@pytest.mark.slow
def test_a_rank_may_take_its_time(start_ranks: Start) -> None:
    script = """
    with Ranks.from_environment() as ranks:
        if not ranks.is_first:
            time.sleep(5)
        print(ranks.gather(ranks.rank))
    """
    assert [r.out for r in end(start_ranks(PRELUDE + textwrap.dedent(script)))] == ["[0, 1]", "None"]

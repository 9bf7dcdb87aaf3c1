"""Several processes at one job, as torchrun starts them: who is who, what they tell each other, how they fail together.

Small objects and waits go through torchrun's key-value store, beside a pulse of every rank: a rank may wait for hours
for another's work and still learns within a minute that this one is gone. Tensors go through gloo, from CPU memory to
CPU memory, whatever device the model is on.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from trimtab.errors import UserError

PULSE = 1.0
"""Seconds between two signs of life."""
LOST_AFTER = 60.0
"""Seconds without one, after which a rank counts as lost."""
JOIN_TIMEOUT = timedelta(minutes=5)
"""How long the ranks wait for each other at the start."""
TRANSFER_TIMEOUT = timedelta(minutes=30)
"""How long a tensor may take to come from a rank that lives; from one that has died it fails at once."""
_LARGEST = 4 * 2**20  # the store refuses values of 8 MiB


class RankLostError(UserError):
    """Another rank failed, died or cannot be reached."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(f"rank {rank}", why, "start the same command again: it goes on from here")


class Transfer(Protocol):
    """A tensor on its way."""

    def wait(self) -> None:
        """Wait until it has arrived. Raises `RankLostError`."""
        ...


class Ranks:
    """The processes of one job. Made by `Ranks.from_environment`; `Ranks()` is a process alone.

    Use it as a context manager: on an error the other ranks are told, on success all leave together. Every method but
    `fail` and the transfers must be called by all ranks, in the same order.

    Attributes:
        rank: number of this process, 0 to `size - 1`.
        size: number of processes.
        local_rank: number of this process on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, link: _Link | None = None) -> None:
        assert link is not None or size == 1
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._link = link
        self._calls = 0

    @classmethod
    def from_environment(cls, *, lost_after: float = LOST_AFTER) -> Ranks:
        """Join the other processes that torchrun started; without torchrun, or with one process, be alone.

        Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

        Args:
            lost_after: seconds without a sign of life after which a rank counts as lost.

        Raises:
            UserError: the variables make no sense, or the other ranks do not come.
        """
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return cls()
        rank, local_rank = _number("RANK", None), _number("LOCAL_RANK", 0)
        if not 0 <= rank < size:
            raise UserError(f"RANK {rank}", f"it must be below WORLD_SIZE, {size}", "start the command with torchrun")
        return cls(rank, size, local_rank, _Link(rank, size, lost_after))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and speaks to the user."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this rank: `cuda` is one of its own for every process of a machine."""
        return f"{name}:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    def barrier(self) -> None:
        """Wait until every rank is here. Raises `RankLostError`."""
        self.broadcast(self.gather(None))

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, by rank, on rank 0; None on the others, which do not wait.

        Args:
            value: anything that can be pickled, up to a few MB.

        Raises:
            RankLostError: a rank is gone before it has given its value.
        """
        if self._link is None:
            return [value]
        name = self._next("gather")
        if not self.is_first:
            self._link.put(f"{name}/{self.rank}", value)
            return None
        return [value, *(self._link.take(f"{name}/{rank}", forget=True) for rank in range(1, self.size))]

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank; what the others give is not looked at.

        Raises:
            RankLostError: rank 0 is gone before it has given its value.
        """
        if self._link is None:
            return value
        name = self._next("broadcast")
        if self.is_first:
            self._link.put(name, value)
            return value
        return self._link.take(name)

    def send(self, tensor: Tensor, to: int) -> Transfer:
        """Begin to send a contiguous CPU tensor, which must not change before the transfer's `wait`."""
        assert self._link is not None
        return self._link.send(tensor, to)

    def receive(self, tensor: Tensor, source: int) -> Transfer:
        """Begin to receive what `source` sends into a contiguous CPU tensor of the same bytes."""
        assert self._link is not None
        return self._link.receive(tensor, source)

    def fail(self, reason: str) -> None:
        """Tell the other ranks that this one stops; every wait of theirs then raises `RankLostError`. Never raises."""
        if self._link is not None:
            self._link.fail(reason)
            self._link = None

    def close(self) -> None:
        """Leave, once every rank does. Raises `RankLostError`. Twice does nothing."""
        if self._link is not None:
            self.barrier()
            self._link.close()
            self._link = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.fail(error.line if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    def _next(self, kind: str) -> str:
        self._calls += 1
        return f"{kind}/{self._calls}"


_store: Store | None = None
_joined = 0


class _Link:
    """What joins the ranks: the store, the pulse and the gloo group."""

    def __init__(self, rank: int, size: int, lost_after: float) -> None:
        global _store, _joined
        self.rank, self.size, self.lost_after = rank, size, lost_after
        self.ending = threading.Event()
        try:
            if _store is None:  # one for the process: its port cannot be opened twice
                _store = next(rendezvous("env://", rank, size, timeout=JOIN_TIMEOUT))[0]
            _joined += 1
            self.store: Store = PrefixStore(f"trimtab/{_joined}", _store)
            self.store.set(f"pulse/{rank}", "0")
            group_store = PrefixStore("gloo", self.store)
            if dist.is_initialized():
                group = dist.new_group(backend="gloo", timeout=TRANSFER_TIMEOUT)
            else:
                dist.init_process_group("gloo", store=group_store, rank=rank, world_size=size, timeout=TRANSFER_TIMEOUT)
                group = dist.group.WORLD
            self.group = cast(dist.ProcessGroup, group)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"rank {rank} of {size}",
                f"the ranks could not join ({_first_line(error)})",
                "start all of them at once, with torchrun",
            ) from error
        self._seen = {other: ("", time.monotonic()) for other in range(size) if other != rank}
        self._checked = 0.0
        self._pulse = threading.Thread(target=self._beat, daemon=True, name="trimtab-pulse")
        self._pulse.start()

    def put(self, key: str, value: Any) -> None:
        data = pickle.dumps(value)
        if len(data) > _LARGEST:
            raise ValueError(f"{len(data)} bytes are too many to hand from rank to rank; put them into a file")
        try:
            self.store.set(key, data)  # type: ignore[arg-type]  # bytes are taken, too
        except RuntimeError as error:
            raise self._lost_store(error) from error

    def take(self, key: str, *, forget: bool = False) -> Any:
        pause = 0.001
        try:
            while not self.store.check([key]):
                self._check_others()
                time.sleep(pause)
                pause = min(0.05, 1.5 * pause)
            data = self.store.get(key)
            if forget:
                self.store.delete_key(key)
        except RuntimeError as error:
            raise self._lost_store(error) from error
        return pickle.loads(data)

    def send(self, tensor: Tensor, to: int) -> Transfer:
        return self._start(dist.isend, tensor, to)

    def receive(self, tensor: Tensor, source: int) -> Transfer:
        return self._start(dist.irecv, tensor, source)

    def _start(self, begin: Any, tensor: Tensor, other: int) -> Transfer:
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        try:
            work = begin(tensor.view(-1).view(torch.uint8), other, group=self.group)
        except RuntimeError as error:
            raise self.lost_transfer(other, error) from error
        return _GlooTransfer(self, work, other, tensor)

    def lost_transfer(self, other: int, error: BaseException) -> RankLostError:
        """Why a transfer failed, as far as the store knows; a rank that fails says so just before it is gone."""
        deadline = time.monotonic() + 2
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                self._raise_failure()
                time.sleep(0.05)
        return RankLostError(other, f"it is gone ({_first_line(error)})")

    def fail(self, reason: str) -> None:
        self._stop_pulse()
        with contextlib.suppress(RuntimeError):
            if not self.store.check(["failed"]):
                self.store.set("failed", pickle.dumps((self.rank, reason)))  # type: ignore[arg-type]
            self._end(patience=3.0)

    def close(self) -> None:
        self._stop_pulse()
        with contextlib.suppress(RuntimeError):
            self._end(patience=self.lost_after)

    def _end(self, patience: float) -> None:
        """Close the connections, which wakes whoever waits on them. Rank 0 may hold the store: it goes last."""
        dist.destroy_process_group(self.group)
        self.store.set(f"ended/{self.rank}", "1")
        deadline = time.monotonic() + patience
        while self.rank == 0 and time.monotonic() < deadline:
            if self.store.check([f"ended/{rank}" for rank in range(self.size)]):
                break
            time.sleep(0.02)

    def _beat(self) -> None:
        number = 0
        with contextlib.suppress(RuntimeError):  # the store is gone, and soon the process
            while not self.ending.is_set():
                number += 1
                self.store.set(f"pulse/{self.rank}", str(number))
                self.ending.wait(PULSE)

    def _stop_pulse(self) -> None:
        """End the thread before the interpreter ends: back from the store's C++ code at exit, it aborts the process."""
        self.ending.set()
        self._pulse.join(timeout=5.0)  # it may hang in a store that is gone

    def _check_others(self) -> None:
        now = time.monotonic()
        if now - self._checked < PULSE / 2:
            return
        self._checked = now
        self._raise_failure()
        for other, (pulse, since) in self._seen.items():
            found = self.store.get(f"pulse/{other}").decode() if self.store.check([f"pulse/{other}"]) else ""
            if found != pulse:
                self._seen[other] = (found, now)
            elif now - since > self.lost_after and not self.store.check([f"ended/{other}"]):
                raise RankLostError(other, f"it has given no sign of life for {now - since:.0f} s")

    def _raise_failure(self) -> None:
        if self.store.check(["failed"]):
            rank, reason = cast("tuple[int, str]", pickle.loads(self.store.get("failed")))
            if rank != self.rank:
                raise RankLostError(rank, f"it stopped: {reason}")

    def _lost_store(self, error: BaseException) -> RankLostError:
        return RankLostError(0, f"it is gone, and the ranks' store with it ({_first_line(error)})")


class _GlooTransfer:
    def __init__(self, link: _Link, work: Any, other: int, tensor: Tensor) -> None:
        self.link, self.work, self.other, self.tensor = link, work, other, tensor

    def wait(self) -> None:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise self.link.lost_transfer(self.other, error) from error


def _number(variable: str, default: int | None) -> int:
    text = os.environ.get(variable, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UserError(
            f"{variable} {text!r}", "it must be a number", "start the command with torchrun, or unset WORLD_SIZE"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

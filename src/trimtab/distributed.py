"""Several processes at one job, as torchrun starts them: who is who, what they tell each other, how they fail together.

All goes through `torch.distributed` with gloo, from CPU memory to CPU memory, whatever device the model is on; sums of
tensors on CUDA devices alone go through NCCL. Three things gloo does not do by itself. Its waits end at a limit, and a
rank may work for hours while the others wait, so the limit is a month, and each exchange begins with an all-to-all,
which fails at once when any connection closes: a process that ends closes its own. Its errors name no rank, so a
failing rank leaves its reason in the store, and one that left none is the one that nothing can be sent to. And it asks
for no signs of life from a machine that vanishes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from trimtab.errors import UserError

JOIN_TIMEOUT = timedelta(minutes=5)
"""How long the ranks wait for each other at the start."""
LONGEST_WAIT = timedelta(days=30)
"""How long a rank may wait for others that live."""
READING_TIME = timedelta(seconds=3)
"""How long rank 0, which may hold the store, leaves others to read why it stopped."""


class RankLostError(UserError):
    """Another rank failed, died or cannot be reached."""

    def __init__(self, rank: int, why: str) -> None:
        self.rank = rank
        super().__init__(f"rank {rank}", why, "start the same command again: it goes on from here")


@dataclass
class Transfer:
    """A tensor on its way."""

    ranks: Ranks
    work: Any
    tensor: Tensor

    def wait(self) -> None:
        """Wait until it has arrived. Raises `RankLostError`."""
        with self.ranks.losses_named():
            self.work.wait()


class Ranks:
    """The processes of one job. Made by `Ranks.from_environment`; `Ranks()` is a process alone.

    Use it as a context manager: on an error the other ranks are told, on success all leave together. Every method but
    `fail` and the transfers must be called by all ranks, in the same order, and waits for all of them.

    Attributes:
        rank: number of this process, 0 to `size - 1`.
        size: number of processes.
        local_rank: number of this process on its machine.
    """

    _process_store: Store | None = None  # one for the process: its port cannot be opened twice
    _joined = 0

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store: Store | None = None
        self._group: dist.ProcessGroup | None = None
        self._nccl: dist.ProcessGroup | None = None

    @classmethod
    def from_environment(cls) -> Ranks:
        """Join the other processes that torchrun started; without torchrun, or with one process, be alone.

        Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

        Raises:
            UserError: the variables make no sense, or the other ranks do not come.
        """
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return cls()
        rank, local_rank = _number("RANK", None), _number("LOCAL_RANK", 0)
        if not 0 <= rank < size:
            raise UserError(f"RANK {rank}", f"it must be below WORLD_SIZE, {size}", "start the command with torchrun")
        ranks = cls(rank, size, local_rank)
        try:
            ranks._join()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"rank {rank} of {size}",
                f"the ranks could not join ({_first_line(error)})",
                "start all of them at once, with torchrun",
            ) from error
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and speaks to the user."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this rank: `cuda` is one of its own for every process of a machine."""
        return f"{name}:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    def barrier(self) -> None:
        """Wait until every rank is here. Raises `RankLostError`."""
        if self._group is not None:
            with self.losses_named():
                dist.all_to_all_single(torch.empty(self.size), torch.zeros(self.size), group=self._group)

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, by rank, on rank 0; None on the others.

        Args:
            value: anything that can be pickled.

        Raises:
            RankLostError: a rank is gone before it has given its value.
        """
        if self._group is None:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_first else None
        self.barrier()
        with self.losses_named():
            dist.gather_object(value, found, dst=0, group=self._group)
        return found

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank; what the others give is not looked at.

        Raises:
            RankLostError: a rank is gone before rank 0 has given its value.
        """
        if self._group is None:
            return value
        found = [value]
        self.barrier()
        with self.losses_named():
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all ranks in the place of each tensor, which has the same shape on all of them.

        Tensors on CUDA devices go through NCCL, from device to device.

        Raises:
            RankLostError: a rank is gone.
        """
        if self._group is None or not tensors:
            return
        dense = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
        if dense[0].is_cuda:
            self.barrier()  # NCCL does not notice who is gone
        with self.losses_named():
            group = self._device_group() if dense[0].is_cuda else self._group
            transfers: list[Any] = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in dense]
            for transfer in transfers:
                transfer.wait()
        for tensor, summed in zip(tensors, dense, strict=True):
            if tensor is not summed:
                tensor.copy_(summed)

    def _device_group(self) -> dist.ProcessGroup:
        """The same processes, joined by NCCL when it is first needed."""
        if self._nccl is None:
            self._nccl = cast(dist.ProcessGroup, dist.new_group(backend="nccl", timeout=JOIN_TIMEOUT))
        return self._nccl

    def send(self, tensor: Tensor, to: int) -> Transfer:
        """Begin to send a contiguous CPU tensor, which must not change before the transfer's `wait`."""
        with self.losses_named():
            return Transfer(self, dist.isend(_as_bytes(tensor), to, group=self._group), tensor)

    def receive(self, tensor: Tensor, source: int) -> Transfer:
        """Begin to receive what `source` sends into a contiguous CPU tensor of the same bytes."""
        with self.losses_named():
            return Transfer(self, dist.irecv(_as_bytes(tensor), source, group=self._group), tensor)

    @contextlib.contextmanager
    def losses_named(self) -> Iterator[None]:
        """Turn gloo's error over a rank that is gone into a `RankLostError` that names it."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one stops; every wait of theirs then raises `RankLostError`. Never raises."""
        if self._group is None or self._store is None:
            return
        said = error.line if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        lost = (error.rank, error.why) if isinstance(error, RankLostError) else (self.rank, f"it stopped: {said}")
        with contextlib.suppress(RuntimeError):
            if not self._store.check(["lost"]):
                self._store.set("lost", json.dumps(lost))
                self._store.get("lost")  # it is there before the others see this rank go
        self._leave()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "1")
            if self.is_first:
                self._store.wait([f"left/{rank}" for rank in range(self.size)], READING_TIME)

    def close(self) -> None:
        """Leave, once every rank does. Raises `RankLostError`. Twice does nothing."""
        self.barrier()
        self._leave()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            self.close()
        else:
            self.fail(error)

    def _join(self) -> None:
        if Ranks._process_store is None:
            Ranks._process_store = next(rendezvous("env://", self.rank, self.size, timeout=JOIN_TIMEOUT))[0]
        Ranks._joined += 1
        self._store = store = PrefixStore(f"trimtab/{Ranks._joined}", Ranks._process_store)
        store.set(f"here/{self.rank}", "1")
        store.wait([f"here/{rank}" for rank in range(self.size)], JOIN_TIMEOUT)
        if dist.is_initialized():
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=LONGEST_WAIT))
        else:
            # Its functions' defaults are the group that is there when it is first imported, which never closes then.
            importlib.import_module("torch.distributed.nn.functional")
            own = {"store": PrefixStore("gloo", store), "rank": self.rank, "world_size": self.size}
            dist.init_process_group("gloo", **own, timeout=LONGEST_WAIT)
            self._group = dist.group.WORLD
        _keep_alive()

    def _leave(self) -> None:
        """Close the connections, which wakes whoever waits on them."""
        for group in (self._nccl, self._group):
            if group is not None:
                dist.destroy_process_group(group)
        self._group = self._nccl = None

    def _lost(self, error: RuntimeError) -> RankLostError:
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self._store.check(["lost"]):
                return RankLostError(*json.loads(self._store.get("lost")))
        for rank in (rank for rank in range(self.size) if rank != self.rank):
            try:
                dist.isend(torch.zeros(1), rank, group=self._group)
            except RuntimeError:
                return RankLostError(rank, f"it is gone ({_first_line(error)})")
        return RankLostError(0 if self.rank else 1, f"it may be gone ({_first_line(error)})")


def _as_bytes(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.view(-1).view(torch.uint8)


def _keep_alive() -> None:
    """Let the kernel ask, on every connection, whether the other machine is still there; it knows within a minute."""
    asked = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError), socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in asked.items():  # no TCP connection refuses them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


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

"""Map a stage over shards: in this process, in several of this machine, or on a Ray cluster (extra `scale`).

A stage is a plain function `stage(config, shard) -> files`, safe to repeat: it reads what config and shard name, writes
its files whole, and says which they are. What is done is recorded, so that the same call again goes on where it ended.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from trimtab.errors import UserError
from trimtab.runs.atomic import read_json, write_json
from trimtab.runs.config import config_dict
from trimtab.runs.progress import Meter

Config = TypeVar("Config")
Shard = TypeVar("Shard")
Stage = Callable[[Config, Shard], Iterable[str | os.PathLike[str]]]


class Done(NamedTuple):
    """A shard whose files are there."""

    files: tuple[Path, ...]
    skipped: bool = False
    """Whether they were there before."""


class Failed(NamedTuple):
    """A shard without its files."""

    reason: str


Result = Done | Failed


class Executor(Protocol):
    """Runs a function on many things."""

    def map(self, function: Callable[[Any], Result], things: Sequence[Any]) -> Iterator[tuple[int, Result]]:
        """Results with their places among the things, as they come."""
        ...


class InProcess:
    """One after the other, here."""

    def map(self, function: Callable[[Any], Result], things: Sequence[Any]) -> Iterator[tuple[int, Result]]:
        return ((i, function(thing)) for i, thing in enumerate(things))


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Several at once on this machine, each in a process of its own, which share its processors.

    A process that dies takes those beside it along. What is then left runs one by one, so that a shard whose process
    dies again fails alone.
    """

    workers: int
    """Processes."""
    tries: int = 3
    """How often a shard is begun by itself."""

    def map(self, function: Callable[[Any], Result], things: Sequence[Any]) -> Iterator[tuple[int, Result]]:
        left = dict(enumerate(things))
        for i, result in self._pooled(function, left):
            del left[i]
            yield i, result
        for i, thing in left.items():
            again = (found for _ in range(self.tries) for found in self._pooled(function, {i: thing}))
            why = f"its process died {self.tries} times, as all do of a script without `if __name__ == '__main__'`"
            yield next(again, (i, Failed(why)))

    def _pooled(self, function: Callable[[Any], Result], things: Mapping[int, Any]) -> Iterator[tuple[int, Result]]:
        """Results as they come, of those whose processes live."""
        workers = max(1, min(self.workers, len(things)))
        fresh = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU that this one has used
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ProcessPoolExecutor(workers, fresh, _take_threads, (max(1, processors // self.workers),)) as pool:
            waiting: dict[Future[Result], int] = {}
            with suppress(BrokenProcessPool):  # one may die while others are still handed out
                for i, thing in things.items():
                    waiting[pool.submit(function, thing)] = i
            for ready in as_completed(waiting):
                try:
                    result = ready.result()
                except BrokenProcessPool:
                    continue
                yield waiting[ready], result


def _take_threads(threads: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # which torch reads when it is loaded
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(threads)


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """As many at once as a Ray cluster has processors for, each in a worker process. All machines must see the files.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """

    address: str | None = None
    """Of the cluster; None for one that is known already (`ray.init`, `RAY_ADDRESS`), else one on this machine."""
    tries: int = 3
    """How often a shard is begun whose worker dies."""
    processors: float = 1.0
    """Processors that a shard takes up."""
    accelerators: float = 0.0
    """Accelerators that it takes up; without any it sees none."""

    def map(self, function: Callable[[Any], Result], things: Sequence[Any]) -> Iterator[tuple[int, Result]]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise UserError("Ray", "it is not installed", "install it: pip install 'trimtab[scale]'") from error
        started = not ray.is_initialized()
        if started:
            _check_address(self.address)
            ray.init(address=self.address, log_to_driver=False)
        here = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}  # workers import what this process can
        options = {"max_retries": self.tries - 1, "num_cpus": self.processors, "runtime_env": here}
        options |= {"num_gpus": self.accelerators} if self.accelerators else {}
        remote = ray.remote(**options)(function)
        waiting = {remote.remote(thing): i for i, thing in enumerate(things)}
        try:
            while waiting:
                (ready,), _ = ray.wait(list(waiting))
                try:
                    result: Result = ray.get(ready)
                except ray.exceptions.RayTaskError:  # the stage's own mistake
                    raise
                except ray.exceptions.RayError as error:
                    why = " ".join(str(error).split())[:200]
                    result = Failed(f"its worker died {self.tries} times ({why})")
                yield waiting.pop(ready), result
        finally:
            for left in waiting:
                ray.cancel(left, force=True)
            if started:
                ray.shutdown()


def run_stage(
    stage: Stage[Config, Shard],
    config: Config,
    shards: Sequence[Shard],
    *,
    records: str | os.PathLike[str],
    executor: Executor | None = None,
) -> list[Result]:
    """Run a stage on every shard that is not done.

    A shard is done if it was recorded under the same stage, config and shard, and its files have the sizes that they
    had then. A stage that raises a `UserError` fails on that shard alone; any other exception is a bug and is raised.

    Args:
        stage: a function of a module.
        config: a dataclass, or anything that JSON can hold.
        shards: likewise.
        records: a directory for what is done, made if need be.
        executor: where stages run; by default here, one after the other.

    Returns:
        What became of each shard, in their order.
    """
    jobs = [_Job(stage, config, shard, Path(records).absolute()) for shard in shards]
    results: dict[int, Result] = {i: done for i, job in enumerate(jobs) if (done := job.done())}
    left = [i for i in range(len(jobs)) if i not in results]
    with Meter(f"running {stage.__name__}", len(jobs), done=len(results)) as meter:
        for place, result in (executor or InProcess()).map(_Job.run, [jobs[i] for i in left]):
            results[left[place]] = result
            meter.advance()
    return [results[i] for i in range(len(jobs))]


class _Job(NamedTuple):
    stage: Stage[Any, Any]
    config: Any
    shard: Any
    records: Path

    def what(self) -> dict[str, Any]:
        """The stage, config and shard as plain values."""
        name = f"{self.stage.__module__}.{self.stage.__qualname__}"
        return config_dict({"stage": name, "config": self.config, "shard": self.shard})

    def record(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.what(), sort_keys=True).encode()).hexdigest()
        return self.records / f"{self.stage.__name__}-{digest[:16]}.json"

    def done(self) -> Done | None:
        """The files of a shard that is done; None if it is not."""
        found = read_json(self.record())
        if found is None or any(_size(file) != size for file, size in found["files"].items()):
            return None
        return Done(tuple(map(Path, found["files"])), skipped=True)

    def run(self) -> Result:
        try:
            files = tuple(Path(file).absolute() for file in self.stage(self.config, self.shard))
        except UserError as error:
            return Failed(error.line)
        sizes = {str(file): _size(file) for file in files}
        absent = [file for file, size in sizes.items() if size is None]
        assert not absent, f"the stage says that it wrote {absent[0]}, which is not there"
        write_json(self.record(), {**self.what(), "files": sizes})
        return Done(files)


def _size(file: str | Path) -> int | None:
    path = Path(file)
    return path.stat().st_size if path.is_file() else None


def _check_address(address: str | None) -> None:
    """Raise a `UserError` if nothing listens at HOST:PORT; Ray itself tries for many minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            why = f"there is none ({error.strerror or error})"
            raise UserError(f"Ray cluster {address}", why, "start it, or correct the address") from error

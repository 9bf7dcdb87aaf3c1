"""A run: the directory that one command writes, and what it says about itself in `run.json`."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

from trimtab.errors import UserError
from trimtab.runs.atomic import is_partial, remove_partial_files, write_json
from trimtab.runs.config import config_dict, config_difference, json_safe
from trimtab.runs.inputs import check_unchanged, input_files, is_same_file, names_in_caches
from trimtab.runs.lock import LOCK_NAME, RunLock
from trimtab.runs.metrics_log import METRICS_NAME, append_metrics, cut_metrics, repair_metrics
from trimtab.runs.provenance import machine, utc_now, versions
from trimtab.runs.record import RECORD_NAME, SCHEMA, read_record
from trimtab.runs.splits import text_id

Status = Literal["running", "done", "failed"]
ANOTHER = "choose another --run directory"
AT_CHANGED_FILE = f"{ANOTHER}, or go back to the old file"
AT_CHANGE = f"{ANOTHER} or go back to the old value"


class Run:
    """An open run. Made by `Run.open`; use it as a context manager, so that a failure is recorded and the lock freed.

    Attributes:
        path: the directory.
        record_dict: what `run.json` holds; written anew at every change.
        resumed: whether the directory held this run before.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: RunLock, *, resumed: bool) -> None:
        self.path = path
        self.record_dict = record
        self.resumed = resumed
        self._lock, self._made = lock, list[Path]()
        self._inputs: Any = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        command: str,
        config: Any,
        *,
        seeds: Sequence[int] | None = None,
        splits: Mapping[str, Sequence[str]] | None = None,
        device: str = "cpu",
        ignore_fields: Collection[str] = (),
        inputs: Any = None,
    ) -> Run:
        """Start the run in an empty or absent directory, or resume it where the same command left it.

        Args:
            path: the directory.
            command: the command that writes it (`rank`, `train`, …).
            config: its config, a dataclass or mapping.
            seeds, splits: what it draws on, if known now (splits: ids by name); compared on resuming.
            device: what it computes on.
            ignore_fields: dotted config fields that may change between openings, such as a progress interval.
            inputs: what names the files, models and data sets that it reads (`runs.inputs`), by default the config.

        Raises:
            UserError: the directory holds something else, another command's run, a run of another config (the message
                names the field), a finished run of what has changed since, a `run.json` that cannot be read, or
                another process has it open.
        """
        directory = Path(path)
        inputs = config if inputs is None else inputs
        ids = None if splits is None else {name: [str(id_) for id_ in members] for name, members in splits.items()}
        asked = {"config": config_dict(config), "seeds": seeds, "splits": ids}
        asked = {key: json_safe(value) for key, value in asked.items() if value is not None}
        if directory.exists() and not directory.is_dir():
            raise UserError(f"run {directory}", "it is a file, not a directory", ANOTHER)
        _check_contents(directory)
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        lock = RunLock(directory)
        try:
            remove_partial_files(directory)
            if not (directory / RECORD_NAME).exists():
                run = cls(directory, _new_record(directory, command, asked, device, inputs), lock, resumed=False)
                run._made = made
                run._write()
            else:
                record = read_record(directory)
                try:
                    _check_same(directory, record, command, asked, ignore_fields)
                except UserError:
                    if not _failed_with_nothing(directory, record):
                        raise
                    record = _new_record(directory, command, asked, device, inputs)
                if record["status"] == "done":
                    check_unchanged(directory, record, inputs, AT_CHANGED_FILE)
                repair_metrics(directory / METRICS_NAME)
                run = cls(directory, record, lock, resumed=True)
                if not run.done:
                    now, before = versions(), cast(dict[str, str], record["versions"])
                    changed = {name: version for name, version in now.items() if before.get(name) != version}
                    record["resumptions"].append({"time": utc_now(), "changed_versions": changed})
                    record.update(status="running", reason=None)
                    run._write()
        except BaseException:
            lock.release()
            raise
        run._inputs = inputs
        return run

    @property
    def command(self) -> str:
        """The command that writes this run."""
        return cast(str, self.record_dict["command"])

    @property
    def config(self) -> dict[str, Any]:
        """The config as plain values."""
        return cast(dict[str, Any], self.record_dict["config"])

    @property
    def status(self) -> Status:
        """`running`, `done` or `failed`."""
        return cast(Status, self.record_dict["status"])

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return self.status == "done"

    @property
    def results(self) -> dict[str, Any] | None:
        """What `finish` was given; None before."""
        return cast("dict[str, Any] | None", self.record_dict["results"])

    def file(self, name: str) -> Path:
        """The path of a file in the run's directory."""
        return self.path / name

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Append one line `{"step": step, **metrics}` to `metrics.jsonl`; NaN becomes null."""
        append_metrics(self.file(METRICS_NAME), metrics, step)

    def drop_metrics_after(self, step: int) -> None:
        """Drop logged lines whose step is greater, as when work since a checkpoint is done again."""
        cut_metrics(self.file(METRICS_NAME), step)

    def record(self, *, hashes: Mapping[str, str] | None = None, **facts: Any) -> None:
        """Add facts to `run.json`.

        Args:
            hashes: of model, dictionary, data, by name. One that was recorded before must not have changed.
            facts: anything else (`seeds`, `splits`, `device`, counts); replaces what was there.

        Raises:
            UserError: a hash that differs from the one recorded.
            ValueError: a fact by the name of a field that the run itself keeps.
        """
        kept = {"schema", "command", "config", "status", "created", "updated", "results", "test_split_openings"}
        if taken := kept & set(facts):
            raise ValueError(f"the run itself keeps {sorted(taken)}")
        known = cast(dict[str, str], self.record_dict["hashes"])
        for name, value in (hashes or {}).items():
            if known.get(name, value) != value:
                raise UserError(f"run {self.path}", f"its {name} had hash {known[name]} and now has {value}", AT_CHANGE)
        self.record_dict["hashes"] = {**known, **(hashes or {})}
        self.record_dict.update(cast(dict[str, Any], json_safe(facts)))
        self._write()

    def extend(self, field: str, value: float) -> None:
        """Go on from what is there with a larger value of a field of the config; `run.json` keeps that it was smaller.

        Raises:
            UserError: the value is smaller than it was.
        """
        old = self.config[field]
        if value < old:
            raise UserError(f"run {self.path}", f"{field} was {old} and is now {value}", AT_CHANGE)
        if value > old:
            self.config[field] = value
            self.record_dict.setdefault("extensions", []).append(
                {"time": utc_now(), "field": field, "old": old, "new": value}
            )
            self.record_dict.update(status="running", results=None)
            self._write()

    def open_split(self, name: str, ids: Sequence[str]) -> list[str]:
        """Record that a test split is looked at now, and give its ids back.

        Args:
            name: name of the split.
            ids: its ids; if the run knows the split, they must be the same.

        Raises:
            UserError: ids other than those that the run holds for this split.
        """
        opened = [str(id_) for id_ in ids]
        splits = cast("dict[str, list[str]]", self.record_dict["splits"])
        if splits.setdefault(name, opened) != opened:
            raise UserError(f"split {name}", f"run {self.path} holds {len(splits[name])} other ids for it", AT_CHANGE)
        openings = cast("list[dict[str, Any]]", self.record_dict["test_split_openings"])
        about = {"split": name, "time": utc_now(), "command": self.command}
        openings.append({**about, "n": len(opened), "ids": text_id("\0".join(opened))})
        self._write()
        return opened

    def finish(self, results: Any = None) -> None:
        """Mark the run done and keep `results` (a mapping or dataclass) in `run.json`."""
        fetched = names_in_caches(self._inputs, self.path)
        inputs = {**fetched, **self.record_dict.get("inputs", {})}
        self.record_dict.update(status="done", results=json_safe(results), reason=None, inputs=inputs)
        self._write()

    def fail(self, reason: str) -> None:
        """Mark the run failed; the same command may resume it."""
        self.record_dict.update(status="failed", reason=reason)
        self._write()

    def close(self) -> None:
        """Let other processes open the run. Closing twice does nothing."""
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not self.done:
            reason = error.line if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(UserError, OSError):
                self.fail(reason)
                if isinstance(error, UserError) and self._made and _failed_with_nothing(self.path, self.record_dict):
                    shutil.rmtree(self.path)  # what is refused leaves no directory
                    for parent in self._made[1:]:
                        parent.rmdir()
        self.close()

    def _write(self) -> None:
        self.record_dict["updated"] = utc_now()
        write_json(self.file(RECORD_NAME), self.record_dict)


def _new_record(directory: Path, command: str, asked: Mapping[str, Any], device: str, inputs: Any) -> dict[str, Any]:
    now = utc_now()
    return {
        "schema": SCHEMA,
        "command": command,
        "config": asked["config"],
        "working_directory": os.getcwd(),
        "inputs": input_files(inputs, directory),
        "status": "running",
        "reason": None,
        "created": now,
        "updated": now,
        "resumptions": [],
        "device": device,
        "versions": versions(),
        "machine": machine(),
        "seeds": asked.get("seeds", []),
        "prompts": [],
        "splits": asked.get("splits", {}),
        "hashes": {},
        "test_split_openings": [],
        "results": None,
    }


def _check_contents(directory: Path) -> None:
    """A directory with files but without `run.json` is somebody else's."""
    if not directory.exists() or (directory / RECORD_NAME).exists():
        return
    foreign = sorted(entry.name for entry in directory.iterdir() if entry.name != LOCK_NAME and not is_partial(entry))
    if foreign:
        raise UserError(f"run {directory}", f"it holds {foreign[0]} but no {RECORD_NAME}", ANOTHER)


def _check_same(
    directory: Path, record: dict[str, Any], command: str, asked: Mapping[str, Any], ignore_fields: Collection[str]
) -> None:
    if record["command"] != command:
        raise UserError(f"run {directory}", f"it belongs to `{record['command']}`, not `{command}`", ANOTHER)
    changes = config_difference(record["config"], asked["config"], ignore=ignore_fields)
    changes = [change for change in changes if not is_same_file(record, change.old, change.new)]
    for key in ("seeds", "splits"):
        if key in asked and record.get(key):
            changes += config_difference({key: record[key]}, {key: asked[key]}, ignore=ignore_fields)
    if changes:
        more = f" ({len(changes) - 1} more changed)" if len(changes) > 1 else ""
        raise UserError(f"run {directory}", f"{changes[0]}{more}", AT_CHANGE)


def _failed_with_nothing(directory: Path, record: Mapping[str, Any]) -> bool:
    """Whether a run stopped at a mistake before it made anything: then another config may take its place."""
    made = (p for p in directory.rglob("*") if p.is_file() and p.name not in (RECORD_NAME, LOCK_NAME))
    return record["status"] == "failed" and not any(p.name != METRICS_NAME or p.stat().st_size for p in made)

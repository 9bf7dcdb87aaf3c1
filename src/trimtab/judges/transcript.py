"""A record of what a judge was asked and answered: the same question is never paid for twice, and can be read later."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trimtab.errors import UserError


class Transcript:
    """Exchanges in a file of JSON lines, looked up by the request's content. Lines are only ever added.

    A line that was cut short when a process was killed is passed over and its question is asked again.

    Args:
        path: the file, made on the first exchange; None keeps exchanges in memory only.
        keep_requests: write requests beside the replies. Without them, the file holds no prompt and no answer, only
            what a request that is asked again is recognised by.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, keep_requests: bool = True) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.keep_requests = keep_requests
        self._replies: dict[str, str] = {}
        self._ends_cleanly = True
        if self.path is not None and self.path.exists():
            self._read(self.path)

    @property
    def count(self) -> int:
        """Exchanges recorded."""
        return len(self._replies)

    def find(self, request: dict[str, Any]) -> str | None:
        """The recorded reply to a request, or None."""
        return self._replies.get(_key(request))

    def add(self, request: dict[str, Any], reply: str) -> None:
        """Record an exchange, on disk before this returns.

        Raises:
            UserError: the file cannot be written.
        """
        key = _key(request)
        self._replies[key] = reply
        if self.path is None:
            return
        kept = {"request": request} if self.keep_requests else {}
        line = json.dumps({"key": key, **kept, "reply": reply}, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line if self._ends_cleanly else "\n" + line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"transcript {self.path}", f"it cannot be written ({error.strerror or error})", "choose another place"
            ) from error
        self._ends_cleanly = True

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text("utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"transcript {path}", f"it cannot be read ({error})", "choose another file") from error
        self._ends_cleanly = text == "" or text.endswith("\n")
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
                self._replies[entry["key"]] = entry["reply"]
            except (ValueError, KeyError, TypeError):
                continue


def _key(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]

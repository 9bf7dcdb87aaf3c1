"""A record of what a chat model was asked and replied, so that no question is paid for twice and all can be read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import UserError
from trimtab.runs.atomic import append_line


class Tokens(NamedTuple):
    """How many tokens were sent and received."""

    sent: int = 0
    received: int = 0


NO_TOKENS = Tokens()


class Transcript:
    """Exchanges in a file of JSON lines, looked up by the request's content. Lines are only ever added.

    A line that was cut short when a process was killed is passed over and its question is asked again.

    Args:
        path: the file, made on the first exchange; None keeps exchanges in memory only.
        keep_requests: write requests beside the replies. Without them, the file holds no prompt and no answer, only
            what a request that is asked again is recognised by.

    Attributes:
        tokens: of all exchanges in the file.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, keep_requests: bool = True) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.keep_requests = keep_requests
        self.tokens = NO_TOKENS
        self._replies: dict[str, str] = {}
        self._torn = ""
        if self.path is not None and self.path.exists():
            try:
                text = self.path.read_text("utf-8", errors="replace")
            except OSError as error:
                raise UserError(f"transcript {path}", f"it cannot be read ({error})", "choose another file") from error
            self._torn = "\n" if text and not text.endswith("\n") else ""
            for line in text.split("\n"):
                try:
                    entry = json.loads(line)
                    self._keep(entry["key"], entry["reply"], Tokens(*entry.get("tokens", ())))
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue

    def find(self, request: dict[str, Any]) -> str | None:
        """The recorded reply to a request, or None."""
        return self._replies.get(request_key(request))

    def add(self, request: dict[str, Any], reply: str, tokens: Tokens = NO_TOKENS) -> None:
        """Record an exchange; it is in the file before this returns.

        Raises:
            UserError: the file cannot be written.
        """
        key = request_key(request)
        self._keep(key, reply, tokens)
        if self.path is not None:
            entry = {"key": key, **({"request": request} if self.keep_requests else {}), "reply": reply}
            append_line(self.path, self._torn + json.dumps({**entry, "tokens": tokens}, ensure_ascii=False))
            self._torn = ""

    def _keep(self, key: str, reply: str, tokens: Tokens) -> None:
        self._replies[key] = reply
        self.tokens = Tokens(self.tokens.sent + tokens.sent, self.tokens.received + tokens.received)


def request_key(request: dict[str, Any]) -> str:
    """What a request is recognised by: a hash of its content."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]

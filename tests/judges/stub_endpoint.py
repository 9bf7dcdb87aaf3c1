"""A chat endpoint on this machine that replies with what it is told to, and fails in every way that a server fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | int | Callable[["Handler"], None]
"""A word, an HTTP status, or what to do with the connection."""


class StubEndpoint(ThreadingHTTPServer):
    """Replies with what is queued, then with `otherwise`; `usage` are the tokens sent and received.

    Where there is a `meeting`, requests get a reply only once as many are there as it waits for.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, otherwise: Reply = "compliance") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply] = []
        self.otherwise: Reply = otherwise
        self.usage: tuple[int, int] | None = (100, 2)
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.meeting: threading.Barrier | None = None
        self.released = threading.Event()
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: StubEndpoint

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.guard:
            server.asked.append({"path": self.path, **body})
            reply = server.replies.pop(0) if server.replies else server.otherwise
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        if server.meeting is not None:
            server.meeting.wait(timeout=20)
        with server.guard:
            server.at_once -= 1
        if callable(reply):
            reply(self)
        elif isinstance(reply, int):
            self.send(reply, {"error": {"message": f"status {reply}"}})
        else:
            self.send(200, self.completion(reply))

    def completion(self, content: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": content}
        found = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        usage = self.server.usage
        if usage is not None:
            found["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
        return {**found, "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}

    def send(self, status: int, payload: object, *, length: int | None = None, **headers: str) -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        if length is not None:
            self.close_connection = True
            self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass


def hang(handler: Handler) -> None:
    """Reply with nothing until the test is over."""
    handler.server.released.wait(30)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def half_body(handler: Handler) -> None:
    """Announce more than is sent, then hang up."""
    data = json.dumps(handler.completion("refusal")).encode()
    handler.send(200, data[: len(data) // 2], length=len(data))


def cut_json(handler: Handler) -> None:
    """A whole body that holds half an object."""
    handler.send(200, json.dumps(handler.completion("refusal")).encode()[:40])


def cut_short(handler: Handler) -> None:
    """A whole body with half a reply, as where tokens ran out: an answer is begun, its end is missing."""
    handler.send(200, handler.completion("<meaning>the sea <fires>1, 2 <rating>1"))


def no_choices(handler: Handler) -> None:
    handler.send(200, {**handler.completion(""), "choices": []})


def null_content(handler: Handler) -> None:
    handler.send(200, handler.completion(None))


def no_json(handler: Handler) -> None:
    handler.send(200, b"<html>Bad gateway</html>")


def busy(seconds: str) -> Reply:
    """429 with a Retry-After header."""
    return lambda handler: handler.send(429, {"error": {"message": "slow down"}}, Retry_After=seconds)


@contextmanager
def served() -> Iterator[StubEndpoint]:
    """A stub that answers until it is left."""
    server = StubEndpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()

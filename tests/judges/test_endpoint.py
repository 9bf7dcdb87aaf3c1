"""The endpoint judge against a server on this machine: retries, transcript, errors."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import UserError
from trimtab.judges import (
    ClassifierJudge,
    EndpointConfig,
    EndpointJudge,
    Transcript,
    Verdict,
    judge_options,
    make_judge,
)


class FakeEndpoint(HTTPServer):
    """Replies with what is queued: a word, or an HTTP status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[str | int] = []
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: FakeEndpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append({"path": self.path, **json.loads(body)})
        reply = self.server.replies.pop(0) if self.server.replies else "compliance"
        if isinstance(reply, int):
            status, payload = reply, {"error": {"message": f"status {reply}"}}
        else:
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            status = 200
            payload = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    pytest.importorskip("openai")
    server = FakeEndpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge_at(server: FakeEndpoint, transcript: Transcript | None = None, **fields: Any) -> EndpointJudge:
    waits: list[float] = []
    judge = EndpointJudge(
        EndpointConfig(model="m", base_url=server.url, **fields), transcript or Transcript(), sleep=waits.append
    )
    judge.waits = waits  # type: ignore[attr-defined]
    return judge


def test_words_become_verdicts(endpoint: FakeEndpoint) -> None:
    endpoint.replies = ["Refusal.", "compliance", " **gibberish**"]
    judge = judge_at(endpoint)
    assert judge.score_all(["p"] * 3, ["one answer", "another answer", "a third"]) == [
        Verdict(refused=True, reason="m"),
        Verdict(refused=False, reason="m"),
        Verdict(refused=False, gibberish=True, reason="m"),
    ]
    asked = endpoint.asked[0]
    assert asked["path"] == "/v1/chat/completions"
    assert asked["temperature"] == 0
    assert "<answer>\none answer\n</answer>" in asked["messages"][1]["content"]


def test_plain_gibberish_is_not_sent(endpoint: FakeEndpoint) -> None:
    assert judge_at(endpoint).score("p", "   ") == Verdict(refused=False, gibberish=True, reason="empty")
    assert endpoint.asked == []


def test_a_busy_endpoint_is_asked_again_with_growing_waits(endpoint: FakeEndpoint) -> None:
    endpoint.replies = [429, 503, 500, "refusal"]
    judge = judge_at(endpoint, first_wait=0.5)
    assert judge.score("p", "an answer").refused
    assert judge.waits == [0.5, 1.0, 2.0]  # type: ignore[attr-defined]


def test_it_gives_up_in_the_end(endpoint: FakeEndpoint) -> None:
    endpoint.replies = [503] * 9
    with pytest.raises(UserError, match="it gave no reply in 3 tries"):
        judge_at(endpoint, max_tries=3).score("p", "an answer")
    assert len(endpoint.asked) == 3


def test_a_refused_key_is_not_tried_again(endpoint: FakeEndpoint) -> None:
    endpoint.replies = [401]
    with pytest.raises(UserError, match=r"refused the request .*status 401.*; check the model's name.*OPENAI_API_KEY"):
        judge_at(endpoint).score("p", "an answer")
    assert len(endpoint.asked) == 1


def test_an_unreachable_endpoint(endpoint: FakeEndpoint) -> None:
    judge = EndpointJudge(
        EndpointConfig(model="m", base_url="http://127.0.0.1:9/v1", max_tries=2), sleep=lambda seconds: None
    )
    with pytest.raises(UserError, match="it gave no reply in 2 tries"):
        judge.score("p", "an answer")


def test_an_unclear_reply_is_named_and_not_recorded(endpoint: FakeEndpoint) -> None:
    endpoint.replies = ["It could be a refusal or compliance", "I am not sure"]
    judge = judge_at(endpoint)
    for _ in range(2):
        with pytest.raises(UserError, match="which is not one of refusal, compliance, gibberish"):
            judge.score("p", "an answer")
    assert judge.transcript.count == 0


def test_the_transcript_answers_for_the_endpoint(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "judge.jsonl"
    endpoint.replies = ["refusal"]
    first = judge_at(endpoint, Transcript(path)).score("p", "an answer")
    assert judge_at(endpoint, Transcript(path)).score("p", "an answer") == first
    assert len(endpoint.asked) == 1
    judge_at(endpoint, Transcript(path)).score("another prompt", "an answer")
    assert len(endpoint.asked) == 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["reply"] for line in lines] == ["refusal", "compliance"]
    assert lines[0]["request"]["model"] == "m"


def test_a_transcript_without_requests_answers_as_well(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    name, path = f"endpoint:m@{endpoint.url}", tmp_path / "judge.jsonl"
    endpoint.replies = ["refusal"]
    for _ in range(2):
        verdict = make_judge(name, transcript=path, keep_requests=False).score("a secret prompt", "an odd answer")
        assert verdict.refused
    assert len(endpoint.asked) == 1
    (line,) = path.read_text().splitlines()
    assert sorted(json.loads(line)) == ["key", "reply"]
    assert "secret" not in line


def test_a_transcript_cut_short_loses_one_line(tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    whole = Transcript(path)
    whole.add({"n": 1}, "refusal")
    whole.add({"n": 2}, "compliance")
    path.write_text(path.read_text()[:-20])
    again = Transcript(path)
    assert again.find({"n": 1}) == "refusal"
    assert again.find({"n": 2}) is None
    again.add({"n": 2}, "compliance")
    again.add({"n": 3}, "gibberish")
    assert [Transcript(path).find({"n": n}) for n in (1, 2, 3)] == ["refusal", "compliance", "gibberish"]


def test_a_transcript_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"transcript .* it cannot be written"):
        Transcript(tmp_path / "file" / "judge.jsonl").add({}, "refusal")
    with pytest.raises(UserError, match=r"transcript .* it cannot be read"):
        Transcript(tmp_path)


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"it needs `openai`; install it: pip install 'trimtab\[judge\]'"):
        make_judge("endpoint:m@http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="it needs `openai`"):
        EndpointJudge(EndpointConfig(model="m")).score("p", "an answer")


def test_without_a_key_for_the_public_endpoint() -> None:
    pytest.importorskip("openai")
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY is not set"):
        EndpointJudge(EndpointConfig(model="m")).score("p", "an answer")


def test_names(endpoint: FakeEndpoint) -> None:
    judge = make_judge(f"endpoint:m@{endpoint.url}")
    assert judge.name == f"endpoint:m@{endpoint.url}"
    assert make_judge().name == "rules"
    assert make_judge("classifier:some/where").name == "classifier:some/where"


def test_options(endpoint: FakeEndpoint) -> None:
    judge = make_judge(f"endpoint:m@{endpoint.url}", timeout=3.0, max_tries=2)
    assert isinstance(judge, EndpointJudge)
    assert (judge.config.timeout, judge.config.max_tries) == (3.0, 2)
    assert make_judge("classifier:x", threshold=0.9) == ClassifierJudge("x", threshold=0.9)
    assert judge_options("classifier:x")["threshold"] is float
    with pytest.raises(UserError, match="judge option 'model': judge endpoint:m takes key_variable, max_tries, "):
        make_judge("endpoint:m", model="other")
    with pytest.raises(UserError, match="judge option 'threshold': judge rules takes none; leave it out"):
        make_judge("rules", threshold=0.9)


@pytest.mark.parametrize("name", ["", "rules:x", "oracle", "endpoint:", "classifier"])
def test_unknown_judges(name: str) -> None:
    with pytest.raises(UserError, match="there are rules, classifier:PATH and endpoint:MODEL@URL"):
        make_judge(name)


@pytest.mark.parametrize(
    "fields",
    [{"model": ""}, {"max_tries": 0}, {"first_wait": -1.0}, {"timeout": 0.0}, {"max_answer_characters": 0}],
)
def test_bad_configs(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(UserError, match=f"judge {name} = .*: it must be"):
        EndpointConfig(**{"model": "m", **fields})

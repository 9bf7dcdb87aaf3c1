"""The chat client against a stub that fails in every way: retries, gaps, cost and budget, and what is kept."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_endpoint import (
    Reply,
    StubEndpoint,
    busy,
    cut_json,
    half_body,
    hang,
    hang_up,
    no_choices,
    no_json,
    null_content,
)

from trimtab.errors import UserError
from trimtab.judges import ChatClient, ChatConfig, NoReply, Transcript, chat_client


def question(number: int | str) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": f"question {number}"}]}


class Waits(list[float]):
    """Takes the place of sleeping."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


def client_of(server: StubEndpoint | str, transcript: Transcript | None = None, **fields: Any) -> ChatClient:
    url = server if isinstance(server, str) else server.url
    return ChatClient(ChatConfig(model="m", base_url=url, **fields), transcript, sleep=Waits())


def test_many_are_asked_at_once_and_no_more_than_said(endpoint: StubEndpoint) -> None:
    """The stub replies only when four requests are there, so that one at a time would never end."""
    endpoint.meeting = threading.Barrier(4)
    client = client_of(endpoint, concurrency=4)
    assert client.ask([question(n) for n in range(12)]) == ["compliance"] * 12
    assert endpoint.most_at_once == 4


def test_replies_are_in_order_and_equal_questions_are_asked_once(endpoint: StubEndpoint) -> None:
    endpoint.replies = ["first", "second"]
    client = client_of(endpoint, concurrency=1)
    assert client.ask([question(1), question(2), question(1)]) == ["first", "second", "first"]
    assert len(endpoint.asked) == 2


FAILURES: dict[str, Reply] = {
    "rate limit": 429, "server error": 500, "no gateway": 502, "not now": 503, "timed out": 408, "hangs": hang,
    "hangs up": hang_up, "half a body": half_body, "half the JSON": cut_json, "no choices": no_choices,
    "no content": null_content, "no JSON": no_json, "empty": "  ",
}  # fmt: skip


def patience(failure: Reply) -> float:
    """Seconds: few only where nothing will come."""
    return 0.3 if failure is hang else 30.0


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_what_fails_once_is_asked_again(endpoint: StubEndpoint, failure: Reply) -> None:
    endpoint.replies = [failure]
    assert client_of(endpoint, timeout=patience(failure)).ask([question(1)]) == ["compliance"]
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_what_fails_to_the_end_is_a_gap_and_the_others_are_not(endpoint: StubEndpoint, failure: Reply) -> None:
    endpoint.replies = ["one", failure, failure, "three"]
    client = client_of(endpoint, timeout=patience(failure), max_tries=2, concurrency=1)
    one, two, three = client.ask([question(n) for n in (1, 2, 3)])
    assert (one, three) == ("one", "three")
    assert isinstance(two, NoReply)
    assert two.reason.startswith("no reply of use in 2 tries (")
    assert len(client.transcript._replies) == 2
    assert client.ask([question(2)]) == ["compliance"]  # a gap is not kept: it is asked again


def test_an_endpoint_that_refuses_connections_gives_gaps() -> None:
    pytest.importorskip("openai")
    client = client_of("http://127.0.0.1:9/v1", max_tries=2, price_received=1.0)
    (gap,) = client.ask([question(1)])
    assert isinstance(gap, NoReply)
    assert client.spent == 0


def test_waits_grow_and_differ(endpoint: StubEndpoint) -> None:
    endpoint.replies = [429, 503, 500]
    client = client_of(endpoint, first_wait=0.5)
    assert client.ask([question(1)]) == ["compliance"]
    waits = client.sleep
    assert isinstance(waits, Waits)
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, (0.5, 1.0, 2.0), strict=True))
    assert len({wait / most for wait, most in zip(waits, (0.5, 1.0, 2.0), strict=True)}) == 3


def test_a_busy_endpoint_says_how_long_to_wait(endpoint: StubEndpoint) -> None:
    endpoint.replies = [busy("7.5"), busy("99999"), busy("Wed, 21 Oct 2026 07:28:00 GMT")]
    client = client_of(endpoint, first_wait=0.5)
    assert client.ask([question(1)]) == ["compliance"]
    assert isinstance(client.sleep, Waits)
    first, second, third = client.sleep
    assert (first, second) == (7.5, chat_client.LONGEST_WAIT_ASKED)
    assert third <= 2.0


def test_a_reply_of_no_use_is_asked_for_again_and_never_kept(endpoint: StubEndpoint) -> None:
    endpoint.replies = ["hm", "hm", "yes", "hm", "hm"]
    client = client_of(endpoint, max_tries=3)

    def useful(reply: str) -> bool:
        return reply == "yes"

    assert client.ask([question(1)], useful) == ["yes"]
    endpoint.otherwise = "hm"
    assert client.ask([question(2)], useful) == [NoReply("no reply of use in 3 tries (it replied 'hm')")]
    assert len(client.transcript._replies) == 1


def test_a_question_that_is_refused_is_a_gap_at_once(endpoint: StubEndpoint) -> None:
    endpoint.replies = [400]
    client = client_of(endpoint, concurrency=1)
    gap, reply = client.ask([question(1), question(2)])
    assert isinstance(gap, NoReply)
    assert "status 400" in gap.reason
    assert reply == "compliance"
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_stops_everything(endpoint: StubEndpoint, status: int) -> None:
    endpoint.otherwise = status
    with pytest.raises(UserError, match=rf"refused the request .*status {status}.*; check the model's name.*OPENAI_AP"):
        client_of(endpoint, concurrency=2).ask([question(n) for n in range(50)])
    assert len(endpoint.asked) <= 4


def test_an_endpoint_that_is_down_is_not_asked_for_ever(endpoint: StubEndpoint) -> None:
    endpoint.otherwise = 500
    client = client_of(endpoint, max_tries=2, concurrency=4)
    found = client.ask([question(n) for n in range(100)])
    assert all(isinstance(gap, NoReply) for gap in found)
    assert found[-1] == NoReply("20 requests in a row got no reply")
    assert len(endpoint.asked) <= 2 * (20 + 4)
    endpoint.otherwise = "compliance"
    assert client.ask([question(99)]) == ["compliance"]


def check_budget(server: StubEndpoint, concurrency: int) -> None:
    """A reply costs 2 and may cost 8, of 20: the eighth could bring the cost above."""
    client = client_of(server, price_received=1e6, budget=20.0, concurrency=concurrency)
    found = client.ask([question(n) for n in range(30)])
    assert len(server.asked) == 7
    assert client.spent == 14
    assert sum(isinstance(reply, NoReply) for reply in found) == 23
    assert found[-1] == NoReply("the budget of 20 is spent")


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_budget_is_never_exceeded(endpoint: StubEndpoint, concurrency: int) -> None:
    check_budget(endpoint, concurrency)


def test_mutation_the_budget_forgets_what_is_under_way(endpoint: StubEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    async def reserve(self: ChatClient, most: Any) -> bool:
        self._reserved.append(self.config.cost(most))
        return self.spent < 20

    monkeypatch.setattr(ChatClient, "_reserve", reserve)
    with pytest.raises(AssertionError):
        check_budget(endpoint, 8)


def test_a_run_that_is_repeated_counts_what_was_spent_before(endpoint: StubEndpoint, tmp_path: Path) -> None:
    prices: dict[str, Any] = {"price_received": 1e6, "price_sent": 1e4, "budget": 20.0}
    first = client_of(endpoint, Transcript(tmp_path / "judge.jsonl"), **prices)
    first.ask([question(1), question(2)])
    assert first.spent == 2 * (2 + 1)  # two tokens received, a hundred sent
    again = client_of(endpoint, Transcript(tmp_path / "judge.jsonl"), **prices)
    assert again.spent == first.spent
    assert again.ask([question(1), question(2)]) == ["compliance"] * 2
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize(("failure", "cost"), [(500, 0), (429, 0), (hang, 8), (half_body, 8), ("of no use", 2)])
def test_attempts_count_where_they_may_have_been_billed(endpoint: StubEndpoint, failure: Reply, cost: float) -> None:
    endpoint.replies = [failure]
    client = client_of(endpoint, price_received=1e6, timeout=patience(failure))
    client.ask([question(1)], lambda reply: reply == "compliance")
    assert client.spent == cost + 2


@pytest.mark.parametrize("recorded", ["", "hm"])
def test_a_recorded_reply_of_no_use_is_asked_for_again(endpoint: StubEndpoint, recorded: str) -> None:
    transcript = Transcript()
    transcript.add(question(1), recorded)
    client = client_of(endpoint, transcript)
    assert client.ask([question(1)], lambda reply: reply == "compliance") == ["compliance"]


@pytest.mark.parametrize("usage", [{"prompt_tokens": None, "completion_tokens": 2}, {"prompt_tokens": 100}, {"x": 1}])
def test_a_good_reply_is_kept_whatever_usage_says(usage: dict[str, Any]) -> None:
    tried = chat_client._read(json.dumps({"choices": [{"message": {"content": "yes"}}], "usage": usage}))
    assert (tried.reply, tried.tokens) == ("yes", None)


def test_an_endpoint_that_counts_no_tokens_is_charged_as_many_as_there_can_be(endpoint: StubEndpoint) -> None:
    endpoint.usage = None
    client = client_of(endpoint, price_sent=1e6, price_received=1e6)
    client.ask([question("ü")])
    assert client.spent == len(json.dumps(question("ü")["messages"], ensure_ascii=False).encode()) + 8


def test_the_cost_is_said_before_anything_is_asked(endpoint: StubEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    client_of(endpoint).ask([question(0)])
    assert capsys.readouterr().err == ""
    client = client_of(endpoint, price_received=2e6, budget=500.0)
    client.ask([question(1), question(2)])
    client.ask([question(2)])
    assert capsys.readouterr().err == (
        f"trimtab: endpoint:m@{endpoint.url}: 2 requests cost at most 32 at 0 and 2e+06 per million tokens; "
        "0 was spent before, the budget is 500\n"
    )
    client.ask([question(3)])
    assert ": 1 requests cost at most 16 at" in capsys.readouterr().err


def test_a_budget_needs_to_know_how_long_a_reply_may_be(endpoint: StubEndpoint) -> None:
    with pytest.raises(UserError, match="a request under a budget: it has no max_tokens"):
        client_of(endpoint, price_received=1.0, budget=1.0).ask([{"model": "m", "messages": []}])


KILLED = """
import sys
from trimtab.judges import ChatClient, ChatConfig, Transcript
client = ChatClient(ChatConfig(model="m", base_url=sys.argv[1], concurrency=1), Transcript(sys.argv[2]))
print(client.ask([{"model": "m", "messages": [{"role": "user", "content": str(n)}]} for n in range(6)]))
"""


def test_a_run_that_is_killed_pays_for_nothing_twice(
    endpoint: StubEndpoint, tmp_path: Path, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    endpoint.replies = ["a", "b", "c", hang]
    command = [sys.executable, "-c", KILLED, endpoint.url, str(tmp_path / "judge.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    eventually(lambda: len(endpoint.asked) == 4)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    endpoint.replies = ["d", "e", "f"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(["a", "b", "c", "d", "e", "f"])
    assert [body["messages"][0]["content"] for body in endpoint.asked] == ["0", "1", "2", "3", "3", "4", "5"]


def test_it_works_where_an_event_loop_runs_already(endpoint: StubEndpoint) -> None:
    async def notebook() -> list[str | NoReply]:
        return client_of(endpoint).ask([question(1)])

    assert asyncio.run(notebook()) == ["compliance"]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": ""}, {"max_tries": 0}, {"first_wait": -1.0}, {"timeout": 0.0}, {"concurrency": 0},
        {"price_sent": -1.0}, {"price_received": float("nan")}, {"budget": 0.0}, {"budget": 3.0},
    ],
)  # fmt: skip
def test_bad_configs(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(UserError, match=f"{name} .*: it must be"):
        ChatConfig(**{"model": "m", **fields})

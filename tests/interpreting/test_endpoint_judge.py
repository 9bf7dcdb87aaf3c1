"""A chat model as a judge of features: what it is asked, what it replies, and every way in which a server fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stub_endpoint import (
    Handler,
    Reply,
    StubEndpoint,
    busy,
    cut_json,
    cut_short,
    half_body,
    hang_up,
    no_choices,
    no_json,
    null_content,
)

from trimtab.errors import UserError
from trimtab.interpreting import Exemplars, Meaning, Passage, Rating, ToRate, make_feature_judge
from trimtab.interpreting.judge import PaidJudge
from trimtab.interpreting.judges.endpoint import EndpointFeatureJudge, FeatureEndpointConfig
from trimtab.interpreting.judges.questions import marked, read_meaning, read_numbers, read_rating
from trimtab.judges import Transcript, Unjudged

SEA = Meaning(name="feature 3", text="ships and the sea")
PASSAGES = [Passage(tokens=("The ", "harbour")), Passage(tokens=("A ", "hill")), Passage(tokens=("Her ", "boat"))]
SHIP = ToRate(meaning=SEA, instruction="Describe a day.", text="A day at sea.", unsteered="A day.")


@pytest.fixture
def judge(endpoint: StubEndpoint, tmp_path: Path) -> EndpointFeatureJudge:
    """Waits for nothing."""

    async def no_wait(seconds: float) -> None:
        await asyncio.sleep(0)

    config = FeatureEndpointConfig(model="m", base_url=endpoint.url, max_tries=3, concurrency=1, timeout=5)
    return EndpointFeatureJudge(config, Transcript(tmp_path / "transcript.jsonl"), no_wait)


def asked(endpoint: StubEndpoint) -> list[list[str]]:
    return [[message["content"] for message in request["messages"]] for request in endpoint.asked]


def test_it_explains_by_windows_whose_firing_tokens_are_marked(
    endpoint: StubEndpoint, judge: EndpointFeatureJudge
) -> None:
    endpoint.otherwise = "Sure. <meaning>ships and\nthe sea</meaning>"
    one = Passage(tokens=(" Her", " har", "bour", " was", " cold"), activations=(0.0, 3.0, 2.0, 0.2, 0.0))
    exemplars = Exemplars(name="feature 3", has=(one,), lacks=(PASSAGES[1],))
    assert judge.explain([exemplars]) == [SEA]
    (messages,) = asked(endpoint)
    assert messages[1] == "fires: Her <<harbour>> was cold\n\ndoes not fire: A hill"
    assert judge.name == f"endpoint:m@{endpoint.url}"


def test_it_says_where_a_feature_fires_by_numbers(endpoint: StubEndpoint, judge: EndpointFeatureJudge) -> None:
    endpoint.replies = ["<fires>1, 3</fires>", "<fires>none</fires>"]
    first, second = judge.fires([SEA, Meaning(name="b", text="hills")], [PASSAGES, PASSAGES[:2]])
    assert [np.asarray(one).tolist() for one in (first, second)] == [[1, 0, 1], [0, 0]]
    assert "ships and the sea" in asked(endpoint)[0][0]
    assert asked(endpoint)[0][1] == "1. The harbour\n\n2. A hill\n\n3. Her boat"


def test_many_passages_go_in_several_requests(endpoint: StubEndpoint, judge: EndpointFeatureJudge) -> None:
    def reply(handler: Handler) -> None:
        question = endpoint.asked[-1]["messages"][1]["content"]
        there = [line.split(".")[0] for line in question.split("\n\n") if "sea" in line]
        handler.send(200, handler.completion(f"<fires>{', '.join(there) or 'none'}</fires>"))

    endpoint.otherwise = reply
    passages = [Passage(tokens=(f"{i} ", "sea" if i % 3 == 0 else "hill")) for i in range(31)]
    (found,) = judge.fires([SEA], [passages])
    assert np.flatnonzero(np.asarray(found)).tolist() == list(range(0, 31, 3))
    assert len(endpoint.asked) == 3


def test_three_questions_make_a_rating(endpoint: StubEndpoint, judge: EndpointFeatureJudge) -> None:
    """Mutation: scores stand in another order than they are asked for."""
    endpoint.replies = [f"<rating>{score}</rating>" for score in (2, 0, 1)]
    blank = ToRate(meaning=SEA, instruction="a", text=" \n", unsteered="b")
    assert judge.rate([blank, SHIP]) == [Rating(0, 0, 0), Rating(concept=2, instruction=0, fluency=1)]
    concept, instruction, fluency = asked(endpoint)
    assert "ships and the sea" in concept[0]
    assert "Describe a day." in instruction[1]
    assert "fluent" in fluency[0]
    assert all("A day at sea." in messages[1] for messages in (concept, instruction, fluency))


FAILURES: dict[str, Reply] = {
    "down": 503,
    "broken": 500,
    "busy": busy("0"),
    "hangs up": hang_up,
    "half a body": half_body,
    "half an object": cut_json,
    "no choices": no_choices,
    "nothing said": null_content,
    "a page": no_json,
    "blank": "  ",
    "nonsense": "As a language model, I love numbers: 2.",
    "half a reply": cut_short,
    "two answers": "<meaning>a</meaning><meaning>b</meaning><fires>1</fires><fires>2</fires>"
    "<rating>1</rating><rating>2</rating>",
    "no such answer": "<meaning> </meaning><fires>7</fires><rating>3</rating>",
}
ASK: dict[str, Callable[[EndpointFeatureJudge], object]] = {
    "explain": lambda judge: judge.explain([Exemplars(name="feature 3", has=(PASSAGES[0],), lacks=())])[0],
    "fires": lambda judge: judge.fires([SEA], [PASSAGES])[0],
    "rate": lambda judge: judge.rate([SHIP])[0],
}
RIGHT = "<meaning>ships and the sea</meaning><fires>2</fires><rating>1</rating>"


@pytest.mark.parametrize("question", ASK)
@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_is_asked_again_and_then_is_a_gap(
    endpoint: StubEndpoint, judge: EndpointFeatureJudge, question: str, failure: str
) -> None:
    """Mutation: a reply without the closing tag counts; nonsense counts as none of the passages, or as 0."""
    endpoint.replies = [FAILURES[failure]] * 2
    endpoint.otherwise = RIGHT
    found = ASK[question](judge)
    assert not isinstance(found, Unjudged)
    if question == "fires":
        assert np.asarray(found).tolist() == [0, 1, 0]
    else:
        assert found == {"explain": SEA, "rate": Rating(1, 1, 1)}[question]
    judge.transcript = Transcript()
    del judge.client
    endpoint.replies, endpoint.otherwise = [], FAILURES[failure]
    gap = ASK[question](judge)
    assert isinstance(gap, Unjudged)
    assert "no reply of use in 3 tries" in gap.reason


def test_one_gap_of_three_is_no_rating(endpoint: StubEndpoint, judge: EndpointFeatureJudge) -> None:
    endpoint.replies = ["<rating>2</rating>", "<rating>2</rating>"]
    endpoint.otherwise = "hm"
    assert isinstance(judge.rate([SHIP])[0], Unjudged)


def test_a_gap_in_some_passages_is_a_gap_in_all(endpoint: StubEndpoint, judge: EndpointFeatureJudge) -> None:
    endpoint.replies = ["<fires>1</fires>"]
    endpoint.otherwise = "hm"
    assert isinstance(judge.fires([SEA], [[PASSAGES[0]] * 20])[0], Unjudged)


def test_replies_are_kept_and_a_refused_key_stops(endpoint: StubEndpoint, judge: EndpointFeatureJudge) -> None:
    endpoint.otherwise = RIGHT
    ASK["fires"](judge)
    count = len(endpoint.asked)
    again = EndpointFeatureJudge(judge.config, Transcript(judge.transcript.path))
    ASK["fires"](again)
    assert len(endpoint.asked) == count
    endpoint.otherwise = 401
    with pytest.raises(UserError, match="the endpoint refused the request"):
        ASK["explain"](judge)


def test_the_price_is_said_before_and_the_budget_kept(
    endpoint: StubEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.otherwise = RIGHT
    name = f"endpoint:m@{endpoint.url}"
    judge = make_feature_judge(name, price_sent=1.0, price_received=1.0, budget=1e-9)
    assert isinstance(judge.rate([SHIP])[0], Unjudged)
    assert not endpoint.asked
    assert "3 requests cost at most" in capsys.readouterr().err
    assert isinstance(judge, PaidJudge)
    assert judge.left == 1e-9
    free = make_feature_judge(name, price_sent=1e6, price_received=1e6)
    assert isinstance(free, PaidJudge)
    assert free.left == float("inf")
    free.rate([SHIP])
    sent = [json.dumps(request["messages"], ensure_ascii=False).encode() for request in endpoint.asked]
    assert free.cost([SHIP]) == sum(map(len, sent)) + 3 * 120  # bytes, and tokens of three replies
    with pytest.raises(UserError, match="judge option 'model'"):
        make_feature_judge(name, model="other")


def test_the_transcript_of_a_judge_by_name(endpoint: StubEndpoint, tmp_path: Path) -> None:
    endpoint.otherwise = RIGHT
    make_feature_judge(f"endpoint:m@{endpoint.url}", transcript=tmp_path / "t.jsonl").rate([SHIP])
    assert len([json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]) == 3


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("<fires>1, 3</fires>", [0, 2]),
        ("I think <FIRES>None</FIRES>.", []),
        ("<fires>1, 3", None),
        ("<fires>1 and 3</fires>", None),
        ("<fires>4</fires>", None),
        ("<fires>0</fires>", None),
        ("<fires></fires>", None),
        ("none", None),
    ],
)
def test_numbers_in_a_reply(reply: str, found: list[int] | None) -> None:
    assert read_numbers(reply, 3) == found


def test_what_is_no_rating_or_meaning() -> None:
    assert [read_rating(f"<rating>{said}</rating>") for said in ("0", "2", "3", "1.5", "")] == [0, 2, None, None, None]
    assert read_meaning("<meaning>the sea") is None
    assert marked(Passage(tokens=("a ", "b"))) == "a b"

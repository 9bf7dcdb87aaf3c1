"""Ask a chat model behind an OpenAI-compatible endpoint many things at once, each paid for once. Extra `judge`.

The `openai` client's own retries are off: a reply that is cut short or of no use is asked for again like one that never
came, every try counts against the budget, and what gets no reply in the end is a `NoReply`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

from trimtab.errors import UserError
from trimtab.judges.transcript import Tokens, Transcript, request_key
from trimtab.runs import Meter, check_least, check_values

LONGEST_WAIT = 60.0
"""Seconds between two tries, unless the endpoint asks for more."""
LONGEST_WAIT_ASKED = 600.0
"""Seconds that an endpoint may ask for."""
GIVE_UP_AFTER = 20
"""Requests in a row without a reply, after which no other is sent."""


_Request = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Where a chat model is and how it is asked."""

    model: str
    """Name of the model, as the endpoint knows it."""
    base_url: str | None = None
    """Address of the endpoint up to `/v1`; None for the client's own default."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key. An endpoint of your own that needs none may leave it unset."""
    max_tries: int = 5
    """Attempts per request when the endpoint is busy, fails, cannot be reached or replies with nothing of use."""
    first_wait: float = 1.0
    """Seconds before the second attempt, less up to half of it at random; each later wait is twice as long, at most 60.
    What a busy endpoint asks for comes first."""
    timeout: float = 60.0
    """Seconds to wait for one reply."""
    concurrency: int = 8
    """Requests that are under way at once."""
    price_sent: float = 0.0
    """Price of a million tokens of requests, in any currency."""
    price_received: float = 0.0
    """Price of a million tokens of replies."""
    budget: float | None = None
    """What all replies may cost, those in the transcript counted in; asking stops before it is exceeded."""

    def __post_init__(self) -> None:
        check_values(self, "a name", bool, "model")
        check_least(self, 1, "max_tries", "concurrency")
        check_values(self, "0 to 3600 seconds", lambda seconds: 0 <= seconds < 3600, "first_wait")
        check_values(self, "above 0 seconds", lambda seconds: 0 < seconds < 86_400, "timeout")
        check_values(self, "0 or more", lambda price: 0 <= price < 1e9, "price_sent", "price_received")
        check_values(self, "above 0", lambda budget: budget > 0, "budget")
        check_values(self, "beside prices above 0", lambda _: self.price_sent + self.price_received > 0, "budget")

    @property
    def name(self) -> str:
        """`endpoint:MODEL@URL`."""
        return f"endpoint:{self.model}" + (f"@{self.base_url}" if self.base_url else "")

    def cost(self, tokens: Tokens) -> float:
        """What tokens cost, in the prices' currency."""
        return (tokens.sent * self.price_sent + tokens.received * self.price_received) / 1e6


class NoReply(NamedTuple):
    """A request that got no reply in the end."""

    reason: str


class _Try(NamedTuple):
    """What one attempt came to: a reply; or why there is none, whether to ask again, whether it may be billed."""

    reply: str | None = None
    tokens: Tokens | None = None
    """None where the endpoint does not say; then as many are counted as there can be."""
    reason: str = ""
    again: bool = True
    billed: bool = True
    wait: float = 0.0


class ChatClient:
    """Asks one model, and keeps every reply.

    Args:
        config: the model and how it is asked.
        transcript: where replies are kept and looked up.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        config: ChatConfig,
        transcript: Transcript | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.config, self.transcript, self.sleep = config, transcript or Transcript(), sleep
        self._billed_for_nothing = 0.0

    @property
    def spent(self) -> float:
        """The cost of all replies in the transcript, and of attempts that may have been billed without one."""
        return self.config.cost(self.transcript.tokens) + self._billed_for_nothing

    def ask(
        self, requests: Sequence[_Request], useful: Callable[[str], bool] = lambda reply: True
    ) -> list[str | NoReply]:
        """The replies to some requests, in order; what was asked before is not asked again.

        Args:
            requests: what `chat.completions.create` takes, model included. Under a budget `max_tokens` must be set.
            useful: whether a reply can be used. One that cannot is asked for again, and never kept.

        Raises:
            UserError: `openai` is not installed, there is no key, or the endpoint refuses the key or the model.
        """
        by_key = {request_key(request): request for request in requests}
        known = {key: self.transcript.find(request) for key, request in by_key.items()}
        replies: dict[str, str | NoReply] = {k: r for k, r in known.items() if r is not None and useful(r)}
        missing = {key: request for key, request in by_key.items() if key not in replies}
        if missing:
            self._announce(missing.values())
            replies |= _run(self._ask_all(missing, useful))
        return [replies[request_key(request)] for request in requests]

    async def _ask_all(
        self, missing: Mapping[str, _Request], useful: Callable[[str], bool]
    ) -> dict[str, str | NoReply]:
        self._free = asyncio.Semaphore(self.config.concurrency)
        self._settled = asyncio.Condition()
        self._reserved: list[float] = []
        self._without_reply = 0
        with Meter(f"asking {self.config.model}", len(missing)) as meter:
            try:
                async with self._connect() as client, asyncio.TaskGroup() as group:
                    tasks = {
                        key: group.create_task(self._ask(client, request, useful, meter))
                        for key, request in missing.items()
                    }
            except ExceptionGroup as errors:
                raise next((e for e in errors.exceptions if isinstance(e, UserError)), errors) from None
        return {key: task.result() for key, task in tasks.items()}

    async def _ask(self, client: Any, request: _Request, useful: Callable[[str], bool], meter: Meter) -> str | NoReply:
        c, tried, wait = self.config, _Try(), self.config.first_wait
        most = self._most(request)
        async with self._free:
            for attempt in range(c.max_tries):
                if self._without_reply >= GIVE_UP_AFTER:
                    return NoReply(f"{GIVE_UP_AFTER} requests in a row got no reply")
                if attempt:
                    await self.sleep(max(tried.wait, wait * random.uniform(0.5, 1)))
                    wait = min(LONGEST_WAIT, 2 * wait)
                if not await self._reserve(most):
                    return NoReply(f"the budget of {c.budget:g} is spent")
                tried = await self._try(client, request)
                if tried.reply is not None and not useful(tried.reply):
                    tried = tried._replace(reply=None, reason=f"it replied {tried.reply[:60]!r}")
                await self._settle(request, most, tried)
                if tried.reply is not None or not tried.again:
                    break
        meter.advance()
        if tried.reply is not None:
            self._without_reply = 0
            return tried.reply
        self._without_reply += tried.again
        tries = f" in {c.max_tries} tries" if tried.again else ""
        return NoReply(f"no reply of use{tries} ({tried.reason})")

    async def _try(self, client: Any, request: _Request) -> _Try:
        import openai

        try:
            async with asyncio.timeout(self.config.timeout):
                raw = await client.chat.completions.with_raw_response.create(**request)
        except (TimeoutError, openai.APITimeoutError):
            return _Try(reason=f"none within {self.config.timeout:g} s")
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            return _Try(reason=_in_one_line(cause), billed=not type(cause).__name__.startswith("Connect"))
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(
                f"judge {self.config.name}",
                f"the endpoint refused the request ({_in_one_line(error)})",
                f"check the model's name, the address and ${self.config.key_variable}",
            ) from error
        except openai.APIStatusError as error:
            again = error.status_code in (408, 409, 429) or error.status_code >= 500
            wait = _seconds(error.response.headers.get("retry-after"))
            return _Try(reason=_in_one_line(error), again=again, billed=False, wait=wait)
        return _read(raw.http_response.text)

    def _connect(self) -> Any:
        openai, c = import_client(), self.config
        key = os.environ.get(c.key_variable)
        if not key and c.base_url is None:
            raise UserError(
                f"judge {c.name}",
                f"${c.key_variable} is not set",
                "set it, or name an endpoint of your own (endpoint:MODEL@URL)",
            )
        return openai.AsyncOpenAI(api_key=key or "none", base_url=c.base_url, timeout=c.timeout, max_retries=0)

    def _most(self, request: _Request) -> Tokens:
        """The most tokens that a request can take: none is shorter than a byte."""
        if self.config.budget is not None and "max_tokens" not in request:
            raise UserError("a request under a budget", "it has no max_tokens", "say how long a reply may be")
        return Tokens(len(json.dumps(request["messages"], ensure_ascii=False).encode()), request.get("max_tokens", 0))

    async def _reserve(self, most: Tokens) -> bool:
        """Set aside what a request may cost, once those under way leave enough of the budget; False if they cannot."""
        cost, budget = self.config.cost(most), self.config.budget
        async with self._settled:
            while budget is not None and self.spent + sum(self._reserved) + cost > budget:
                if not self._reserved:
                    return False
                await self._settled.wait()
            self._reserved.append(cost)
            return True

    async def _settle(self, request: _Request, most: Tokens, tried: _Try) -> None:
        """Count what an attempt did cost in place of what it might have, and keep its reply."""
        tokens = tried.tokens or most
        async with self._settled:
            self._reserved.remove(self.config.cost(most))
            if tried.reply is not None:
                self.transcript.add(request, tried.reply, tokens)
            elif tried.billed:
                self._billed_for_nothing += self.config.cost(tokens)
            self._settled.notify_all()

    def cost(self, requests: Iterable[_Request]) -> float:
        """What single tries of some requests cost at most."""
        return sum(self.config.cost(self._most(request)) for request in requests)

    def _announce(self, requests: Collection[_Request]) -> None:
        """Say what they may cost, before they are asked."""
        c, most = self.config, self.cost(requests)
        if not c.price_sent + c.price_received:
            return
        budget = "" if c.budget is None else f", the budget is {c.budget:g}"
        print(
            f"trimtab: {c.name}: {len(requests):,} requests cost at most {most:.4g} at "
            f"{c.price_sent:g} and {c.price_received:g} per million tokens; {self.spent:.4g} was spent before{budget}",
            file=sys.stderr,
        )


def import_client() -> Any:
    """The `openai` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise UserError(
            "the endpoint judge", "it needs `openai`", "install it: pip install 'trimtab[judge]', or use the rules"
        ) from error
    return openai


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _read(body: str) -> _Try:
    try:
        found = json.loads(body)
        text, used = found["choices"][0]["message"]["content"], found.get("usage") or {}
        sent, received = used.get("prompt_tokens"), used.get("completion_tokens")
        tokens = Tokens(sent, received) if isinstance(sent, int) and isinstance(received, int) else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return _Try(reason=f"it sent {_in_one_line(body)[:60]!r}, which is not whole")
    if not isinstance(text, str) or not text.strip():
        return _Try(tokens=tokens, reason="it is empty")
    return _Try(text, tokens)


def _seconds(retry_after: str | None) -> float:
    try:
        return min(LONGEST_WAIT_ASKED, max(0.0, float(retry_after or 0)))
    except ValueError:
        return 0.0


def _in_one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


ConfigT = TypeVar("ConfigT", bound=ChatConfig)


@dataclass
class ChatJudge(Generic[ConfigT]):
    """What judges behind an endpoint have in common: one chat model, asked at temperature 0, whose replies are kept."""

    config: ConfigT
    transcript: Transcript = field(default_factory=Transcript)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    @property
    def name(self) -> str:
        """`endpoint:MODEL@URL`."""
        return self.config.name

    @cached_property
    def client(self) -> ChatClient:
        """What asks the model, and counts what it costs."""
        return ChatClient(self.config, self.transcript, sleep=self.sleep)

    def request(self, instruction: str, question: str, *, max_tokens: int) -> dict[str, Any]:
        """What the client sends: a system message, and what is asked."""
        return {
            "model": self.config.model,
            "temperature": 0,
            "max_tokens": max_tokens,
            "messages": [
                {"role": "system", "content": instruction},
                {"role": "user", "content": question},
            ],
        }

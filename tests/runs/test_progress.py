from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from trimtab.runs import Meter, progress

Eventually = Callable[[Callable[[], bool]], None]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called inside the test, since pytest sets stderr anew after fixtures have run."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with Meter("counting", 5) as meter:
        meter.advance(5)
    assert terminal.getvalue() == ""


def test_long_work_shows_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch, eventually: Eventually) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 0.05)

    def shows(text: str) -> bool:
        return text in terminal.getvalue()

    with Meter("ranking features", 10) as outer:
        outer.advance(3)
        eventually(lambda: shows("ranking features") and shows("3/10"))
        with Meter("inner", 2):
            eventually(lambda: shows("inner"))
        outer.describe("ranking more")
        outer.advance()
        eventually(lambda: shows("ranking more") and shows("4/10"))
    assert progress._screen._progress is None


def test_work_without_steps_still_shows(monkeypatch: pytest.MonkeyPatch, eventually: Eventually) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 0.05)
    with Meter("converting the model"):
        eventually(lambda: "converting the model" in terminal.getvalue())


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], eventually: Eventually
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.1)
    with Meter("training", 100) as meter:
        meter.advance(25)
        eventually(lambda: log.getvalue().count("\n") >= 2)
    assert capsys.readouterr().out == ""
    lines = log.getvalue().splitlines()
    assert all(re.fullmatch(r"training: 25/100 \(25%, \d+ s(, \d+ s left)?\)", line) for line in lines)


def test_short_work_logs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("counting", 3) as meter:
        meter.advance(3)
    assert capsys.readouterr().err == ""


def test_the_watcher_ends_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter("failing", 2)

    def fail() -> None:
        with meter:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert meter._watcher is not None
    assert not meter._watcher.is_alive()


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds)


def test_what_is_left_counts_down_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 100.0)
    meter = Meter("trying features", 4)
    at(monkeypatch, 110.0)
    assert meter.line() == "trying features: 0/4 (0%, 10 s)"
    meter.advance()
    lines = []
    for seconds in (110.0, 125.0, 138.0, 150.0):
        at(monkeypatch, seconds)
        lines.append(meter.line())
    assert [line.rpartition(", ")[2] for line in lines] == ["30 s left)", "15 s left)", "2 s left)", "50 s)"]


def test_where_more_comes_than_was_known_the_total_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 0.0)
    meter = Meter("answering", 4)
    at(monkeypatch, 10.0)
    meter.advance(6)
    assert meter.line() == "answering: 6/6 (100%, 10 s)"


def test_parts_of_steps_count(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 0.0)
    meter = Meter("trying features", 2)
    at(monkeypatch, 3.0)
    for _ in range(3):
        meter.advance(0.1)
    assert meter.line() == "trying features: 0/2 (15%, 3 s, 17 s left)"
    for _ in range(7):
        meter.advance(0.1)
    assert meter.completed < 1
    assert meter.line().startswith("trying features: 1/2 (50%")


def test_what_was_done_before_does_not_count_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 0.0)
    meter = Meter("training", 100, done=90)
    assert meter.line() == "training: 90/100 (90%, 0 s)"
    at(monkeypatch, 5.0)
    meter.advance(5)
    assert meter.line() == "training: 95/100 (95%, 5 s, 5 s left)"


class Shown:
    """What a notebook shows at one place, as it was updated."""

    def __init__(self, data: dict[str, str]) -> None:
        self.states = [data]

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.states.append(data)


def test_a_notebook_has_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch, eventually: Eventually) -> None:
    places: list[Shown] = []

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Shown:
        assert raw
        assert display_id
        places.append(Shown(data))
        return places[-1]

    ipython, displaying = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    displaying.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", displaying)
    with Meter("quick"):
        pass
    assert places == []
    monkeypatch.setattr(progress, "DELAY", 0.01)
    monkeypatch.setattr(progress, "NOTEBOOK_INTERVAL", 0.01)
    with Meter("ranking <features>", 10) as meter:
        eventually(lambda: bool(places))
        meter.advance(3)
        eventually(lambda: "3/10" in places[0].states[-1]["text/plain"])
    shown = next(state["text/html"] for state in places[0].states if "3/10" in state["text/plain"])
    assert shown.startswith('<progress value="0.300"></progress> ranking &lt;features&gt;: 3/10')
    assert places[0].states[-1] == {"text/plain": "", "text/html": ""}
    assert len(places) == 1

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from trimtab.runs import Meter, progress, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called inside the test, since pytest sets stderr anew after fixtures have run."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def await_bar(meter: Meter) -> None:
    """Wait until the bar is there (on a busy machine importing its library takes a while)."""
    patience = time.monotonic() + 20
    while meter._task is None and time.monotonic() < patience:
        time.sleep(0.02)
    time.sleep(0.3)


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    assert list(track(range(5), "counting")) == list(range(5))
    assert terminal.getvalue() == ""


def test_long_work_shows_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 0.05)
    with Meter("ranking features", 10) as outer:
        outer.advance(3)
        await_bar(outer)
        with Meter("inner", 2) as inner:
            await_bar(inner)
        outer.describe("ranking more")
        outer.advance()
        time.sleep(0.3)
    shown = terminal.getvalue()
    assert "ranking features" in shown
    assert "3/10" in shown
    assert "inner" in shown
    assert "ranking more" in shown
    assert "4/10" in shown
    assert progress._screen._progress is None


def test_work_without_steps_still_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 0.05)
    with Meter("converting the model") as meter:
        await_bar(meter)
    assert "converting the model" in terminal.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.1)
    with Meter("training", 100) as meter:
        meter.advance(25)
        time.sleep(0.35)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines
    assert all(re.fullmatch(r"training: 25/100 \(25%, \d+ s, \d+ s left\)", line) for line in lines)


def test_short_work_logs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(track((i for i in range(3)), "counting", total=3)) == 3
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

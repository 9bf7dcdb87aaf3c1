"""Progress, only where it helps: for what takes more than a second a bar in terminal and notebook, else a line now and
then on stderr."""

from __future__ import annotations

import html
import math
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DELAY = 1.0
"""Seconds after which a terminal shows the bar."""
NOTEBOOK_INTERVAL = 0.5
"""Seconds after which a notebook's bar is drawn anew."""
LOG_INTERVAL = 10.0
"""Seconds between lines where stderr is not a terminal."""


class Meter:
    """A task of `total` steps, or of unknown length. Use it as a context manager and call `advance`.

    Args:
        description: what is being done, in a few words.
        total: number of steps; None shows activity without a share.
        done: steps that were done before, by which the speed is not judged.
    """

    def __init__(self, description: str, total: float | None = None, done: float = 0.0) -> None:
        self.description = description
        self.total = total
        self.completed = done
        self._before = done
        self._started = self._advanced = time.monotonic()
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self._task: TaskID | None = None
        self._guard = threading.Lock()

    def advance(self, steps: float = 1.0) -> None:
        """Count `steps` more as done; parts of a step count, too."""
        self.completed += steps
        if self.total:
            self.total = max(self.total, self.completed)  # there was more to do than was known
        self._advanced = time.monotonic()
        with self._guard:
            if self._task is not None:
                _screen.update(self._task, completed=self.completed, total=self.total)

    def describe(self, description: str) -> None:
        """Change the words beside the bar."""
        self.description = description
        with self._guard:
            if self._task is not None:
                _screen.update(self._task, description=description)

    def line(self) -> str:
        """The state in one line, as a log shows it."""
        elapsed = time.monotonic() - self._started
        whole = math.floor(self.completed + 1e-6)  # parts of a step may not add up to the last bit
        if not self.total:
            done = f" {whole}" if whole else ""
            return f"{self.description}:{done} ({elapsed:.0f} s)"
        share = self.completed / self.total
        return f"{self.description}: {whole}/{self.total:g} ({share:.0%}, {elapsed:.0f} s{self._left()})"

    def _left(self) -> str:
        """How long the rest takes at the speed up to the last advance, less what has passed since.

        Nothing is said where that time is over: the last steps are slower, or something else follows them.
        """
        steps = self.completed - self._before
        if not self.total or not steps:
            return ""
        took, since = self._advanced - self._started, time.monotonic() - self._advanced
        left = took * (self.total - self.completed) / steps - since
        return f", {left:.0f} s left" if left >= 0.5 else ""

    def __enter__(self) -> Meter:
        self._started = self._advanced = time.monotonic()
        watch = self._show_later if sys.stderr.isatty() else self._log_now_and_then
        watch = self._show_in_notebook if _in_notebook() else watch
        self._watcher = threading.Thread(target=watch, daemon=True, name="trimtab-progress")
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join()
        with self._guard:
            if self._task is not None:
                _screen.remove(self._task)
                self._task = None

    def _show_later(self) -> None:
        if not self._stop.wait(DELAY):
            with self._guard:
                self._task = _screen.add(self.description, self.total, self.completed)

    def _show_in_notebook(self) -> None:
        """A bar in the output of the cell, which goes when the work is done."""
        if self._stop.wait(DELAY):
            return
        from IPython.display import display  # pyright: ignore

        shown: Any = display(self._in_html(), raw=True, display_id=True)  # pyright: ignore
        while not self._stop.wait(NOTEBOOK_INTERVAL):
            shown.update(self._in_html(), raw=True)
        shown.update({"text/plain": "", "text/html": ""}, raw=True)

    def _in_html(self) -> dict[str, str]:
        share = f' value="{self.completed / self.total:.3f}"' if self.total else ""
        return {"text/plain": self.line(), "text/html": f"<progress{share}></progress> {html.escape(self.line())}"}

    def _log_now_and_then(self) -> None:
        while not self._stop.wait(LOG_INTERVAL):
            print(self.line(), file=sys.stderr, flush=True)


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this."""
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


class _Screen:
    """All bars that are visible now, drawn together; nothing is drawn while there is none."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._guard = threading.Lock()

    def add(self, description: str, total: float | None, completed: float) -> TaskID:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Left(TimeRemainingColumn):
            def render(self, task: Task) -> Text:
                return Text("") if task.finished else super().render(task)

        with self._guard:
            if self._progress is None:
                text = TextColumn("[progress.description]{task.description}")
                columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Left())
                self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
                self._progress.start()
            return self._progress.add_task(description, total=total, completed=int(completed))

    def update(self, task: TaskID, **changed: Any) -> None:
        if self._progress is not None:
            self._progress.update(task, **changed)

    def remove(self, task: TaskID) -> None:
        with self._guard:
            if self._progress is None:
                return
            self._progress.remove_task(task)
            if not self._progress.tasks:
                self._progress.stop()
                self._progress = None


_screen = _Screen()

"""Say on stderr what a slow step is doing: a bar on a terminal, a line at once and now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trimtab.runs import Meter


@contextmanager
def stage(
    text: str, *, total: float | None = None, shown: bool = True, line: bool = True
) -> Iterator[Callable[[float], None]]:
    """Show a step while it runs.

    Args:
        text: what is being done.
        total: size of the work in any unit; None if it cannot be told.
        shown: False for silence.
        line: where stderr is no terminal, write `text` at once (False for steps of a few seconds).

    Yields:
        A function to call with how much is done so far.
    """
    if not shown:
        yield lambda done: None
        return
    if line and not sys.stderr.isatty():
        print(f"trimtab: {text}", file=sys.stderr, flush=True)
    with Meter(text, total) as meter:
        yield lambda done: meter.advance(done - meter.completed)

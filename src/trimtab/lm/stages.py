"""Say on stderr what a slow step is doing: a moving bar on a terminal, one line elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stage(text: str, *, total_bytes: int = 0, shown: bool = True, line: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a step while it runs.

    Args:
        text: what is being done.
        total_bytes: size of the work, for a bar with a share and a rate; a bar without an end if 0.
        shown: False for silence.
        line: where stderr is no terminal, write `text` as one line (False for steps of a few seconds).

    Yields:
        A function to call with the bytes done so far.
    """
    if not shown or not sys.stderr.isatty():
        if shown and line:
            print(f"trimtab: {text}", file=sys.stderr, flush=True)
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if total_bytes:
        columns.append(DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=total_bytes or None)
        yield lambda done: progress.update(task, completed=done)

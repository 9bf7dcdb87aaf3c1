"""`report.html` of a run, by the command that made it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trimtab.errors import UserError
from trimtab.report.circuit_page import circuit_page
from trimtab.report.dictionary_pages import core_page, rank_page, train_page
from trimtab.report.policy_page import policy_page
from trimtab.report.run_files import REPORT_NAME, RunFiles
from trimtab.report.shown_page import feature_page, shown_page
from trimtab.report.steer_page import steer_page
from trimtab.runs import write_text

PAGES: dict[str, Callable[[RunFiles], str]] = {
    "demo": partial(shown_page, title="What brings three wishes about in {model}?"),
    "train": train_page,
    "rank": rank_page,
    "find": partial(shown_page, title="What brings a wish about in {model}"),
    "evaluate wishes": partial(shown_page, title="What brings a wish about in {model}"),
    "autointerp": partial(shown_page, title="Where features fire, told by {judge}: {model}"),
    "evaluate judge": partial(shown_page, title="How often the judge {judge} is right"),
    "evaluate axbench": partial(shown_page, title="What brings concepts about in {model}?"),
    "steer": steer_page,
    "feature": feature_page,
    "evaluate core": core_page,
    "evaluate circuit": circuit_page,
    "evaluate ioi": partial(shown_page, title="Dictionaries beside supervised codes: {model}"),
    "study ioi": partial(shown_page, title="Supervised feature dictionaries: {model}"),
    "study utility": partial(shown_page, title="Interpretability against utility"),
    "flags train": partial(shown_page, title="Flags finetuned into {model}"),
    "flags evaluate": partial(shown_page, title="Flags in {model}"),
    "flags steer": steer_page,
    "policy train": policy_page,
    "policy evaluate": policy_page,
}
"""Pages by the command whose runs they show."""


def write_report(run: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run's directory, from what the run holds and nothing else.

    Prompts and answers of tasks with harmful texts are left out: features and positions stand in their place.

    Returns:
        The file.

    Raises:
        UserError: there is no run, it is of a command without a page, one of its files is damaged, or the disk refuses.
    """
    files = RunFiles(Path(run))
    command = files.record["command"]
    if command not in PAGES:
        raise UserError(
            f"run {run}", f"it belongs to `{command}`, which has no page", f"name a run of {', '.join(PAGES)}"
        )
    path = files.path / REPORT_NAME
    write_text(path, PAGES[command](files))
    return path

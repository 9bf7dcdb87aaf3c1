"""`report.html` of a run, by the command that made it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from trimtab.errors import UserError
from trimtab.report.circuit_page import circuit_page
from trimtab.report.dictionary_pages import core_page, rank_page, train_page
from trimtab.report.policy_page import policy_page
from trimtab.report.run_files import REPORT_NAME, RunFiles
from trimtab.report.shown_page import (
    autointerp_page,
    axbench_page,
    demo_page,
    feature_page,
    find_page,
    flags_evaluate_page,
    flags_train_page,
    ioi_page,
    ioi_study_page,
    judge_page,
    utility_study_page,
)
from trimtab.report.steer_page import steer_page
from trimtab.runs import write_text

PAGES: dict[str, Callable[[RunFiles], str]] = {
    "demo": demo_page,
    "train": train_page,
    "rank": rank_page,
    "find": find_page,
    "evaluate wishes": find_page,
    "autointerp": autointerp_page,
    "evaluate judge": judge_page,
    "evaluate axbench": axbench_page,
    "steer": steer_page,
    "feature": feature_page,
    "evaluate core": core_page,
    "evaluate circuit": circuit_page,
    "evaluate ioi": ioi_page,
    "study ioi": ioi_study_page,
    "study utility": utility_study_page,
    "flags train": flags_train_page,
    "flags evaluate": flags_evaluate_page,
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

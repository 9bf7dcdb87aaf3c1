"""Pages of runs that keep what they show: a section for each result, with its line, figures and tables."""

from __future__ import annotations

import base64

from markupsafe import Markup

from trimtab.report.page import Figure, render
from trimtab.report.run_files import RunFiles
from trimtab.runs import read_json, read_typed
from trimtab.runs.shown import SHOWN_FILE, Shown, ShownFigure


def shown_page(files: RunFiles, title: str) -> str:
    """The sections of a run's `shown.json` under a title.

    Raises:
        UserError: the run has not finished, or the file is damaged.
    """
    _ = files.finished
    path = files.path / SHOWN_FILE
    sections = read_typed(tuple[Shown, ...], read_json(path), f"file {path}")
    return render(
        "shown",
        files=files,
        lead=files.lead,
        title=title,
        sections=[
            {
                "title": section.title,
                "headline": section.headline,
                "tables": [(shown.title, shown.table()) for shown in section.tables],
                "figures": [_figure(drawn) for drawn in section.figures],
            }
            for section in sections
        ],
    )


def ioi_page(files: RunFiles) -> str:
    """Dictionaries beside supervised codes."""
    return shown_page(files, f"Dictionaries beside supervised codes: {files.finished['model']}")


def ioi_study_page(files: RunFiles) -> str:
    """The whole study."""
    return shown_page(files, f"Supervised feature dictionaries: {files.finished['model']}")


def flags_train_page(files: RunFiles) -> str:
    """A finetuning with flags."""
    return shown_page(files, f"Flags finetuned into {files.finished['model']}")


def flags_evaluate_page(files: RunFiles) -> str:
    """Finetunings with flags side by side."""
    return shown_page(files, f"Flags in {files.finished['model']}")


def _figure(drawn: ShownFigure) -> Figure:
    """The drawing as an image, in which nothing runs whatever the file holds."""
    data = base64.b64encode(drawn.svg.encode()).decode()
    return Figure(
        drawing=Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(drawn.caption, data),
        caption=drawn.caption,
    )

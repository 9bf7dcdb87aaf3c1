"""Pages of runs that keep what they show: a section for each result, with its line, figures and tables."""

from __future__ import annotations

import base64
import math
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from trimtab.report.page import Figure, number, render, visible
from trimtab.report.run_files import RunFiles
from trimtab.runs import read_json, read_typed
from trimtab.runs.shown import SHOWN_FILE, Shown, ShownFigure, ShownText
from trimtab.runs.tables import Cell, Column, Table

SHADES = 4
"""Colours of marked tokens."""
NAMED = 8
"""Features that a title names."""


def shown_page(files: RunFiles, title: str) -> str:
    """The sections of a run's `shown.json` under a title.

    Args:
        files: the run.
        title: fields of the run's results stand in it by their names in braces.

    Raises:
        UserError: the run has not finished, or the file is damaged.
    """
    title = title.format_map(files.finished)
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
                "yes": section.yes,
                "tables": [(shown.title, _linked(files, shown.table())) for shown in section.tables],
                "figures": [_figure(drawn) for drawn in section.figures],
                "texts": [_text(text) for text in section.texts],
                "anchor": section.anchor,
            }
            for section in sections
        ],
    )


def feature_page(files: RunFiles) -> str:
    """All about some features."""
    named = ", ".join(str(one["feature"]) for one in files.finished["profiles"][:NAMED])
    return shown_page(files, f"What is feature {named}{', …' * (len(files.finished['profiles']) > NAMED)}?")


def _linked(files: RunFiles, table: Table) -> Table:
    """A table whose column `feature`, of ids or of SITE:ID, leads to the pages that the run has of them."""

    def link(column: Column) -> Column:
        def value(row: Any) -> Cell:
            cell = column.cell(row)
            site, _, feature = str(cell).rpartition(":")
            return files.feature_link(int(feature), str(cell), site) if feature.isdigit() else cell

        return replace(column, value=value) if column.title == "feature" else column

    return replace(table, columns=[link(column) for column in table.columns])


def _text(text: ShownText) -> dict[str, Any]:
    """A text's label, and its tokens, each with the class that colours it and what is said when one points at it."""
    shades = [math.ceil(SHADES * min(max(value, 0.0) / (text.largest or 1.0), 1.0)) for value in text.values]
    tokens = [
        {"text": visible(token), "class": f"k k{shade}", "title": number(value, ".3g")}
        for token, value, shade in zip(text.tokens, text.values, shades, strict=True)
    ]
    return {"label": text.label, "tokens": tokens}


def _figure(drawn: ShownFigure) -> Figure:
    """The drawing as an image, in which nothing runs whatever the file holds."""
    data = base64.b64encode(drawn.svg.encode()).decode()
    return Figure(
        drawing=Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(drawn.caption, data),
        caption=drawn.caption,
    )

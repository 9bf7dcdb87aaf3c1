"""The page of `trimtab evaluate circuit`."""

from __future__ import annotations

from trimtab.report.page import figure, number, render
from trimtab.report.run_files import RunFiles
from trimtab.runs.circuit_tables import (
    completeness_table,
    drawn_heads,
    faithfulness_table,
    heads_table,
    knock_out_points,
    minimality_table,
)
from trimtab.runs.figures import plot_heads, plot_points


def circuit_page(files: RunFiles) -> str:
    """Which heads answer, what each does, how much of the answer they bring about, and what they lack."""
    results = files.finished
    circuit, measured, completeness = results["circuit"], results["faithfulness"], results["completeness"]
    beaten = sum(measured["normalised"]["low"] > found for found in measured["random"])
    n_random, share = len(measured["random"]), number(measured["normalised"], ".2f")
    beside = f", more than {beaten} of {n_random} random circuits of their size" if n_random else ""
    return render(
        "circuit",
        files=files,
        lead=files.lead,
        title=f"Which heads of {circuit['model']} solve IOI?",
        verdict_text=f"{measured['n_heads']} heads bring about {share} of the answer{beside}.",
        good=0 < n_random == beaten,
        circuit=circuit,
        drawing=figure(
            plot_heads, "The circuit", "Heads by layer and number; larger circles have larger effects.", height=3.4,
            heads=drawn_heads(circuit["heads"]),
        ),
        heads=heads_table(circuit),
        measures=faithfulness_table(measured),
        knock_outs=figure(
            plot_points, "Completeness",
            "Logit differences when the same heads are taken from the circuit and from the model. A complete circuit "
            "lies on the line.",
            height=3.4, points=knock_out_points(completeness), x_axis="model without the heads",
            y_axis="circuit without them",
        ),
        completeness=completeness_table(completeness),
        minimality=minimality_table(completeness),
    )  # fmt: skip

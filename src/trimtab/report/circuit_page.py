"""The page of `trimtab evaluate circuit`."""

from __future__ import annotations

from trimtab.report.page import figure, number, render
from trimtab.report.run_files import RunFiles
from trimtab.runs.figures import Head, plot_heads
from trimtab.runs.tables import Column, Table


def circuit_page(files: RunFiles) -> str:
    """Which heads answer, what each does, and how much of the answer they bring about."""
    results = files.finished
    circuit, measured = results["circuit"], results["faithfulness"]
    beaten = sum(measured["normalised"]["low"] > found for found in measured["random"])
    n_random, share = len(measured["random"]), number(measured["normalised"], ".2f")
    beside = f", more than {beaten} of {n_random} random circuits of their size" if n_random else ""
    effects = [head["effect"]["estimate"] if head["effect"] else None for head in circuit["heads"]]
    drawn = [
        Head(head["layer"], head["head"], head["role"], effect)
        for head, effect in zip(circuit["heads"], effects, strict=True)
    ]
    values = {
        "Plain model": "full", "Every head at its mean": "none", "The circuit alone": "circuit",
        "The model without the circuit": "without", "Circuit / model": "faithfulness",
        "Between none (0) and model (1)": "normalised",
    }  # fmt: skip
    heads = [
        Column("Head", lambda head: f"{head['layer']}.{head['head']}"), Column("Role", "role"),
        Column("Effect", "effect", "+.3f", note="logits"), Column("Attention", "attention", ".2f"),
    ]  # fmt: skip
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
            heads=drawn,
        ),
        heads=Table(columns=heads, rows=circuit["heads"]),
        measures=Table(
            columns=[Column("Logit difference, right name minus wrong one", "what"), Column("Value", "value", ".3f")],
            rows=[{"what": what, "value": measured[name]} for what, name in values.items()],
            caption=f"{measured['full']['n']} prompts that found no head.",
        ),
    )  # fmt: skip

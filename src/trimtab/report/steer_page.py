"""The page of `trimtab steer` and of `flags steer`: unsteered and steered texts, and what was done at each token."""

from __future__ import annotations

from trimtab.report.page import render
from trimtab.report.run_files import RunFiles
from trimtab.runs.tables import COUNT, INTERVAL, Column, Table, in_short


def steer_page(files: RunFiles) -> str:
    """Texts by dose, their doses and divergences."""
    results = files.finished
    ordinary = results.get("ordinary")
    fluent = [
        Column("Ordinary texts", "fluency.ordinary", INTERVAL, note="share"),
        Column("4-gram repetition", "fluency.repetition", INTERVAL, note="share"),
        Column("Fluency", lambda arm: "broken" if arm["fluency"]["broken"] else ""),
    ]
    said = "" if ordinary is None else (
        f" Ordinary: a text whose negative log-likelihood under the unsteered model is from {ordinary['low']:.2f} to "
        f"{ordinary['high']:.2f} nats per token and whose share of repeated 4-grams is at most "
        f"{ordinary['repetition']:.2f}, as those of {ordinary['n_own'] + ordinary['n_neutral']} unsteered texts are."
    )  # fmt: skip
    doses = Table(
        columns=[
            Column("Arm", "name"),
            Column("Edits", "realised.n_edits", COUNT),
            Column("‖Δ‖/‖x‖", "realised.relative", INTERVAL),
            Column("KL local", "kl_local", INTERVAL, note="nats per token"),
            Column("KL total", "kl_total", INTERVAL, note="nats per token"),
            Column("NLL unsteered", "unsteered_nll", INTERVAL, note="nats per token"),
            *([] if ordinary is None else fluent),
            *([Column("Wish", "score", INTERVAL, note=results["score_unit"])] if results.get("score_unit") else []),
        ],
        rows=results["arms"],
        caption="What was done, means over tokens. KL local: to the same token without its own edit; total: to the "
        f"unsteered model.{said}",
    )
    texts = [
        {
            "prompt": results["prompts"][one["prompt"]],
            "sample": one["sample"],
            "arms": [(arm["name"], arm["continuations"][i]["text"]) for arm in results["arms"]],
        }
        for i, one in enumerate(results["arms"][0]["continuations"])
    ]
    features = ", ".join(map(files.feature, results["features"]))
    what = f"feature {features}" if features else results["steered_with"]
    return render(
        "steer",
        files=files,
        title=f"What does steering with {what} write?",
        sites=in_short(results["site"].split(", "), "sites"),
        results=results,
        words=[files.feature_link(i) for i in results["features"]] or results.get("words", []),
        doses=doses,
        texts=texts,
    )

"""Results as Markdown, for `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Mapping

from sae_training.turns import Measured, ratios


def training_table(title: str, measured: Mapping[str, Measured]) -> str:
    """One comparison: rates, ratios, memory, and what the SAEs came to."""
    ours = measured["ours"]
    head = (
        "",
        "rows per second",
        "trimtab over it",
        "range",
        "per CPU second",
        "explained variance",
        "L0",
        "peak MiB",
        "of them before",
    )
    rows = [head, ("---",) * len(head)]
    for name, one in measured.items():
        ratio = ratios(ours, one)
        outcome = one.outcome
        rows.append(
            (
                {"ours": "trimtab", "floor": "encoder's product"}.get(name, f"{name} {outcome.version}"),
                f"{one.rate.median:,.0f}",
                "" if name == "ours" else f"{ratio.median:.2f}",
                "" if name == "ours" else f"{ratio.lowest:.2f} to {ratio.highest:.2f}",
                f"{one.cpu_rate:,.0f}",
                "" if name == "floor" else f"{outcome.explained_variance:.3f}",
                "" if name == "floor" else f"{outcome.l0:.1f}",
                f"{outcome.peak_mib:,.0f}",
                f"{outcome.baseline_mib:,.0f}",
            )
        )
    return "\n".join([f"\n### {title}\n", *("| " + " | ".join(row) + " |" for row in rows)])

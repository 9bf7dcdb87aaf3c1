"""What was found as a steering that can be taken away."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.finding.result import Found
from trimtab.lm import DecodeConfig, LanguageModel, decode
from trimtab.steering import Evidence, Steering

PROMPTS, TOKENS = 8, 16
"""Of the texts over which the typical ‖x‖ is the median."""


def steering_of(found: Found, model: LanguageModel, prompts: Sequence[str]) -> Steering:
    """What was found as a steering, with its evidence and the typical ‖x‖ at its sites on neutral text.

    Args:
        found: by the model, with its source.
        model: the model.
        prompts: neutral ones.

    Raises:
        UserError: features are removed whose codes depend on all others of the SAE.
    """
    ids = [model.encode_text(text) for text in prompts[:PROMPTS]]
    edits = decode(model, ids, DecodeConfig(max_new_tokens=TOKENS), found.source).edits
    norms = {str(s): float(edits.x_norm[edits.site == i].median()) for i, s in enumerate(found.source.sites)}
    doubt = "" if found.yes else " (not shown to serve the wish)"
    return Steering.of(
        model,
        found.source,
        about=f"{found.about or found.wish}: {found.found.label}{doubt}",
        made_by="find",
        evidence=evidence_of(found),
        norms=norms,
    )


def evidence_of(found: Found) -> list[Evidence]:
    """What was measured of what was found, on what chose nothing."""
    way, random = found.found, found.random
    on = f"{found.counts['report']} examples that chose nothing"
    evidence = [
        Evidence(name="effect on the wish", value=way.shown.effect, unit=found.unit, note=on),
        Evidence(name="KL to unsteered", value=way.shown.kl, unit="nats per token", note="neutral prompts"),
    ]
    if random.equal_dose is not None:
        evidence.append(
            Evidence(
                name="effect of random features", value=random.equal_dose.effect, unit=found.unit,
                note=f"chosen likewise, at equal dose, {on}",
            )
        )  # fmt: skip
    if (change := way.written.change) is not None:
        doubt = "" if change.low > 0 else "; it does not show the wish"
        note = f"read by {found.judge.name}, neutral prompts{doubt}"
        evidence.append(Evidence(name="change in texts", value=change, note=note))
    return evidence

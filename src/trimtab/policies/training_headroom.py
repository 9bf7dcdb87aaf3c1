"""Headroom beside a training: the lines that its policy stands between, in the run's `headroom.json`."""

from __future__ import annotations

import json

from trimtab.policies.episodes import Episodes
from trimtab.policies.headroom import headroom, headroom_table
from trimtab.policies.headroom_command import HeadroomResult
from trimtab.policies.setup import Setup
from trimtab.runs import Meter, Run, json_safe, write_json

HEADROOM_FILE = "headroom.json"


def training_headroom(setup: Setup, run: Run, validation: Episodes) -> tuple[str, ...]:
    """Measure headroom on the first validation items, unless the run holds it already.

    Args:
        setup: of the training; its config says how many items (0: nothing is done).
        run: open; gets `headroom.json`, as `trimtab policy headroom --out` writes it.
        validation: the training's validation items.

    Returns:
        What speaks against training here.
    """
    config = setup.config
    if not config.headroom_items:
        return ()
    if validation.max_new_tokens != 1:
        return (f"headroom was not measured: answers take up to {validation.max_new_tokens} tokens, not one",)
    path = run.file(HEADROOM_FILE)
    if not path.exists():
        few = validation.take(range(min(config.headroom_items, len(validation))))
        with Meter("trying features", len(few)) as meter:
            table = headroom_table(
                setup.model, setup.sae, few, site=setup.site, dose=config.dose, unit=config.unit, mask=setup.mask(),
                seed=config.seed, progress=meter.advance,
            )  # fmt: skip
        line = headroom(
            table, site=str(setup.site), dose=config.dose, unit=config.unit, mask=config.mask, seed=config.seed
        )
        result = HeadroomResult(task=setup.task.name, model=setup.model.name, split="validation", lines=(line,))
        write_json(path, json_safe(result.to_json()))
    lines = json.loads(path.read_text(encoding="utf-8"))["lines"]
    return tuple(dict.fromkeys(warning for line in lines for warning in line["warnings"]))

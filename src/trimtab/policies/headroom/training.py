"""Headroom beside a training: the lines that its policy stands between, in the run's `headroom.json`."""

from __future__ import annotations

import json

from trimtab.control.task_prompts import TaskPrompts
from trimtab.errors import UserError
from trimtab.policies.file_names import HEADROOM_FILE
from trimtab.policies.headroom.candidates import NothingAllowedError
from trimtab.policies.headroom.lines import headroom
from trimtab.policies.headroom.result import HeadroomResult
from trimtab.policies.headroom.trials import allowed_at_first, own_headroom
from trimtab.policies.setup import Setup
from trimtab.runs import Run, write_json

PROMPTS_TOGETHER = 16
ITEMS = 8
"""Items for one-token answers, if nothing else was asked for."""


def training_headroom(setup: Setup, run: Run, validation: TaskPrompts) -> tuple[str, ...]:
    """Measure headroom on the first validation items, unless the run holds it already.

    Where answers are longer than a token, the 48 allowed features highest in delta-confidence are held over them, or 48
    drawn at random where the SAE comes without statistics.

    Args:
        setup: of the training; its config says how many items (0: nothing is measured; None: 8 where answers are one
            token, none where they are longer).
        run: open; gets `headroom.json`, as `trimtab policy headroom --run` writes it.
        validation: the training's validation items.

    Returns:
        What speaks against training here.

    Raises:
        UserError: the mask allows nothing where one-token answers are chosen, so that there is nothing to learn; or
            headroom that was asked for cannot be measured. Where it was not asked for, that is a warning.
    """
    config = setup.config
    warnings = _mask_warnings(setup, validation)
    wanted = config.headroom_items
    if wanted is None:
        wanted = ITEMS if validation.max_new_tokens == 1 else 0
    if min(wanted, len(validation)) < 2:  # a static feature is chosen on other items than it is scored on
        return warnings
    path = run.file(HEADROOM_FILE)
    if not path.exists():
        try:
            table = own_headroom(setup, validation.take(range(min(wanted, len(validation)))))
        except UserError as error:
            if config.headroom_items is not None and not isinstance(error, NothingAllowedError):
                raise
            return (*warnings, f"headroom was not measured: {error.why}")
        result = HeadroomResult(
            task=setup.task.name, model=setup.model.name, split="validation", task_option=config.task_option,
            judge=config.judge, lines=(headroom(table, **setup.about, seed=setup.seed),),
        )  # fmt: skip
        write_json(path, result.to_json())
    lines = json.loads(path.read_text(encoding="utf-8"))["lines"]
    return tuple(dict.fromkeys([*warnings, *(warning for line in lines for warning in line["warnings"])]))


def _mask_warnings(setup: Setup, validation: TaskPrompts) -> tuple[str, ...]:
    """Whether the mask allows anything where answers begin; items are looked at until one says so."""
    if setup.mask not in ("current", "accumulated"):  # the others are lists, which are never empty
        return ()
    apart = setup.with_own_caches()
    for start in range(0, len(validation), PROMPTS_TOGETHER):
        few = validation.take(range(start, min(start + PROMPTS_TOGETHER, len(validation))))
        if allowed_at_first(apart, few).any():
            return ()
    nothing = NothingAllowedError(setup.mask, setup.site, len(validation))
    if validation.max_new_tokens == 1:
        raise nothing
    return (f"{nothing.what}: {nothing.why}",)

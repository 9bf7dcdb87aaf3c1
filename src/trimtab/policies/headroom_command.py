"""`trimtab policy headroom`: the lines of `policies.headroom` for several SAEs, doses and masks, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.dictionaries import load_dictionary
from trimtab.errors import UserError
from trimtab.lm import load_model
from trimtab.policies.episodes import Episodes
from trimtab.policies.headroom import Headroom, allowed_at_first, headroom, headroom_table
from trimtab.policies.masks import MASKS, MaskKind, PromptFirings, build_mask
from trimtab.runs import Meter, json_safe, write_json
from trimtab.selection import rank
from trimtab.selection.ranking import dictionary_site
from trimtab.stats import Interval
from trimtab.steering import UNITS, Unit, check_doses
from trimtab.tasks import load_task


@dataclass(frozen=True, kw_only=True)
class HeadroomConfig:
    """What one edit at the last prompt token could gain on a task, by SAE, dose and mask."""

    task: str
    """Name of the task, or module:Class of your own."""
    data: Path | None = None
    """Directory of the official files of the task."""
    model: str = "smollm2-135m-instruct"
    """Hub id, directory, GGUF file or catalogue name."""
    sae: tuple[str, ...] = ("default",)
    """SAEs, of one layer or of several: directories or shipped names."""
    dose: tuple[float, ...] = (0.5, 1.0)
    """Doses of the edit, in `unit`."""
    unit: Unit = "relative"
    """What a dose is a multiple of."""
    masks: tuple[MaskKind, ...] = ("none", "current", "accumulated", "top-confidence")
    """Masks to compare."""
    mask_features: int = 256
    """Features of the mask `top-confidence`."""
    split: str = "train"
    """Split of the task that items are from."""
    items: int = 32
    """Items to try, the first of the split."""
    options_only: bool = False
    """Decode among the tokens of the options only, where a task has options."""
    seed: int = 0
    """Of random directions, folds and bootstrap."""
    dtype: str = "float32"
    """What the model computes in."""
    device: str = "cpu"
    """Where to compute."""
    out: Path | None = None
    """Write the result to this JSON file as well."""

    def __post_init__(self) -> None:
        check_doses(list(self.dose))
        for name, value, allowed in [("unit", self.unit, UNITS), *(("masks", m, MASKS) for m in self.masks)]:
            if value not in allowed:
                raise UserError(f"{name} {value!r}", f"allowed are {', '.join(allowed)}", "choose one of them")
        for name, ok in (("items", self.items >= 2), ("sae", bool(self.sae)), ("dose", bool(self.dose))):
            if not ok:
                raise UserError(f"{name} {getattr(self, name)}", "there is too little to compare", "give more")


@dataclass(frozen=True, kw_only=True)
class HeadroomResult:
    """Lines for every SAE, dose and mask."""

    task: str
    model: str
    split: str
    lines: tuple[Headroom, ...]

    def render(self) -> Table:
        """One row for each SAE, dose and mask."""
        first = self.lines[0]
        table = Table(
            title=f"headroom of {self.task} on {self.model}: mean reward of {first.items} items ({self.split}), "
            "one edit at the last prompt token",
            caption="ceiling: best allowed feature of each item. random: best of as many random directions. "
            "static: one feature for all, cross-fitted. readout: ridge regression from the activation picks, "
            "cross-fitted. 95% intervals over items.",
        )
        for name in ("site", "dose", "mask", "unsteered", "ceiling", "random", "static", "most active", "readout"):
            table.add_column(name, justify="left" if name in ("site", "mask") else "right")
        for line in self.lines:
            values = (
                line.unsteered, line.ceiling, line.random_ceiling, line.static, line.most_active, line.readout,
            )  # fmt: skip
            table.add_row(line.site, f"{line.dose:g}", line.mask, *(_short(v) for v in values))
        for warning in dict.fromkeys(w for line in self.lines for w in _located(line)):
            table.caption = f"{table.caption}\n{warning}"
        return table

    def to_json(self) -> dict[str, Any]:
        """The lines as plain values."""
        lines = [
            {**{k: v.to_dict() if isinstance(v, Interval) else v for k, v in vars(line).items()},
             "over_static": line.over_static, "warnings": list(line.warnings())}
            for line in self.lines
        ]  # fmt: skip
        return {"task": self.task, "model": self.model, "split": self.split, "lines": lines}


def run_headroom(config: HeadroomConfig) -> HeadroomResult:
    """Load what the config names and try every feature.

    Raises:
        UserError: anything that the user named is wrong, or the task's answers are longer than a token.
    """
    model = load_model(config.model, dtype=config.dtype, device=config.device)
    task = load_task(config.task, data=config.data, tokenizer=model.tokenizer)
    saes = [load_dictionary(name, model=model, device=model.device) for name in config.sae]
    items = task.items(config.split)[: config.items]
    episodes = Episodes.of(model, task, items, options_only=config.options_only)
    lines: list[Headroom] = []
    with Meter("trying features", len(saes) * len(config.dose) * len(items)) as meter:
        for sae in saes:
            site = str(dictionary_site(model, sae, None))
            top: list[int] = []
            if "top-confidence" in config.masks:
                found = rank(model, sae, "delta-confidence", site=site)
                top = [int(i) for i in found.feature[: config.mask_features]]
            for dose in config.dose:
                table = headroom_table(
                    model, sae, episodes, site=site, dose=dose, unit=config.unit, seed=config.seed,
                    progress=meter.advance,
                )  # fmt: skip
                for mask in config.masks:
                    kept = build_mask(mask, sae, prompt_firings=PromptFirings(model, site, sae), features=top)
                    masked = table._replace(allowed=allowed_at_first(model, episodes, kept, table.x))
                    lines.append(headroom(masked, site=site, dose=dose, unit=config.unit, mask=mask, seed=config.seed))
    result = HeadroomResult(task=task.name, model=model.name, split=config.split, lines=tuple(lines))
    if config.out is not None:
        write_json(config.out, json_safe(result.to_json()))
    return result


def _short(v: Interval) -> str:
    return f"{v.estimate:.2f} [{v.low:.2f}, {v.high:.2f}]"


def _located(line: Headroom) -> list[str]:
    return [f"{line.site}, dose {line.dose:g}, mask {line.mask}: {warning}" for warning in line.warnings()]

"""SAEs of a task: small ones, one or several for each location of a cross-section, trained as a bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from trimtab.activations.memory import MemorySource
from trimtab.dictionaries import SAE, load_dictionary
from trimtab.distributed import Ranks
from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.lm import LanguageModel
from trimtab.training.bank import Place, TrainedBank, train_members, unfinished
from trimtab.training.members import expand
from trimtab.training.rows import SiteRows


def train_task_saes(
    model: LanguageModel,
    train: Mapping[Location, Float[Tensor, "P width"]],
    heldout: Mapping[Location, Float[Tensor, "Q width"]],
    run: Path,
    *,
    arch: Sequence[str] = ("topk",),
    l0: Sequence[float] = (3.0,),
    n_features: Sequence[int] = (1024,),
    epochs: int = 100,
    batch_size: int = 1024,
    lr: float = 1e-3,
    seed: Sequence[int] = (0,),
    **settings: Any,
) -> dict[str, dict[Location, SAE]]:
    """Train SAEs on the activations of prompts; what is done already is read back.

    Args:
        model: what the activations are of.
        train: activations of each location.
        heldout: those on which SAEs are measured.
        run: directory of the bank.
        arch: architectures.
        l0: active features per row.
        n_features: sizes; the paper's are 16 times the width.
        epochs: passes over the rows.
        batch_size: rows of a step.
        lr: of Adam.
        seed: of initialisation and order.
        settings: other fields of `TrainConfig`.

    Returns:
        Per setting (`topk-n1024-l0_3-seed0`) the SAE of each location.

    Raises:
        UserError: an architecture or setting that does not exist or cannot be (as an L0 of 0), none at all, a directory
            of another bank, or trainings that failed.
    """
    names = {f"{location.site}-{location.position.replace('+', 'plus')}": location for location in train}
    n_rows = len(next(iter(train.values())))
    values = {
        "site": list(names), "arch": list(arch), "n_features": list(n_features), "l0": list(l0), "seed": list(seed),
        "rows": [epochs * n_rows], "batch_size": [min(batch_size, n_rows)], "lr": [lr],
        "heldout_rows": [len(next(iter(heldout.values())))], **{name: [value] for name, value in settings.items()},
    }  # fmt: skip
    if (empty := next((name for name, given in values.items() if not given), None)) is not None:
        raise UserError(empty, "there is none", "give at least one")
    members = expand(values)
    if (wrong := next((member.error for member in members if member.error), None)) is not None:
        raise wrong
    about: dict[str, Any] = {"model": model.name, "model_fingerprint": model.fingerprint}
    rows = {
        name: SiteRows(
            MemorySource(train[place], **about, site=str(place.site), position=place.position),
            MemorySource(heldout[place], **about, site=str(place.site), position=place.position),
        )
        for name, place in names.items()
    }
    bank = Place(run)
    run.mkdir(parents=True, exist_ok=True)
    table = train_members(members, unfinished(members, bank), rows, bank, Ranks())
    assert table is not None
    if (problem := TrainedBank(run=run, rows=tuple(table)).problem) is not None:
        raise problem
    found: dict[str, dict[Location, SAE]] = {}
    for member, row in zip(members, table, strict=True):
        setting = member.name.removeprefix(f"{member.site}-")
        found.setdefault(setting, {})[names[member.site]] = load_dictionary(row.path)
    return found

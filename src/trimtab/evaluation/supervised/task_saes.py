"""SAEs of a task: small ones, one or several for each location of a cross-section, trained as a bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from trimtab.activations.memory import MemorySource
from trimtab.dictionaries import SAE, load_dictionary
from trimtab.distributed import Ranks
from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.saved_codes import directory_name
from trimtab.lm import LanguageModel
from trimtab.training.bank import Place, TrainedBank, train_members, unfinished
from trimtab.training.members import expand
from trimtab.training.rows import SiteRows


class TrainingRows(NamedTuple):
    """What an SAE is trained on."""

    train: Tensor  # [P, width]
    heldout: Tensor  # [Q, width]
    about: Mapping[str, Any] = MappingProxyType({})  # what they are of, such as `model`, `model_fingerprint`, `site`


def train_saes(
    rows: Mapping[str, TrainingRows],
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
) -> dict[str, dict[str, SAE]]:
    """Train SAEs of every setting on rows in memory, as a bank; what is done already is read back.

    Args:
        rows: by a name of letters, digits, dots and hyphens; of all names equally many.
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
        Per setting (`topk-n1024-l0_3-seed0`) the SAE of each name.

    Raises:
        UserError: an architecture or setting that does not exist or cannot be (as an L0 of 0), none at all, a directory
            of another bank, or trainings that failed.
    """
    first = next(iter(rows.values()))
    n_rows = len(first.train)
    values = {
        "site": list(rows), "arch": list(arch), "n_features": list(n_features), "l0": list(l0), "seed": list(seed),
        "rows": [epochs * n_rows], "batch_size": [min(batch_size, n_rows)], "lr": [lr],
        "heldout_rows": [len(first.heldout)], **{name: [value] for name, value in settings.items()},
    }  # fmt: skip
    if (empty := next((name for name, given in values.items() if not given), None)) is not None:
        raise UserError(empty, "there is none", "give at least one")
    members = expand(values)
    if (wrong := next((member.error for member in members if member.error), None)) is not None:
        raise wrong
    sources = {
        name: SiteRows(MemorySource(own.train, **own.about), MemorySource(own.heldout, **own.about))
        for name, own in rows.items()
    }
    bank = Place(run)
    run.mkdir(parents=True, exist_ok=True)
    table = train_members(members, unfinished(members, bank), sources, bank, Ranks())
    assert table is not None
    if (problem := TrainedBank(run=run, rows=tuple(table)).problem) is not None:
        raise problem
    found: dict[str, dict[str, SAE]] = {}
    for member, row in zip(members, table, strict=True):
        setting = member.name.removeprefix(f"{member.site}-")
        found.setdefault(setting, {})[member.site] = load_dictionary(row.path)
    return found


def train_task_saes(
    model: LanguageModel,
    train: Mapping[Location, Float[Tensor, "P width"]],
    heldout: Mapping[Location, Float[Tensor, "Q width"]],
    run: Path,
    **settings: Any,
) -> dict[str, dict[Location, SAE]]:
    """Train SAEs on the activations of prompts.

    Args:
        model: what the activations are of.
        train: activations of each location.
        heldout: those on which SAEs are measured.
        run: directory of the bank.
        settings: those of `train_saes`: `arch`, `l0`, `n_features`, `epochs`, `batch_size`, `lr`, `seed` and others.

    Returns:
        Per setting (`topk-n1024-l0_3-seed0`) the SAE of each location.

    Raises:
        UserError: as `train_saes` does.
    """
    about = {"model": model.name, "model_fingerprint": model.fingerprint}
    names = {directory_name(location): location for location in train}
    rows = {
        name: TrainingRows(train[at], heldout[at], {**about, "site": str(at.site), "position": at.position})
        for name, at in names.items()
    }
    found = train_saes(rows, run, **settings)
    return {setting: {names[name]: sae for name, sae in saes.items()} for setting, saes in found.items()}

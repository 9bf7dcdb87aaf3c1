"""SAEs of general text at the locations' sites: what somebody has who did not know of the task."""

from __future__ import annotations

from trimtab.activations import sample_text
from trimtab.dictionaries import Dictionary, load_dictionary
from trimtab.evaluation.supervised.contenders.contender import Contender, Ground, kind
from trimtab.evaluation.supervised.contenders.dictionaries import Dictionaries
from trimtab.training.command import BankConfig, train_bank
from trimtab.training.members import expand

ROWS_PER_SAE = 500_000
"""That a training sees, in as many passes over the text as it takes."""


@kind("text-saes")
def saes_of_text(ground: Ground) -> list[Contender]:
    """One TopK SAE for each site and size, trained by `trimtab train` from one harvest.

    Raises:
        UserError: a text that cannot be read; trainings that failed.
    """
    config = ground.config
    sites = tuple(dict.fromkeys(str(place.site) for place in ground.activations))
    values = {
        "site": sites, "arch": ["topk"], "n_features": config.n_features, "l0": [config.text_l0],
        "rows": [ROWS_PER_SAE], "seed": [ground.seed],
    }  # fmt: skip
    bank = BankConfig(
        model=ground.model.name, dtype=str(ground.model.dtype).removeprefix("torch."), device=str(ground.model.device),
        text=config.text or (sample_text(),), limit_tokens=config.text_tokens, members=tuple(expand(values)),
        holdout=0.05 if config.text else 0.0,  # the sample holds nothing but documents that others hold out
        run=ground.directory / "text-saes",
    )  # fmt: skip
    trained = train_bank(bank)
    assert trained is not None
    if trained.problem is not None:
        raise trained.problem
    found: dict[str, dict[str, Dictionary]] = {}
    for row in trained.rows:
        name = f"text SAE, topk-n{row.n_features}-l0_{config.text_l0:g}"
        found.setdefault(name, {})[row.site] = load_dictionary(row.path)
    return [
        Dictionaries(name, {place: of[str(place.site)] for place in ground.activations}, ground)
        for name, of in found.items()
    ]

"""Supervised codes: the mean or the least-squares vector of each attribute's values.

They are told which values a prompt has; as dictionaries, which see activations alone, they read them.
"""

from __future__ import annotations

from collections.abc import Iterator

from trimtab.evaluation.supervised.codes import FITS, Factors, Parametrisation
from trimtab.evaluation.supervised.contenders.contender import Contender, Ground, Way, kind
from trimtab.evaluation.supervised.contenders.dictionaries import Dictionaries
from trimtab.evaluation.supervised.control import edit_supervised
from trimtab.evaluation.supervised.cross_sections import Values
from trimtab.evaluation.supervised.saved_codes import build_codes, save_codes
from trimtab.evaluation.supervised.section import Section


class SupervisedCodes(Contender):
    """Codes of one fit, `mean` or `mse`."""

    def __init__(self, fit: str, parametrisation: Parametrisation, ground: Ground) -> None:
        self.name = f"supervised, {fit}" + f", {parametrisation}" * (parametrisation != "independent")
        self.factors = Factors.of(ground.train, parametrisation)
        rows = self.factors.rows(ground.train)
        self.codes = {place: FITS[fit](x, self.factors, rows) for place, x in ground.activations.items()}

    def rebuilt(self, section: Section) -> Values:
        rows = self.factors.rows(section.test)
        return {place: self.codes[place].reconstruct(rows) for place in section.locations}

    def edits(self, section: Section, attribute: str) -> Iterator[Way]:
        old, new = self.factors.rows(section.test), self.factors.rows(section.changed[attribute])
        x = section.prompts.activations
        yield Way("codes", None, {p: edit_supervised(x[p], self.codes[p], old, new) for p in section.locations})


@kind("codes")
def supervised_codes(ground: Ground) -> list[Contender]:
    """Both fits, told the values; and least squares as dictionaries that read them, which are saved."""
    parametrisation = ground.config.parametrisation
    told = [SupervisedCodes(fit, parametrisation, ground) for fit in FITS]
    read = build_codes(
        ground.model, ground.activations, ground.train, ground.held, ground.heldout, parametrisation=parametrisation
    )
    save_codes(read, ground.directory / "supervised")
    return [*told, Dictionaries(f"{told[-1].name}, read", read, ground)]

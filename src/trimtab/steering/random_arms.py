"""Random directions beside an arm, at equal dose: at the same places of each text, as large relative to ‖x‖.

What an arm does is known once it has been decoded, so that any operation and any unit has such a control. A control's
text has as many tokens as the arm's, whether or not it would have ended before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.dictionaries import Dictionary, load_dictionary
from trimtab.errors import UserError
from trimtab.lm import (
    DecodeConfig,
    Decoded,
    EditLog,
    EditRequest,
    InterventionSource,
    LanguageModel,
    Site,
    decode,
    site_width,
)
from trimtab.steering.composed_sources import CombinedSource
from trimtab.steering.direction_table import DirectionTable
from trimtab.steering.equal_dose import assert_equal_dose
from trimtab.steering.saved_steering import Steering
from trimtab.steering.sources import Choice, DirectionSource

Pool = Mapping[Site, DirectionTable]
"""What is drawn from at each site."""


class EqualDoseSource(DirectionSource):
    """One direction for each row, at the places of another decode's edits, as large relative to ‖x‖ as they were.

    Args:
        pool: directions by site.
        drawn: by site, the direction of each row.
        log: the other's edits; its sites are the pool's, in order.
        rows: the row of the log that each row follows.
        positions: the other's.
    """

    def __init__(
        self, pool: Pool, drawn: Mapping[Site, Int[Tensor, " N"]], log: EditLog, rows: Sequence[int], positions: str
    ) -> None:
        super().__init__(pool, positions=positions)
        log = log.take((log.feature >= 0).any(dim=1))
        shape = max([0, *rows]) + 1, 1 + int(log.position.max()) if len(log) else 1
        self.drawn, self.relative = dict(drawn), dict[Site, Tensor]()
        for index, site in enumerate(self.sites):
            mine, relative = log.take(log.site == index), torch.full(shape, torch.nan)
            relative[mine.row, mine.position] = mine.relative_dose.float()
            self.relative[site] = relative[list(rows)]

    def pick(self, request: EditRequest) -> Choice:
        relative, drawn = (each[request.site].to(request.x.device) for each in (self.relative, self.drawn))
        last = relative.shape[1] - 1
        dose = relative[request.row, request.position.clamp_max(last)]
        edited = ~dose.isnan() & (request.position <= last)
        return Choice(torch.where(edited, drawn[request.row], -1)[:, None], dose.nan_to_num()[:, None])


class RandomArms(NamedTuple):
    """Arms and their controls as one decode, rows of the controls last."""

    decoded: Decoded
    source: InterventionSource
    calls: list[int]
    """Rows that were decoded together."""
    control: EqualDoseSource


def decode_controls(
    model: LanguageModel,
    decoded: Decoded,
    source: InterventionSource,
    config: DecodeConfig,
    *,
    rows: Sequence[int],
    pool: Pool,
    exclude: Sequence[int],
) -> RandomArms:
    """Decode a control for each of some rows, and put both side by side.

    Args:
        model: the model.
        decoded: the arms.
        source: what steered them.
        config: how their tokens were chosen.
        rows: those that get a control.
        pool: what it is drawn from: rows with the same draws get the same direction.
        exclude: directions of the pool that are under test.

    Raises:
        UserError: too few directions can be drawn.
    """
    keys = [decoded.sample[row] for row in rows]
    names = list(dict.fromkeys(keys))
    drawn = {site: _draw(table, len(names), config.seed, exclude) for site, table in pool.items()}
    place = torch.tensor([names.index(key) for key in keys])
    control = EqualDoseSource(
        pool, {site: ids[place] for site, ids in drawn.items()}, decoded.edits, rows, str(source.positions)
    )
    found = decode(
        model,
        [decoded.prompts[row] for row in rows],
        config,
        control,
        samples=keys,
        branches=[0] * len(rows),
        lengths=[len(decoded.token_ids[row]) for row in rows],
    )
    of_rows = {"arm": decoded.edits.take(torch.isin(decoded.edits.row, torch.tensor(list(rows))))}
    assert_equal_dose({**of_rows, "control": found.edits})
    behind = torch.tensor([source.directions(site).shape[0] for site in source.sites])
    log = found.edits
    shifted = torch.where(log.feature >= 0, log.feature + behind[log.site][:, None], -1)
    both = Decoded.joined([decoded, replace(found, edits=replace(log, feature=shifted))])
    return RandomArms(both, CombinedSource([source, control]), [len(decoded), len(rows)], control)


def _draw(table: DirectionTable, n: int, seed: int, exclude: Sequence[int]) -> Int[Tensor, " n"]:
    """Directions without replacement, as long as there are any."""
    ids = table.live_ids()
    ids = ids[~torch.isin(ids, torch.tensor(list(exclude), dtype=torch.long))]
    if len(ids) == 0:
        raise UserError("random features", "none is left to draw beside those under test", "use another dictionary")
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    return shuffled.repeat(-(-n // len(ids)))[:n]


def random_directions(model: LanguageModel, sites: Sequence[Site], n: int, seed: int) -> dict[Site, DirectionTable]:
    """Directions that are as likely as any other, where there is no dictionary whose features could be drawn."""
    generator = torch.Generator().manual_seed(seed)
    return {site: DirectionTable(torch.randn(n, site_width(model, site), generator=generator)) for site in sites}


def pool_of(directions: Mapping[Site, object], model: LanguageModel, n: int, seed: int) -> dict[Site, DirectionTable]:
    """What controls are drawn from at sites that are steered with a dictionary, or with anything else.

    Args:
        directions: what steers at each site.
        model: the model.
        n: random directions, where there is no dictionary.
        seed: of them.
    """
    random = random_directions(model, list(directions), n, seed)
    return {
        site: DirectionTable.of(given) if isinstance(given, Dictionary) else random[site]
        for site, given in directions.items()
    }


def saes_of(saved: Sequence[Steering]) -> dict[Site, Dictionary | None]:
    """The SAEs whose features saved steerings are, where they are found where they lay; None for vectors."""
    found: dict[Site, Dictionary | None] = {}
    for part in (part for one in saved for part in one.parts):
        sae: Dictionary | None = None
        try:
            sae = load_dictionary(part.sae) if part.sae else None
        except UserError:  # it was moved
            sae = None
        found.setdefault(Site.parse(part.site), sae if sae is not None and sae.fingerprint == part.sae_hash else None)
    return found

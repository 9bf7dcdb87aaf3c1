"""The source of a trace, as far as a replay needs it: its sites and positions, and the directions that it used."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeStart, Edit, EditRequest, PositionRule, Site
from trimtab.lm.edits import not_kept
from trimtab.steering.direction_table import DirectionTable
from trimtab.steering.kept_activations import hash_from_hex
from trimtab.steering.sources import DirectionBlock
from trimtab.steering.trace import Trace


class TracedSource:
    """What a trace says of the source that made it, whatever kind it was. It decides nothing; a replay does.

    Args:
        trace: of a call that was steered.
        directions: the dictionaries and tables that the edits name by their hash.

    Raises:
        UserError: a hash is that of none of them, or activations were replaced and what took their place was not kept.
    """

    def __init__(self, trace: Trace, directions: Iterable[Dictionary | DirectionTable]) -> None:
        tables = [each if isinstance(each, DirectionTable) else DirectionTable.of(each) for each in directions]
        by_hash = {table.hash: table for table in tables}
        facts = trace.facts
        self.sites = tuple(map(Site.parse, facts["sites"]))
        self.positions = PositionRule.parse(facts["positions"])
        self.unit, self.operation = facts["unit"], facts["operation"]
        self.dictionary_hash = "+".join(by_hash)
        self._rows: dict[Site, Tensor] = {}
        self._blocks: dict[Site, tuple[DirectionBlock, ...]] = {}
        names = ["site", "unit", "operation", "dictionary_hash"]
        kinds = trace.edits.group_by(names).aggregate([("replacement_hash", "min")]).to_pylist()
        kinds.sort(key=lambda kind: kind["operation"] == "none")
        for site in self.sites:
            rows, blocks = [torch.zeros(0)], list[DirectionBlock]()
            for kind in (kind for kind in kinds if kind["site"] == str(site)):
                if blocks and kind["operation"] == "none":
                    continue  # where nothing was edited, the directions of the edits will do
                _, unit, operation, key, replacement = kind.values()
                if replacement is not None:
                    if hash_from_hex(replacement) not in trace.replacements:
                        raise not_kept()
                    found = torch.full((1, len(trace.replacements[hash_from_hex(replacement)])), -0.0)
                elif key in by_hash:
                    found = by_hash[key].rows
                else:
                    raise UserError(
                        f"directions {key} at {site}",
                        f"those given are {', '.join(by_hash) or 'none'}",
                        "give the dictionary or the table that the run used",
                    )
                start = blocks[-1].start + blocks[-1].n if blocks else 0
                blocks.append(DirectionBlock(start, len(found), unit, operation, key, replaces=replacement is not None))
                rows = [*rows, found] if blocks[1:] else [found]
            self._rows[site], self._blocks[site] = rows[0] if len(rows) == 1 else torch.cat(rows), tuple(blocks)

    def directions(self, site: Site) -> Float[Tensor, "n d"]:
        return self._rows[site]

    def blocks(self, site: Site) -> tuple[DirectionBlock, ...]:
        return self._blocks[site]

    def start(self, start: DecodeStart) -> None:
        self._rows = {site: rows.to(start.device) for site, rows in self._rows.items()}

    def choose(self, request: EditRequest) -> Edit | None:
        raise NotImplementedError("a trace does not say how edits were decided")

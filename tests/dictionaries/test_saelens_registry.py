"""Names of SAELens's registry, with a stand-in for SAELens: ids with slashes, mistakes, a hub out of reach."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.dictionaries import SAE, load_dictionary, save_dictionary
from trimtab.dictionaries.saelens_layout import write_config
from trimtab.errors import UserError

RELEASES = {
    "gemma-scope-2b-pt-res": {"layer_20/width_16k/average_l0_71": "a", "layer_20/width_16k/average_l0_38": "b"},
    "gpt2-small-res-jb": {"blocks.8.hook_resid_pre": "c"},
}


class FakeSAELens:
    """What trimtab uses of SAELens: the registry, and `SAE.from_pretrained`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.error: Exception | None = None

    def from_pretrained(self, release: str, sae_id: str, device: str) -> SimpleNamespace:
        self.asked.append((release, sae_id, device))
        print("fetching")
        if self.error:
            raise self.error
        return SimpleNamespace(cfg=SimpleNamespace(to_dict=lambda: self.config), state_dict=lambda: dict(self.tensors))

    def serve(self, sae: SAE, **fields: Any) -> SAE:
        self.config = write_config(sae) | fields
        self.tensors = {name: getattr(sae, name) for name in sae.shapes}
        return sae


@pytest.fixture
def saelens(monkeypatch) -> FakeSAELens:
    fake = FakeSAELens()
    package, loading, directory = (
        ModuleType(name) for name in ("sae_lens", "sae_lens.loading", "sae_lens.loading.pretrained_saes_directory")
    )
    package.SAE = SimpleNamespace(from_pretrained=fake.from_pretrained)  # pyright: ignore[reportAttributeAccessIssue]
    directory.get_pretrained_saes_directory = lambda: {  # pyright: ignore[reportAttributeAccessIssue]
        release: SimpleNamespace(saes_map=ids) for release, ids in RELEASES.items()
    }
    for module in (package, loading, directory):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.hint
    return caught.value.line


NAME = "saelens:gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
def test_an_id_with_slashes_is_loaded_and_saved(saelens, random_sae, tmp_path, architecture):
    theirs = saelens.serve(random_sae(architecture))
    ours = load_dictionary(NAME)
    assert saelens.asked == [("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", "cpu")]
    x = torch.randn(20, 7)
    assert torch.equal(ours.encode(x), theirs.encode(x))
    assert load_dictionary(save_dictionary(ours, tmp_path / "sae")).fingerprint == ours.fingerprint


def test_what_saelens_prints_is_no_result(saelens, random_sae, capsys):
    saelens.serve(random_sae("jumprelu"))
    load_dictionary(NAME)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "fetching\n")


def test_precision_and_fit_are_as_for_files(saelens, random_sae, tiny_llama):
    saelens.serve(random_sae("jumprelu"))
    assert load_dictionary(NAME, dtype=torch.float64).W_enc.dtype == torch.float64
    assert "width 7: tiny-llama has width 32" in message(lambda: load_dictionary(NAME, model=tiny_llama))


def test_an_unknown_release_names_a_close_one(saelens):
    line = message(lambda: load_dictionary("saelens:gemma-scope-2b-res/layer_20"))
    assert "release 'gemma-scope-2b-res'" in line
    assert "2 releases" in line
    assert "did you mean gemma-scope-2b-pt-res?" in line


def test_an_unknown_id_names_close_ones(saelens):
    line = message(lambda: load_dictionary("saelens:gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_72"))
    assert "SAE 'layer_20/width_16k/average_l0_72' of gemma-scope-2b-pt-res" in line
    assert "did you mean layer_20/width_16k/average_l0_71" in line


def test_a_name_without_an_id_or_like_nothing_says_how_to_write_one(saelens):
    line = message(lambda: load_dictionary("saelens:gpt2-small-res-jb"))
    assert "1 SAEs, such as blocks.8.hook_resid_pre" in line
    assert "write saelens:RELEASE/SAE_ID" in line
    assert "write saelens:RELEASE/SAE_ID" in message(lambda: load_dictionary("saelens:/"))


@pytest.mark.parametrize("missing", ["sae_lens", "torchvision"])
def test_without_saelens_the_extra_is_named(monkeypatch, missing):
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "sae_lens":
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)
    line = message(lambda: load_dictionary(NAME))
    assert ("SAELens is not installed" if missing == "sae_lens" else "No module named 'torchvision'") in line
    assert 'pip install "trimtab[saelens]"' in line


class HubError(Exception):
    """As huggingface_hub raises them: an OSError in one release, none in another."""


HubError.__module__ = "huggingface_hub.errors"


@pytest.mark.parametrize("error", [ConnectionError("no route to host"), HubError("401 Client Error.\n\nlog in")])
def test_a_hub_out_of_reach_is_told_from_a_broken_sae(saelens, error):
    saelens.error = error
    line = message(lambda: load_dictionary(NAME))
    assert "could not be fetched" in line
    assert str(error).splitlines()[0] in line
    assert "check the connection" in line
    saelens.error = KeyError("W_enc")
    line = message(lambda: load_dictionary(NAME))
    assert "SAELens could not load it (KeyError: 'W_enc')" in line


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"architecture": "skip_transcoder"}, ["architecture 'skip_transcoder'"]),
        ({"normalize_activations": "covariance_whitening"}, ["normalize_activations", "the config of " + NAME]),
        ({"reshape_activations": "heads"}, ["reshape_activations = 'heads'"]),
        ({"d_sae": 21}, ["tensor W_enc of shape [7, 20]", NAME]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_trimtab_does_not_compute_is_refused(saelens, random_sae, fields, parts):
    saelens.serve(random_sae("jumprelu"), **fields)
    line = message(lambda: load_dictionary(NAME))
    for part in parts:
        assert part in line

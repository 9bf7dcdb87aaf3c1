"""What every training architecture exports survives saving, loading and saving again, and computes the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from trimtab.dictionaries import ARCHITECTURES, DictionaryInfo, fold_scale, load_dictionary, save_dictionary
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.trainable import TrainableSAE

D, N = 8, 24
EXPORTED = {
    "relu": "standard",
    "panneal": "standard",
    "gated": "gated",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "matryoshka": "jumprelu",
}


def trained(architecture: str, *, apply_b_dec_to_input: bool = True) -> TrainableSAE:
    """An SAE away from its initial values, calibrated."""
    cls = TRAINABLE[architecture]
    wanted = {"n_features": N, "k": 4, "l0": 4.0, "apply_b_dec_to_input": apply_b_dec_to_input}
    fields = {field.name for field in dataclasses.fields(cls.config_class)}
    sae = cls(cls.config_class(**{name: wanted[name] for name in wanted if name in fields}), D, seed=1)
    rows = 2 * torch.randn(200, D, generator=torch.Generator().manual_seed(2))
    sae.initialise(rows)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    sae.constrain()
    sae.calibrate(rows)
    return sae


def test_every_architecture_has_an_expectation():
    assert set(TRAINABLE) <= set(EXPORTED)


@pytest.mark.parametrize("architecture", TRAINABLE)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_an_export_survives_two_round_trips(tmp_path, architecture, apply_b_dec_to_input):
    info = DictionaryInfo(architecture=architecture, model="tiny", site="resid_post.1")
    exported = fold_scale(trained(architecture, apply_b_dec_to_input=apply_b_dec_to_input).export(info), 0.25)
    assert type(exported) is ARCHITECTURES[EXPORTED[architecture]]
    assert exported.info.architecture == EXPORTED[architecture]
    once = load_dictionary(save_dictionary(exported, tmp_path / "once"))
    twice = load_dictionary(save_dictionary(once, tmp_path / "twice"))
    x = 8 * torch.randn(100, D, generator=torch.Generator().manual_seed(4))
    assert (exported.encode(x) > 0).any()
    for loaded in (once, twice):
        assert type(loaded) is type(exported)
        assert loaded.settings == exported.settings
        assert (loaded.info.model, loaded.info.site) == ("tiny", "resid_post.1")
        assert torch.equal(loaded.encode(x), exported.encode(x))
        assert torch.equal(loaded(x), exported(x))
    assert (tmp_path / "once" / "cfg.json").read_bytes() == (tmp_path / "twice" / "cfg.json").read_bytes()
    first, second = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("once", "twice"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

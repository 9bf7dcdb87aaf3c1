"""SAE objects of other libraries in memory: what they compute, or why they are refused."""

from __future__ import annotations

import sys

import pytest
import torch
from foreign_classes import (
    LEARNED,
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    SAEMetadata,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from foreign_tensors import TENSORS, D, K, draw
from torch import nn

from trimtab.dictionaries import load_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel

PLAIN = {name: TENSORS["JumpReluAutoEncoder"][name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
THRESHOLD = {"threshold": TENSORS["JumpReluAutoEncoder"]["threshold"]}
ABOUT = SAEMetadata(model_name="gpt2", hook_name="blocks.3.hook_resid_post")
OF_SAELENS: dict[str, SAE] = {
    "standard": StandardSAE(StandardSAEConfig(metadata=ABOUT), PLAIN),
    "standard without b_dec": StandardSAE(StandardSAEConfig(apply_b_dec_to_input=False), PLAIN),
    "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(), PLAIN | THRESHOLD),
    "topk": TopKSAE(TopKSAEConfig(k=K), PLAIN),
    "topk of unit rows": TopKSAE(TopKSAEConfig(k=K, rescale_acts_by_decoder_norm=True), PLAIN),
}


def assert_same(theirs: nn.Module) -> None:
    x = 2 * draw(200, D, seed=9)
    sae = load_dictionary(theirs)
    expected = theirs.encode(x).float()  # type: ignore[operator]
    assert (expected > 0).any(0).float().mean() > 0.5
    assert torch.equal(sae.encode(x) > 0, expected > 0)
    torch.testing.assert_close(sae(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LEARNED)
def test_every_class_of_dictionary_learning(name: str) -> None:
    assert_same(LEARNED[name]())


@pytest.mark.parametrize("name", OF_SAELENS)
def test_every_architecture_of_saelens(name: str) -> None:
    assert_same(OF_SAELENS[name])
    assert "sae_lens" not in sys.modules


def test_it_says_where_it_comes_from_and_keeps_its_own_weights() -> None:
    theirs = StandardSAE(StandardSAEConfig(metadata=ABOUT), PLAIN)
    sae = load_dictionary(theirs)
    assert (sae.info.model, sae.info.site, sae.name) == ("gpt2", "resid_post.3", "StandardSAE in memory")
    before = sae.W_dec.clone()
    theirs.W_dec.data.zero_()
    assert torch.equal(sae.W_dec, before)


def test_a_site_can_be_said(tiny_llama: LanguageModel) -> None:
    sae = load_dictionary(LEARNED["AutoEncoder"](), site="attn_z.1.0")
    assert sae.info.site == "attn_z.1.0"
    with pytest.raises(UserError, match=r"site resid_post\.2: the dictionary reads resid_post\.3"):
        load_dictionary(OF_SAELENS["standard"], site="resid_post.2")
    with pytest.raises(UserError, match="tiny-llama has width 32"):
        load_dictionary(LEARNED["AutoEncoder"](), site="resid_post.1", model=tiny_llama)


def test_attributes_of_the_object_count() -> None:
    theirs = LEARNED["JumpReluAutoEncoder"]()
    theirs.apply_b_dec_to_input = True  # type: ignore[assignment]
    theirs.encode = lambda x: LEARNED["JumpReluAutoEncoder"].encode(theirs, x - theirs.b_dec)  # type: ignore[assignment, operator]
    assert_same(theirs)


def test_what_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = LEARNED["MatryoshkaBatchTopKSAE"]()
    whole = fewer.encode
    fewer.encode = lambda x: torch.cat([whole(x)[:, :4], 0 * whole(x)[:, 4:]], dim=1)  # type: ignore[assignment]
    passing = JumpReLUSAE(JumpReLUSAEConfig(), PLAIN | THRESHOLD)
    passing.use_error_term = True
    for theirs in (fewer, passing):
        with pytest.raises(UserError, match=r"in memory: it does not compute what its attributes say \(recon.*% apart"):
            load_dictionary(theirs)
    monkeypatch.setattr("trimtab.dictionaries.files.check_same", lambda ours, theirs: None)  # the check is what says so
    load_dictionary(fewer)


class Unknown(nn.Module): ...


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (Unknown(), "the Unknown in memory: it has neither SAELens's cfg.to_dict() nor one of dictionary_learning's"),
        (
            StandardSAE(StandardSAEConfig(normalize_activations="whitening"), PLAIN),
            "field normalize_activations = 'whitening' in the config of the StandardSAE in memory",
        ),
        (StandardSAE(StandardSAEConfig(), PLAIN | THRESHOLD), "tensor threshold in the StandardSAE in memory"),
        (TopKSAE(TopKSAEConfig(k=99), PLAIN), "field k = 99 in the config of the TopKSAE in memory"),
        (LEARNED["BatchTopKSAE"](threshold=torch.tensor(torch.nan)), "it must be one finite number"),
        (LEARNED["AutoEncoder"](bias=torch.full((D,), torch.inf)), "it holds values that are not finite"),
    ],
)
def test_what_trimtab_does_not_compute_is_refused(theirs: nn.Module, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_dictionary(theirs)
    assert message in caught.value.line

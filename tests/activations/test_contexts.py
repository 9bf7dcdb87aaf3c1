"""Top contexts against reading every text by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trimtab.activations import Context, top_contexts
from trimtab.dictionaries import Dictionary, DictionaryInfo, Standard
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, TokenBatch, capture

SITE = "resid_post.1"
TEXTS = [
    "the sea and the ship",
    "an inn",
    "in the end, the trim tab turned the rudder",
    "and then there was another one",
]


def dictionary(model: LanguageModel, n: int = 12) -> Standard:
    generator = torch.Generator().manual_seed(2)
    W_dec = torch.randn(n, model.d_model, generator=generator) * (1 + torch.arange(n)[:, None])
    W_enc = torch.randn(model.d_model, n, generator=generator)
    b_enc = torch.zeros(n)
    b_enc[5] = -1e6  # never fires
    info = DictionaryInfo(architecture="standard", site=SITE)
    return Standard(W_enc, b_enc, W_dec, torch.zeros(model.d_model), info=info)


def expected(model: LanguageModel, sae: Dictionary, feature: int, length: int = 10**6) -> list[tuple[float, int, str]]:
    """Largest activation of each stretch, its text, and its token, best first."""
    tokenizer = model.tokenizer
    found = []
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), length):
            stretch = [tokenizer.bos_token_id, *ids[start : start + length]]
            x = capture(model, TokenBatch.full(torch.tensor([stretch])), [SITE])[model.site(SITE)][0]
            strength = sae.encode(x)[1:, feature] * sae.W_dec[feature].norm()
            value, at = strength.max(dim=0)
            if value > 0:
                found.append((float(value), number, tokenizer.decode([stretch[1 + int(at)]])))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("context", [256, 6])
def test_contexts_are_those_of_each_text_by_itself(any_tiny: LanguageModel, context: int) -> None:
    sae = dictionary(any_tiny)
    found = top_contexts(any_tiny, sae, TEXTS, [7, 3, 5], count=3, context=context, batch_size=3)
    for feature in (7, 3, 5):
        wanted = expected(any_tiny, sae, feature, context - 1)[:3]
        assert [one.activation for one in found[feature]] == pytest.approx([value for value, _, _ in wanted], rel=1e-4)
        assert [(one.document, one.token) for one in found[feature]] == [(f"text#{n:06d}", t) for _, n, t in wanted]
    assert found[5] == ()
    assert len(found[7]) == 3
    assert [one.feature for one in found.contexts] == [7] * 3 + [3] * len(found[3])


def test_what_stands_around_is_the_text(tiny_llama: LanguageModel) -> None:
    sae = dictionary(tiny_llama)
    (best, *_) = top_contexts(tiny_llama, sae, TEXTS[2], 3, width=100).contexts
    assert best.before + best.token + best.after == TEXTS[2]
    (near, *_) = top_contexts(tiny_llama, sae, TEXTS[2], 3, width=2).contexts
    assert len(tiny_llama.encode_text(near.before)) <= 3
    assert (near.before + near.token + near.after) in TEXTS[2]
    assert near.token == best.token


def test_it_is_a_frame_and_a_line(tiny_llama: LanguageModel) -> None:
    found = top_contexts(tiny_llama, dictionary(tiny_llama), TEXTS, torch.tensor([3]), count=2)
    assert found.to_frame().activation.tolist() == [one.activation for one in found.contexts]
    assert repr(found).startswith("<FeatureContexts: top contexts of feature 3 among ")
    assert isinstance(found.contexts[0], Context)


def test_what_cannot_be_read_is_refused(tiny_llama: LanguageModel) -> None:
    sae = dictionary(tiny_llama)
    with pytest.raises(UserError, match="feature 12: the dictionary has features 0 to 11"):
        top_contexts(tiny_llama, sae, TEXTS, 12)
    with pytest.raises(UserError, match="there is no text in it"):
        top_contexts(tiny_llama, sae, [], 3)
    sae.info = DictionaryInfo(architecture="standard")
    with pytest.raises(UserError, match="the dictionary does not name the one it reads; give a site"):
        top_contexts(tiny_llama, sae, TEXTS, 3)
    with pytest.raises(UserError, match="dictionary of width 32: tiny-llama has width 8"):
        top_contexts(tiny_llama, sae, TEXTS, 3, site="attn_z.1.0")


def test_a_mutation_is_seen(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that counts as text."""
    pad: Callable[..., TokenBatch] = TokenBatch.pad
    real = property(lambda batch: torch.ones_like(batch.ids, dtype=torch.bool))

    def unmasked(*args: object) -> TokenBatch:
        batch = pad(*args)
        monkeypatch.setattr(
            TokenBatch, "position_ids", property(lambda b: torch.arange(b.ids.shape[1]).expand_as(b.ids))
        )
        return batch

    monkeypatch.setattr(TokenBatch, "real", real)
    monkeypatch.setattr(TokenBatch, "pad", unmasked)
    with pytest.raises(AssertionError):
        test_contexts_are_those_of_each_text_by_itself(tiny_llama, 256)

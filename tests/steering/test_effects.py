"""KL of edits: the one-pass twin against an oracle that removes one edit at a time, and what must make it fail."""

from __future__ import annotations

import pytest
import torch
from steering_checks import LENGTHS, edits_of, oracle_logits, prompts_of
from tiny_dictionary import make_dictionary

from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, InterventionSource, LanguageModel, decode, upper_layers
from trimtab.steering import CombinedSource, RandomFeatureSource, StaticSource, token_effects


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    return float((p.exp() * (p - q)).sum())


def check_effects(
    model: LanguageModel, source: InterventionSource, lengths: tuple[int, ...], n_tokens: int = 5
) -> None:
    """Both divergences against cache-free passes over one row and one prefix at a time."""
    config = DecodeConfig(max_new_tokens=n_tokens, temperature=1.0, stop=("e", "1"), stop_at_eos=False)
    decoded = decode(model, prompts_of(lengths), config, source)
    found = token_effects(model, decoded, source, top_k=3)
    largest = 0.0
    for row, tokens in enumerate(decoded.token_ids):
        ids = decoded.prompts[row] + tokens
        edits = edits_of(decoded, source, row)
        for step, token in enumerate(tokens):
            at = len(decoded.prompts[row]) - 1 + step
            steered = oracle_logits(model, ids[: at + 1], [e for e in edits if e.position <= at])[-1]
            removed = oracle_logits(model, ids[: at + 1], [e for e in edits if e.position < at])[-1]
            plain = oracle_logits(model, ids[: at + 1], [])[-1]
            assert found.kl_local[row][step] == pytest.approx(kl(steered, removed), abs=2e-4, rel=1e-2)
            assert found.kl_total[row][step] == pytest.approx(kl(steered, plain), abs=2e-4, rel=1e-2)
            logp = torch.log_softmax(plain, -1)
            assert found.unsteered_logp[row][step] == pytest.approx(float(logp[token]), abs=1e-3)
            assert found.top_with[row][step].ids[0] == int(steered.argmax())
            assert found.top_without[row][step].ids[0] == int(removed.argmax())
            largest = max(largest, abs(kl(steered, removed) - kl(steered, plain)))
    assert largest > 0.01, "local and total agree everywhere, so nothing tells them apart"


def test_effects_equal_one_pass_per_position(any_tiny: LanguageModel, sae: Standard) -> None:
    check_effects(any_tiny, RandomFeatureSource(sae, 1.0), LENGTHS)


def test_effects_of_two_sites(any_tiny: LanguageModel, sae: Standard) -> None:
    later = make_dictionary(any_tiny, "resid_post.2")
    source = CombinedSource([StaticSource(sae, 3, 0.8, positions="all"), StaticSource(later, 5, 0.8, positions="all")])
    check_effects(any_tiny, source, (13, 4), n_tokens=4)


def test_unedited_tokens_have_no_local_effect(any_tiny: LanguageModel, sae: Standard) -> None:
    source = StaticSource(sae, 3, 0.8, positions="prompt")
    decoded = decode(any_tiny, prompts_of((6,)), DecodeConfig(max_new_tokens=4, stop_at_eos=False), source)
    found = token_effects(any_tiny, decoded, source)
    assert found.kl_local[0][0] > 0
    assert found.kl_local[0][1:] == [0.0, 0.0, 0.0]
    assert min(found.kl_total[0]) > 0


@pytest.mark.parametrize("layout", ["tiny_llama", "tiny_gemma3", "tiny_gpt2"])
@pytest.mark.parametrize("mistake", ["clean past", "sees itself edited", "one place on", "no window", "no positions"])
def test_mistakes_in_the_mask_are_noticed(
    mistake: str, layout: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(layout)
    if mistake == "no window" and layout != "tiny_gemma3":
        pytest.skip("no sliding window")
    original = upper_layers._CopyMasks.of_copies

    def of_copies(self, mask):  # type: ignore[no-untyped-def]
        number, place = torch.arange(len(self.place)), self.place
        copy = number > place  # of the second half
        if mistake == "clean past":  # copies see copies instead of the edited past
            self.visible = torch.where(copy[:, None], copy & (place <= place[:, None]), self.visible)
        if mistake == "sees itself edited":
            self.visible = self.visible | copy[:, None] & (place == place[:, None]) & ~copy
        if mistake == "one place on":
            self.place = torch.where(copy, (place + 1).clamp_max(int(place.max())), place)
        return original(self, None if mistake == "no window" else mask)

    assert upper_layers.can_run_from(model, 2, "copies")
    monkeypatch.setattr(upper_layers._CopyMasks, "of_copies", of_copies)
    if mistake == "no positions":
        original_forward = model.hf.forward

        def forward(**kwargs):  # type: ignore[no-untyped-def]
            return original_forward(**{**kwargs, "position_ids": None})

        monkeypatch.setattr(model.hf, "forward", forward)
    with pytest.raises(AssertionError):
        check_effects(model, StaticSource(make_dictionary(model), 3, 1.0), (9, 17))


def test_a_model_that_cannot_be_shown_copies_is_refused(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upper_layers, "_works", {tiny_llama.hf: {("copies", 2, "sdpa", "float32"): False}})
    source = StaticSource(make_dictionary(tiny_llama), 3, 1.0)
    decoded = decode(tiny_llama, prompts_of((6,)), DecodeConfig(max_new_tokens=2), source)
    with pytest.raises(
        UserError, match=r"KL with tiny-llama: its attention cannot be shown copies .* turn it off: --no-kl"
    ):
        token_effects(tiny_llama, decoded, source)

"""Variance shares in closed form, kinds of planted features, and doses that a policy tolerates."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_readout import SITE, HalfHurt, Planted, planted_model, planted_sae

from trimtab.dictionaries import Standard
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, TokenBatch, capture
from trimtab.policies.analyses.layers import FACTORS, TextRows, feature_shares, kind_shares, layer_report, text_rows
from trimtab.policies.analyses.variance_shares import variance_share
from trimtab.policies.config import PolicyConfig
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup


def test_shares_of_a_balanced_design_are_1_and_its_closed_form() -> None:
    """Token × document, each pair r times: the other factor's SS_between is 0, so ε² = −(k − 1)/(N − k)."""
    tokens, documents, r = 5, 4, 3
    token, document, _ = (g.ravel() for g in np.meshgrid(np.arange(tokens), np.arange(documents), np.arange(r)))
    rows = len(token)
    assert rows == tokens * documents * r
    f = np.stack([1.7 * token + 3, np.sin(document), token + 10.0 * document, np.ones(rows)], axis=1)
    by_token, by_document = variance_share(f, token), variance_share(f, document)
    assert by_token[0] == pytest.approx(1)
    assert by_document[0] == pytest.approx(-(documents - 1) / (rows - documents))
    assert by_document[1] == pytest.approx(1)
    assert by_token[1] == pytest.approx(-(tokens - 1) / (rows - tokens))
    # Additive: the variances of token (2.0) and of 10 × document (125.0) share the total.
    within, total = 125.0 * rows, 127.0 * rows
    assert by_token[2] == pytest.approx(1 - (within / (rows - tokens)) / (total / (rows - 1)))
    assert np.isnan(by_token[3])


def test_noise_has_no_share_however_many_groups() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(400, size=1000)
    f = rng.normal(size=(1000, 200))
    shares = variance_share(f, groups)
    assert abs(shares.mean()) < 0.01
    means = np.stack([f[groups == g].mean(0) for g in groups])
    plain = (means - f.mean(0)).var(0) / f.var(0)
    assert plain.mean() > 0.3


def test_labels_may_be_anything_and_single_rows_say_nothing() -> None:
    f = np.array([[1.0], [2.0], [3.0]])
    assert np.isnan(variance_share(f, np.array(["a", "b", "c"]))).all()
    assert variance_share(f, np.array(["a", "a", "a"]))[0] == pytest.approx(0)


def planted_rows() -> TextRows:
    """Coordinate 0 says the token, 1 the previous token, 2 the document, 3 nothing."""
    rng = np.random.default_rng(1)
    token, previous, document = rng.integers(6, size=(3, 3000))
    x = np.stack([token, previous, document, rng.integers(6, size=3000)], axis=1) + 1.0
    return TextRows(x=torch.tensor(x, dtype=torch.float32), token=token, previous=previous, document=document)


def identity(n: int) -> Standard:
    info = DictionaryInfo(architecture="standard", model="none", site=SITE)
    return Standard(torch.eye(n), torch.zeros(n), torch.eye(n), torch.zeros(n), info=info)


def test_the_kind_of_a_feature_is_what_it_depends_on() -> None:
    shares = feature_shares(planted_rows(), identity(4), range(4))
    expected = np.concatenate([np.eye(3), np.zeros((1, 3))])
    assert np.allclose(shares, expected, atol=0.01)
    assert shares.diagonal() == pytest.approx(np.ones(3))


def test_chosen_features_stand_beside_the_live_ones() -> None:
    lines, shares = kind_shares(planted_rows(), identity(4), Counter({0: 3, 3: 1}), live_sample=4)
    token = lines[0]
    assert [line.factor for line in lines] == list(FACTORS)
    assert token.chosen.estimate == pytest.approx(0.5, abs=0.01)
    assert token.by_use == pytest.approx(0.75, abs=0.01)
    assert token.live.estimate == pytest.approx(0.25, abs=0.01)
    assert token.difference.estimate == pytest.approx(0.25, abs=0.01)
    assert token.live.low <= 0.25 <= token.live.high
    assert set(shares) == {0, 3}


def test_features_that_never_fire_in_the_text_have_no_kind() -> None:
    rows = planted_rows()
    dead = Standard(-torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4), info=identity(4).info)
    with pytest.raises(UserError, match="none of those chosen fires"):
        kind_shares(rows, dead, Counter({0: 1}))


def test_rows_of_a_text_are_its_activations_and_neighbours(
    tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("text") / "some.jsonl"
    texts = ["the cat and the dog ate " * 6, "a man went into the inn and ran " * 6]
    path.write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    rows = text_rows(tiny_llama, tiny_llama.site(SITE), [str(path)], rows=10_000, context=16)
    assert len(rows.x) == len(rows.token) == len(rows.previous) == len(rows.document) > 50
    assert set(rows.document.tolist()) == {0, 1}
    special = set(tiny_llama.tokenizer.all_special_ids)
    assert not special & set(rows.token.tolist())
    assert not special & set(rows.previous.tolist())
    pairs = set()
    for text in texts:
        ids = tiny_llama.tokenizer.encode(text, add_special_tokens=False)
        pairs |= set(itertools.pairwise(ids))
    assert set(zip(rows.previous.tolist(), rows.token.tolist(), strict=True)) <= pairs
    # The first rows are those of the first sequence, behind its BOS and first token.
    ids = tiny_llama.tokenizer.encode(texts[0], add_special_tokens=False)[:15]
    x = capture(tiny_llama, TokenBatch.full(torch.tensor([[tiny_llama.tokenizer.bos_token_id, *ids]])), [SITE])
    expected = x[tiny_llama.site(SITE)][0, 2:]
    assert torch.allclose(rows.x[:14], expected, atol=1e-5)
    assert rows.token[:14].tolist() == ids[1:]


def test_doses_that_hurt_are_not_tolerated(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    """Pushing towards Y: a small dose changes nothing, a large one makes every answer Y, right for some tasks only."""
    model = planted_model(tiny_llama)
    sae = planted_sae(model)
    policy = Policy.build(sae.directions, hidden=(8,), seed=0)
    with torch.no_grad():
        policy.actor.head.bias[0] = 1e4  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    (tmp_path / "text.txt").write_text("the cat and the dog ran into the inn.\n\n" * 60)
    rows = text_rows(model, model.site(SITE), [str(tmp_path / "text.txt")], rows=400, context=32)

    class AllN(HalfHurt):
        name = "all-n"
        right = staticmethod(lambda text: "N")

    for task, tolerated in ((Planted, 2.0), (AllN, 0.002)):
        config = PolicyConfig(task=task.name, mask="none", dose=0.002, options_only=True, hidden=(8,))
        setup = Setup.with_parts(config, model, sae, task.load())
        report = layer_report(
            setup, policy, setup.prompts("validation"), rows, factors=(1.0, 1000.0), live_sample=32
        )  # fmt: skip
        small, large = report.doses
        assert (small.dose, large.dose) == (0.002, 2.0)
        assert large.reward.estimate == (1.0 if task is Planted else 0.0)
        assert small.kl.estimate < large.kl.estimate
        assert report.tolerated == tolerated
        assert (report.chosen_features, set(report.shares)) == (1, {0})
        assert [kind.factor for kind in report.kinds] == list(FACTORS)

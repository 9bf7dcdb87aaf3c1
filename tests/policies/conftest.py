"""A small dictionary for the tiny models, its mask kinds, one rollout under each, and models with a planted truth."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "control"))
sys.path.insert(0, str(Path(__file__).parent))

from planted_choice import choice_model, choice_sae
from planted_fixtures import planted, planted_dictionary  # noqa: F401
from policy_rollouts import PROMPTS, SITE, RollOut, Rollout

from trimtab.control.masks import MaskKind, PromptFirings, build_mask
from trimtab.dictionaries import Standard
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.lm import DecodeConfig, LanguageModel, TokenBatch, capture, decode
from trimtab.policies.networks import Policy
from trimtab.policies.source import PolicySource


@pytest.fixture
def sae(tiny_llama: LanguageModel) -> Standard:
    """64 features of which a few dozen fire at a token."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(6, 100, (8, 24), generator=generator)
    x = capture(tiny_llama, TokenBatch.full(ids), [SITE])[tiny_llama.site(SITE)]
    rows = torch.randn(64, x.shape[-1], generator=generator)
    b_enc = -0.5 * x.flatten(0, 1).norm(dim=-1).mean() * torch.rand(64, generator=generator)
    info = DictionaryInfo(architecture="standard", model=tiny_llama.name, site=SITE)
    return Standard(rows.T / rows.norm(dim=1), b_enc, rows, x.mean((0, 1)), info=info)


@pytest.fixture
def policy(sae: Standard) -> Policy:
    """An actor whose logits differ from feature to feature, as after some training."""
    policy = Policy.build(sae.directions, hidden=(16,), seed=3)
    with torch.no_grad():
        policy.actor.head.weight.mul_(100)
    policy.normaliser.show(3 * torch.randn(50, sae.d_in, generator=torch.Generator().manual_seed(1)) + 1)
    return policy


@pytest.fixture
def roll_out(tiny_llama: LanguageModel, sae: Standard, policy: Policy) -> RollOut:
    """Decode the prompts, several times each, under the policy."""

    def run(mask: MaskKind = "accumulated", *, repeats: int = 3, tokens: int = 6, seed: int = 4, **options: object):
        firings = PromptFirings(tiny_llama, SITE, sae) if mask == "accumulated" else None
        feature_mask = build_mask(mask, sae, prompt_firings=firings, features=[3, 5, 8, 40])
        source = PolicySource(policy, sae, feature_mask, 0.5, **options)  # pyright: ignore[reportArgumentType]
        config = DecodeConfig(max_new_tokens=tokens, seed=seed, stop_at_eos=False)
        return Rollout(source, decode(tiny_llama, PROMPTS, config, source, repeats=repeats))

    return run


@pytest.fixture(scope="module")
def choice(tiny_llama: LanguageModel) -> LanguageModel:
    """Writes four letters, each by the sign of one coordinate."""
    return choice_model(tiny_llama)


@pytest.fixture(scope="module")
def choice_dictionary(choice: LanguageModel) -> Standard:
    """Eight of its features push that coordinate."""
    return choice_sae(choice)

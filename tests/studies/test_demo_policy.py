"""The demo's policy part on a tiny model: trained, shown beside controls, read back, or left out with a reason."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trimtab.dictionaries import DictionaryInfo, FeatureStatsAccumulator, Standard, load_dictionary, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, TokenBatch, capture
from trimtab.policies.config import PolicyConfig
from trimtab.studies import DemoConfig, demo_policy, run_demo
from trimtab.studies.demo_policy import run_demo_policy

SITE = "resid_post.1"
SMALL = replace(
    demo_policy.POLICY,
    task="first_letter:FirstLetter",
    headroom_items=2,
    train_items=8,
    validation_items=4,
    iterations=2,
    initial_no_edit=0.0,
)


@pytest.fixture
def config(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> PolicyConfig:
    """A small training on a model and an SAE that lie in files."""
    monkeypatch.syspath_prepend(str(request.config.rootpath / "tests" / "policies"))
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    draw = torch.Generator().manual_seed(5)
    x = capture(tiny_llama, TokenBatch.full(torch.randint(6, 100, (8, 24), generator=draw)), [SITE])
    rows = torch.randn(64, 32, generator=draw)
    sae = Standard(
        rows.T / rows.norm(dim=1),
        torch.zeros(64),
        rows,
        torch.zeros(32),
        info=DictionaryInfo(architecture="standard", site=SITE),
    )
    stats = FeatureStatsAccumulator(sae.decoder_norms)
    stats.update(sae.encode(next(iter(x.values())).flatten(0, 1)))
    sae.feature_stats = stats.result()
    save_dictionary(sae, tmp_path / "sae")
    return replace(SMALL, model=str(tmp_path / "model"), sae=str(tmp_path / "sae"), run=tmp_path / "run")


def test_the_policy_stands_beside_its_controls_and_is_read_back(
    config: PolicyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, left_out = run_demo_policy(config, 6)
    assert found is not None
    assert not left_out
    arms = {arm.label: arm for arm in found.arms}
    assert {"unsteered", "policy", "static", "random at equal dose"} <= set(arms)
    assert arms["policy"].difference is None
    assert arms["unsteered"].difference is not None
    assert arms["unsteered"].reward.n == found.items == 6
    assert found.headline().startswith("first-letter, 6 test items, trained in ")
    assert found.to_frame().shape[0] == len(arms)
    monkeypatch.setattr(demo_policy, "evaluate_policy", None)  # not called again
    assert run_demo_policy(config, 6) == (found, "")


def test_a_model_that_the_task_does_not_suit_leaves_the_part_out(config: PolicyConfig, tmp_path: Path) -> None:
    own = DemoConfig(model=config.model, sae=config.sae, run=tmp_path / "demo")
    said = run_demo(own, {}).headline()
    assert said.startswith("No policy: task ioi-mixture: only")
    without = replace(own, policy=False, run=tmp_path / "without")
    assert run_demo(without, {}).headline() == ""


def test_an_sae_of_which_nothing_may_be_chosen_leaves_the_part_out(config: PolicyConfig) -> None:
    sae = load_dictionary(config.sae)
    sae.b_enc.data.fill_(-1e6)
    save_dictionary(sae, config.sae)
    found, left_out = run_demo_policy(config, 6)
    assert found is None
    assert left_out.startswith("mask accumulated: it allows no live feature at resid_post.1")


@pytest.mark.parametrize("part", ["run_policy_train", "evaluate_policy"])
def test_any_other_mistake_is_no_reason_to_leave_the_part_out(
    config: PolicyConfig, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Neither a disk that fills up, in training or evaluation, nor settings that do not fit the run that is there."""
    real, full = getattr(demo_policy, part), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fills_up(*args: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _raiser(full))
            return real(*args)

    monkeypatch.setattr(demo_policy, part, fills_up)
    with pytest.raises(UserError, match=r"cannot write .*: the disk is full; free some space or write elsewhere"):
        run_demo_policy(config, 6)
    monkeypatch.setattr(demo_policy, part, real)
    assert run_demo_policy(config, 6)[0] is not None
    with pytest.raises(UserError, match="samples was 12 and is now 3"):
        run_demo_policy(replace(config, samples=3), 6)


def _raiser(error: Exception) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail

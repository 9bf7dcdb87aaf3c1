"""The policy under a shuffled decoder, on a planted readout."""

from __future__ import annotations

import numpy as np
import torch
from planted_readout import Planted
from readout_setups import readout_setup

from trimtab.control.answers import ItemSet
from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel
from trimtab.policies.arms import PolicyArm, shuffled_table
from trimtab.policies.networks import Policy
from trimtab.steering import assert_equal_dose


def constant_policy(sae: Standard, feature: int) -> Policy:
    """Always the same feature."""
    policy = Policy.build(sae.directions, hidden=(8,), seed=0)
    with torch.no_grad():
        policy.actor.head.bias[feature] = 1e4  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    return policy


def test_a_shuffled_decoder_gains_nothing(planted: LanguageModel, planted_dictionary: Standard) -> None:
    setup = readout_setup(planted, planted_dictionary, Planted)
    test = ItemSet.of(setup, setup.prompts("test"))
    arm = PolicyArm(setup=setup, policy=constant_policy(planted_dictionary, 0))
    answers = test.answer(arm.source())
    assert answers.reward.mean() == 1
    table = shuffled_table(planted_dictionary, seed=1)
    assert torch.allclose(table.rows.sort(0).values, planted_dictionary.directions.sort(0).values, atol=1e-6)
    assert not torch.equal(table.rows, shuffled_table(planted_dictionary, seed=2).rows)
    assert abs(float(table.rows[0, 0])) < 1e-6
    shuffled = test.answer(arm.source(directions=table))
    assert np.array_equal(shuffled.reward, test.answer().reward)
    assert_equal_dose({"policy": answers.edits, "shuffled": shuffled.edits})

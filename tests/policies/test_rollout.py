"""Where a rollout's reward is, row by row; `test_planted` has that these checks fail where it is put elsewhere."""

from __future__ import annotations

from planted_rollout import check_divergence_costs_reward, check_reward_is_at_the_end

from trimtab.dictionaries import Standard
from trimtab.lm import LanguageModel


def test_the_reward_is_at_the_last_decision_of_rows_of_any_length(tiny_llama: LanguageModel, sae: Standard) -> None:
    check_reward_is_at_the_end(tiny_llama, sae)


def test_the_penalty_is_that_of_the_divergence_at_its_token(tiny_llama: LanguageModel, sae: Standard) -> None:
    check_divergence_costs_reward(tiny_llama, sae)

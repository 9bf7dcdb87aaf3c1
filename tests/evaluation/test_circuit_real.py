"""On the real default model the heads of IOI are found again, by what they add and through whom they act."""

from __future__ import annotations

import pytest
import torch

from trimtab.evaluation.circuits import attention_from, direct_effects, head_location, path_patch
from trimtab.evaluation.circuits.rows import rows_of
from trimtab.lm import LanguageModel
from trimtab.tasks.ioi_prompts import IOIDistribution

pytestmark = pytest.mark.real


def test_the_heads_of_ioi(real_model: LanguageModel) -> None:
    """23.0 copies the indirect object, 23.3 lowers the subject, 24.4 works against them; 20.0 steers the first."""
    ioi = IOIDistribution.load(real_model.encode_text, "paper")
    prompts = ioi.prompts(4)
    (rows,) = rows_of([ioi.tokenise(prompt) for prompt in prompts], real_model)
    (other,) = rows_of([ioi.tokenise(ioi.without_repeat(prompt)) for prompt in prompts], real_model)
    direct, looks = (
        direct_effects(real_model, rows).mean(0),
        attention_from(real_model, rows, "END").permute(0, 3, 1, 2),
    )
    assert min(direct[23, 0], direct[23, 3]) > 0.5
    assert direct[24, 4] < -0.5
    assert rows.at(looks, "IO").mean(0)[23, 0] > 0.5 > rows.at(looks, "S2").mean(0)[23, 0]
    assert rows.at(looks, "S2").mean(0)[23, 3] > 0.3
    through = path_patch(real_model, rows, other.ids, [head_location(real_model, "attn_q", 23, 0, "END")]).mean(0)
    assert divmod(int(through.argmin()), 9) == (20, 0)
    assert not through[23:].any()
    assert torch.isfinite(through).all()

"""The actor's start."""

from __future__ import annotations

import pytest
import torch

from trimtab.errors import UserError
from trimtab.policies.config import PolicyConfig
from trimtab.policies.networks import Actor, Head
from trimtab.policies.source import masked_log_softmax, with_no_edit


@pytest.mark.parametrize("head", ["full", "decoder"])
@pytest.mark.parametrize(("share", "allowed"), [(0.25, 40), (0.5, 400), (0.9, 3)])
def test_an_untrained_actor_leaves_the_activation_alone_in_the_share_asked_for(head: Head, share: float, allowed: int):
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(400, 24, generator=generator), dim=1)
    actor = Actor(directions, head=head, rank=8)
    actor.lean_to_no_edit(share, allowed)
    mask = torch.zeros(64, 400, dtype=torch.bool)
    mask[:, :allowed] = True
    logp = masked_log_softmax(actor(torch.randn(64, 24, generator=generator)), with_no_edit(mask))
    assert float(logp[:, -1].detach().exp().mean()) == pytest.approx(share, abs=0.03)
    assert float(logp[:, :allowed].detach().exp().sum(1).mean()) == pytest.approx(1 - share, abs=0.03)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares_say_so(share: float):
    with pytest.raises(UserError, match=r"initial_no_edit .*: it must be from 0 to below 1; change it"):
        PolicyConfig(task="ioi", initial_no_edit=share)

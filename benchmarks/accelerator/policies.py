"""One iteration of training a policy, as on IOI: many one-token rollouts, then PPO's update."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Iterator

import torch
from figures import in_turn
from rollout import Arm, Batch, ioi_like

from accelerator.decoding import middle_site, random_sae
from accelerator.launches import per_step
from accelerator.sections import Part, Row, Setup
from trimtab.control.masks import PromptFirings
from trimtab.policies.networks import Policy
from trimtab.policies.ppo import Learner, PPOConfig


def parts(setup: Setup) -> Iterable[Part]:
    """The first model."""
    shape = setup.sizes.shapes[0]
    yield Part(name=shape, measure=functools.partial(iteration_rows, setup, shape), batch=setup.sizes.sentences)


def iteration_rows(setup: Setup, shape: str, sentences: int) -> Iterator[Row]:
    """Iterations per second, over unsteered decodes of the same rows."""
    model, sizes = setup.model(shape), setup.sizes
    sae = random_sae(model, middle_site(model), sizes.policy_features)
    policy = Policy.build(sae.directions, seed=0).to(model.device)
    firings = PromptFirings(model, sae.info.site, sae)
    batch = Batch(model, sae, policy, firings, ioi_like(sentences), repeats=sizes.copies, new_tokens=1)
    learner, generator = Learner(policy, PPOConfig()), torch.Generator().manual_seed(0)

    def iteration() -> None:
        rollouts, source = batch.rollout(Arm("accumulated"))
        with torch.enable_grad():
            learner.update(source.decisions, rollouts.reward, generator=generator)
        policy.normaliser.show(source.decisions.observation[source.decisions.valid])

    arms = {"iteration": iteration, "rollouts": lambda: batch.rollout(Arm("accumulated")), "unsteered": batch.unsteered}
    for run in (*arms.values(), iteration):
        run()
    times = in_turn(arms, sizes.repeats, setup.device)
    seconds = statistics.median(times["iteration"])
    more = {"ms": round(1e3 * seconds, 2), "rollouts_ms": round(1e3 * statistics.median(times["rollouts"]), 2)}
    if setup.cuda:
        more |= per_step(iteration)._asdict()
    over = statistics.median(b / a for a, b in zip(times["iteration"], times["unsteered"], strict=True))
    yield Row(
        what=f"{shape}, {batch.rows} one-token rollouts", rate=1 / seconds, unit="iterations/s",
        over={"unsteered": over}, more=more,
    )  # fmt: skip

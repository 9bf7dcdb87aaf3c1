"""`trimtab policy steer`: a trained policy on prompts of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import UserError
from trimtab.lm import DecodingConfig
from trimtab.policies.setup import Setup
from trimtab.policies.train import load_policy
from trimtab.policies.trained import read_policy_config
from trimtab.runs import read_record
from trimtab.steering import SteerResult, steer
from trimtab.steering.trace_replay import check_hash
from trimtab.tasks import PromptTask, find_task


@dataclass(frozen=True, kw_only=True)
class PolicySteerConfig(DecodingConfig):
    """Continue prompts unsteered and under a trained policy."""

    policy: Path
    """Run of `policy train`."""
    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    chat: bool | None = None
    """Put each prompt into the model's chat template, as one user turn; as in training if not given."""
    samples: int = 1
    """Continuations per prompt; more than one needs a temperature."""
    greedy: bool = True
    """Take the policy's most likely action at each token, as evaluations do, instead of drawing one."""
    stop: tuple[str, ...] = ()
    """End a text that contains one of these."""
    kl: bool = True
    """Measure each edit's effect on the next-token distribution; takes one more pass over the texts."""


def run_policy_steer(config: PolicySteerConfig) -> SteerResult:
    """Load the model, SAE and policy of a run, and steer. The task's data are not needed.

    Raises:
        UserError: there is no such run, model or SAE are not the run's, or something in the config is wrong.
    """
    if not config.prompt:
        raise UserError("the prompts", "there is none", "give at least one text behind the run")
    trained, record = read_policy_config(config.policy), read_record(config.policy)
    model, sae = trained.load()
    check_hash(config.policy, "model", record, model.fingerprint)
    check_hash(config.policy, "dictionary", record, sae.fingerprint)
    setup = Setup.with_parts(
        trained, model, sae, PromptTask(list(dict.fromkeys(config.prompt)), lambda prompt, answer: 0.0)
    )
    source = setup.source(load_policy(setup, config.policy), greedy=config.greedy)
    chat = config.chat
    if chat is None:
        chat = record["chat"] if "chat" in record else find_task(trained.task).chat
    return steer(
        model, source, config.prompt, decoding=config.decode_config(stop=config.stop), chat=chat,
        samples=config.samples, kl=config.kl,
    )  # fmt: skip

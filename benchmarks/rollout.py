"""Speed of rollouts: a policy that picks a feature at every token, against decoding the same batch unsteered.

Pinned: the default model and SAE, a policy with random weights at relative dose 0.5, no row ends early, prompts in the
cache for both sides. Two batches: 64 prompts with 64 new tokens each, and, as in training on IOI, 32 sentences eight
times each with one new token.

- `ratio`: tokens per second of `policies.roll_out` under the mask `accumulated`, over those of `decode` without a
  source on the same prompts, each copy as a row of its own. A rollout also encodes activations, masks, draws, edits,
  logs and scores; it feeds what lies below the site once for all copies, which no row of its own can.
- `copies_ratio`: `ratio` where copies are one call with `repeats` on the unsteered side, too. These are all alike and
  are fed once altogether; steered ones part at the site. For several copies only.
- `none_ratio`: the same under the mask `none`.
- `kl_ratio`: as `ratio`, with the divergence from the unsteered model at every token (`kl_penalty`).
- `cpu.…`: each of them by processor time, which other work on the machine disturbs less.
- `one_token.…`: all of these for the batch of one-token answers.

All sides use the same engine, threads and dtype. Each repeat measures unsteered, the three rollouts, and unsteered
again (the rollouts in reverse order every other time); figures are medians over the repeats of per-repeat ratios, each
rollout being compared with the mean of the two unsteered calls.

    python benchmarks/rollout.py --json
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from decode import OPENINGS, TOPICS
from figures import Taken, arguments, device_options, measured_on, print_result, timed

from trimtab.control.masks import MaskKind, PromptFirings, build_mask
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import SAE, load_dictionary
from trimtab.lm import DecodeConfig, LanguageModel, PromptCache, decode, load_model
from trimtab.policies.networks import Policy
from trimtab.policies.rollout import Rollouts, roll_out
from trimtab.policies.source import PolicySource
from trimtab.tasks import Item, Outcome, Task
from trimtab.tasks.ioi import CUES, sentences


class Arm(NamedTuple):
    """A rollout to measure."""

    mask: MaskKind
    kl_penalty: float = 0.0


ARMS = {"ratio": Arm("accumulated"), "none_ratio": Arm("none"), "kl_ratio": Arm("accumulated", 0.1)}


class Texts(Task):
    """Any prompts; an answer that begins with a letter is worth 1."""

    name: ClassVar[str] = "texts"
    chat: ClassVar[bool] = False

    @classmethod
    def of(cls, prompts: list[str]) -> Texts:
        return cls({"test": [Item(id=str(i), prompt=text, answer="") for i, text in enumerate(prompts)]})

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        return Outcome(reward=float(text.strip()[:1].isalpha()), correct=None, malformed=False)


class Batch:
    """Prompts, their cache, and the calls that are compared on them."""

    def __init__(
        self, model: LanguageModel, sae: SAE, policy: Policy, firings: PromptFirings, prompts: list[str],
        *, repeats: int, new_tokens: int,
    ) -> None:  # fmt: skip
        task = Texts.of(prompts)
        self.model, self.sae, self.policy, self.firings, self.repeats = model, sae, policy, firings, repeats
        self.prompts = TaskPrompts.of(model, task, task.items("test"), max_new_tokens=new_tokens)
        self.cache = PromptCache(model)
        self.rows = repeats * len(prompts)
        self.tokens = self.rows * new_tokens

    def unsteered(self) -> None:
        config = DecodeConfig(max_new_tokens=self.prompts.max_new_tokens, batch_size=self.rows)
        rows = [prompt for prompt in self.prompts.ids for _ in range(self.repeats)]
        decode(self.model, rows, config, prompt_cache=self.cache)

    def unsteered_copies(self) -> None:
        config = DecodeConfig(max_new_tokens=self.prompts.max_new_tokens, batch_size=self.rows)
        decode(self.model, self.prompts.ids, config, repeats=self.repeats, prompt_cache=self.cache)

    def source(self, mask: MaskKind) -> PolicySource:
        return PolicySource(self.policy, self.sae, build_mask(mask, self.sae, prompt_firings=self.firings), 0.5)

    def rollout(self, arm: Arm) -> tuple[Rollouts, PolicySource]:
        source = self.source(arm.mask)
        rollouts = roll_out(
            self.model, source, self.prompts, repeats=self.repeats, batch_size=self.rows, kl_penalty=arm.kl_penalty,
            prompt_cache=self.cache,
        )  # fmt: skip
        return rollouts, source

    def measure(self, repeats: int, calls: int) -> dict[str, Any]:
        """Tokens per second, ratios, and what was done."""

        def cost(run: Callable[[], object]) -> Taken:
            taken = timed(lambda: [run() for _ in range(calls)], self.model.device)
            return Taken(taken.wall / calls, taken.cpu / calls)

        ratios: dict[str, list[float]] = {f"{prefix}{name}": [] for prefix in ("", "cpu.") for name in ARMS}
        rates: dict[str, list[float]] = {name: [] for name in ("unsteered", *ARMS)}
        for repeat in range(repeats):
            before = cost(self.unsteered)
            order = list(ARMS) if repeat % 2 == 0 else list(reversed(ARMS))
            taken = {name: cost(lambda name=name: self.rollout(ARMS[name])) for name in order}
            behind = cost(self.unsteered)
            plain = Taken(*((a + b) / 2 for a, b in zip(before, behind, strict=True)))
            for name, one in taken.items():
                ratios[name].append(plain.wall / one.wall)
                ratios[f"cpu.{name}"].append(plain.cpu / one.cpu)
                rates[name].append(self.tokens / one.wall)
            rates["unsteered"].append(self.tokens / plain.wall)
            if self.repeats > 1:
                copies = cost(self.unsteered_copies)
                ratios.setdefault("copies_ratio", []).append(copies.wall / taken["ratio"].wall)
                ratios.setdefault("cpu.copies_ratio", []).append(copies.cpu / taken["ratio"].cpu)
                rates.setdefault("unsteered_copies", []).append(self.tokens / copies.wall)
        last, source = self.rollout(ARMS["kl_ratio"])
        assert last.kl is not None
        decisions = source.decisions
        return {
            **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
            **{f"{name}_range": [round(f(values), 3) for f in (min, max)] for name, values in ratios.items()},
            "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
            "edited_share": round(float((decisions.action[decisions.valid] < self.sae.n_features).float().mean()), 4),
            "allowed_features": round(float(decisions.n_allowed[decisions.valid].float().mean()), 1),
            "kl_per_token": round(float(last.kl.sum() / decisions.valid.sum()), 4),
            "rows": self.rows, "new_tokens": self.prompts.max_new_tokens, "prompts": len(self.prompts),
        }  # fmt: skip


def ioi_like(count: int) -> list[str]:
    """Sentences of the IOI mixture, each cue in turn."""
    found = (sentence.text for sentence in sentences(0, 100 * count))
    texts = list(itertools.islice(dict.fromkeys(found), count))
    return [f"{cue} {text}" for text, cue in zip(texts, itertools.cycle(CUES.values()), strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sae", default="default")
    parser.add_argument("--batch", type=int, default=64, help="prompts of the long batch")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--sentences", type=int, default=32, help="prompts of the one-token batch")
    parser.add_argument("--copies", type=int, default=8, help="rows per sentence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5, help="calls per measurement of the one-token batch")
    parser.add_argument("--only", choices=("long", "one_token"), help="measure one of the batches")
    device_options(parser)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--json", action="store_true")
    args = arguments(parser)

    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    model.eos_ids = frozenset()  # no row ends early
    sae = load_dictionary(args.sae, model=model, device=model.device)
    policy = Policy.build(sae.directions, seed=0).to(model.device)
    firings = PromptFirings(model, sae.info.site, sae)
    texts = [f"{opening} {topic}" for topic in TOPICS for opening in OPENINGS]
    texts = [f"{text} {i // len(texts)}" if i >= len(texts) else text for i, text in
             enumerate(itertools.islice(itertools.cycle(texts), args.batch))]  # fmt: skip
    batches = {
        "long": Batch(model, sae, policy, firings, texts, repeats=1, new_tokens=args.new_tokens),
        "one_token": Batch(model, sae, policy, firings, ioi_like(args.sentences), repeats=args.copies, new_tokens=1),
    }
    result: dict[str, Any] = {}
    for name, batch in batches.items():
        if args.only in (None, name):
            short = Batch(model, sae, policy, firings, [i.prompt for i in batch.prompts.items],
                          repeats=batch.repeats, new_tokens=min(2, batch.prompts.max_new_tokens))  # fmt: skip
            short.cache = batch.cache
            _, source = short.rollout(ARMS["kl_ratio"])  # warm-up; fills the caches of prompts
            short.unsteered()
            decisions = source.decisions
            policy.normaliser.show(decisions.observation[decisions.valid])
            found = batch.measure(args.repeats, args.calls if name == "one_token" else 1)
            result |= found if name == "long" else {f"one_token.{key}": value for key, value in found.items()}
    result |= {
        "repeats": args.repeats, "calls": args.calls, "model": args.model, "sae": args.sae,
        "features": sae.n_features, "dtype": args.dtype, **measured_on(args.device, args.dtype),
    }  # fmt: skip
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    main()

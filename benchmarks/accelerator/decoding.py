"""Decoding: `generate`, trimtab step by step and several steps ahead, static steering and a policy at each token."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator

import torch
from decode import OneDirection, floor, generate_of
from figures import in_turn

from accelerator.launches import per_step
from accelerator.sections import Part, Row, Setup
from trimtab.control.masks import PromptFirings, build_mask
from trimtab.dictionaries import DictionaryInfo, Standard
from trimtab.lm import DecodeConfig, LanguageModel, decode
from trimtab.policies.networks import Policy
from trimtab.policies.source import PolicySource

PROMPT_TOKENS = (8, 16)
"""Of the shortest and the longest prompt that is decoded."""


def parts(setup: Setup) -> Iterable[Part]:
    """Each model with many rows and with one."""
    for rows in setup.sizes.rows:
        for shape in setup.sizes.shapes:
            measure = functools.partial(decode_rows, setup, shape)
            yield Part(name=f"{shape} {rows} rows", measure=measure, batch=rows)


def launch_parts(setup: Setup) -> Iterable[Part]:
    """Launches and waits of a step; there is nothing to count on a CPU."""
    if setup.cuda:
        for shape in setup.sizes.shapes:
            yield Part(name=shape, measure=functools.partial(launch_rows, setup, shape), batch=setup.sizes.rows[0])


def middle_site(model: LanguageModel) -> str:
    """Where models of random weights are read and steered."""
    return f"resid_post.{model.n_layers // 2}"


def random_prompts(model: LanguageModel, count: int, shortest: int, longest: int) -> list[list[int]]:
    """Tokens at random, none of them special; lengths go round."""
    generator, first = torch.Generator().manual_seed(0), max(model.tokenizer.all_special_ids) + 1
    spread = longest - shortest + 1
    return [
        torch.randint(first, len(model.tokenizer), (shortest + 5 * i % spread,), generator=generator).tolist()
        for i in range(count)
    ]


def random_sae(model: LanguageModel, site: str, n: int) -> Standard:
    """Unit directions; encoder and decoder are the same."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(n, model.d_model, generator=generator), dim=1)
    zeros = torch.zeros(n), torch.zeros(model.d_model)
    info = DictionaryInfo(architecture="standard", site=site)
    return Standard(rows.T.contiguous(), zeros[0], rows, zeros[1], info=info).to(model.device)


def arms_of(setup: Setup, model: LanguageModel, rows: int, new_tokens: int) -> dict[str, Callable[[], object]]:
    """Every way of decoding the same prompts."""
    sizes = setup.sizes
    prompts = random_prompts(model, rows, *PROMPT_TOKENS)
    config = DecodeConfig(max_new_tokens=new_tokens, stop_at_eos=False, batch_size=rows)
    site = model.site(middle_site(model))
    static = OneDirection(site, model.d_model, model.device)
    sae = random_sae(model, str(site), sizes.policy_features)
    policy = Policy.build(sae.directions, seed=0).to(model.device)
    firings = PromptFirings(model, site, sae)

    def choosing() -> object:
        source = PolicySource(policy, sae, build_mask("accumulated", sae, prompt_firings=firings), 0.5)
        return decode(model, prompts, config, source, ahead=sizes.ahead)

    return {
        "generate": generate_of(model, prompts, new_tokens),
        "steps": lambda: decode(model, prompts, config, ahead=1),
        "ahead": lambda: decode(model, prompts, config, ahead=sizes.ahead),
        "static": lambda: decode(model, prompts, config, static, ahead=sizes.ahead),
        "policy": choosing,
    }


def decode_rows(setup: Setup, shape: str, rows: int) -> Iterator[Row]:
    """A line for each way: over `generate`, and steered over unsteered."""
    model, sizes = setup.model(shape), setup.sizes
    arms = arms_of(setup, model, rows, sizes.new_tokens)
    for run in arms.values():  # caches of prompts, captured graphs
        run()
    times = in_turn(arms, sizes.decode_repeats, setup.device)
    limit = floor(model, rows)

    def ratio(name: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(times[name], times[other], strict=True))

    for name in arms:
        rate = rows * sizes.new_tokens / statistics.median(times[name])
        over = {} if name == "generate" else {"generate": ratio(name, "generate")}
        if name in ("static", "policy"):
            over["unsteered"] = ratio(name, "ahead")
        elif name == "ahead":
            over["steps"] = ratio(name, "steps")
        yield Row(
            what=f"{shape} {rows} rows, {name}", rate=rate, unit="tokens/s", over=over, of_floor=rate / limit,
            more={"ahead": sizes.ahead},
        )  # fmt: skip


def launch_rows(setup: Setup, shape: str, rows: int) -> Iterator[Row]:
    """Launches, graphs and waits of a decode, shared out among its steps."""
    model = setup.model(shape)
    steps = setup.sizes.profiled_tokens
    for name, run in arms_of(setup, model, rows, steps).items():
        run()
        found = per_step(run, steps)
        yield Row(what=f"{shape} {rows} rows, {name}", rate=found.launches, unit="launches/step", more=found._asdict())

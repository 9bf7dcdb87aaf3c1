"""Decoding: `generate`, the plain model's steps, trimtab step by step and several steps ahead, static steering and a
policy at each token; at several lengths; what many decodes leave behind."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from decode import OneDirection, floor, generate_of
from figures import in_turn

from accelerator.launches import per_step
from accelerator.operations import MODEL, of_a_step
from accelerator.plain_decoding import PlainSteps
from accelerator.sections import Part, Row, Setup, say
from trimtab.control.masks import PromptFirings, build_mask
from trimtab.dictionaries import DictionaryInfo, Standard
from trimtab.lm import DecodeConfig, LanguageModel, decode
from trimtab.lm.steps_ahead import LENGTHS
from trimtab.policies.networks import Policy
from trimtab.policies.source import PolicySource

PROMPT_TOKENS = (8, 16)
"""Of the shortest and the longest prompt that is decoded."""
PLAIN = "plain steps"
"""The model's own steps, which on CUDA are one captured graph."""
SETTLED = 10
"""Decodes after which nothing more should be kept."""


def parts(setup: Setup) -> Iterable[Part]:
    """Each model with many rows and with one."""
    for rows in setup.sizes.rows:
        for shape in setup.sizes.shapes:
            measure = functools.partial(decode_rows, setup, shape)
            yield Part(name=f"{shape} {rows} rows", measure=measure, batch=rows)


def length_parts(setup: Setup) -> Iterable[Part]:
    """The first model behind prompts of several lengths, and so with caches of several sizes."""
    shape = setup.sizes.shapes[0]
    for length in setup.sizes.lengths:
        measure = functools.partial(length_rows, setup, shape, length)
        yield Part(name=f"{shape} {length} tokens", measure=measure, batch=setup.sizes.rows[0])


def leak_parts(setup: Setup) -> Iterable[Part]:
    """The smallest shape, since it is decoded so often."""
    yield Part(name="tiny", measure=functools.partial(leak_rows, setup), batch=setup.sizes.leak_rows)


def launch_parts(setup: Setup) -> Iterable[Part]:
    """Launches and waits of a step; on a CPU operations, each of which is a launch elsewhere."""
    counted = launch_rows if setup.cuda else operation_rows
    for shape in setup.sizes.shapes:
        yield Part(name=shape, measure=functools.partial(counted, setup, shape), batch=setup.sizes.rows[0])


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


def capacity_of(tokens: int) -> int:
    """Tokens that trimtab's cache of a fixed size holds for so many."""
    capacity = LENGTHS
    while capacity < tokens:
        capacity *= 2
    return capacity


def arms_of(
    setup: Setup, model: LanguageModel, rows: int, new_tokens: int, prompt_tokens: tuple[int, int] = PROMPT_TOKENS
) -> dict[str, Callable[[], object]]:
    """Every way of decoding the same prompts."""
    sizes = setup.sizes
    prompts = random_prompts(model, rows, *prompt_tokens)
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
    try:
        arms[PLAIN] = PlainSteps(model, rows, sizes.new_tokens, capacity_of(PROMPT_TOKENS[1] + sizes.new_tokens))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # it cannot be captured
        say(f"decode {shape}: no {PLAIN}: {' '.join(str(error).split())[:300]}")
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
            over |= {PLAIN: ratio(name, PLAIN)} if PLAIN in arms else {}
        yield Row(
            what=f"{shape} {rows} rows, {name}", rate=rate, unit="tokens/s", over=over, of_floor=rate / limit,
            more={"ahead": sizes.ahead},
        )  # fmt: skip


def length_rows(setup: Setup, shape: str, length: int, rows: int) -> Iterator[Row]:
    """Several steps ahead behind prompts of one length, prefill included, over `generate`."""
    model, sizes = setup.model(shape), setup.sizes
    every = arms_of(setup, model, rows, sizes.new_tokens, (length, length))
    arms = {name: every[name] for name in ("generate", "ahead")}
    for run in arms.values():
        run()
    times = in_turn(arms, sizes.decode_repeats, setup.device)
    yield Row(
        what=f"{shape} {rows} rows, {length} tokens of prompt",
        rate=rows * sizes.new_tokens / statistics.median(times["ahead"]), unit="tokens/s",
        over={"generate": statistics.median(b / a for a, b in zip(times["ahead"], times["generate"], strict=True))},
        more={"ahead": sizes.ahead, "cache": capacity_of(length + sizes.new_tokens)},
    )  # fmt: skip


def held(setup: Setup) -> dict[str, int]:
    """What is in memory: bytes of a CUDA device, and Python's objects."""
    gc.collect()
    found = {"objects": len(gc.get_objects())}
    if setup.cuda:
        torch.cuda.synchronize(setup.device)
        found |= {
            "allocated": torch.cuda.memory_allocated(setup.device),
            "reserved": torch.cuda.memory_reserved(setup.device),
        }
    return found


def leak_rows(setup: Setup, rows: int) -> Iterator[Row]:
    """What is held after many decodes over what was after a few; fewer than are asked for where time is short."""
    model, sizes = setup.model("tiny"), setup.sizes
    arms = arms_of(setup, model, rows, sizes.leak_tokens)
    began, done, settled = time.monotonic(), 0, dict[str, int]()
    while done < sizes.leak_decodes and (done < 2 * SETTLED or time.monotonic() - began < sizes.leak_seconds):
        arms["static" if done % 2 else "ahead"]()
        done += 1
        if done == SETTLED:
            settled = held(setup)
    seconds, found = time.monotonic() - began, held(setup)
    more = {f"{name} more than after {SETTLED}": found[name] - settled[name] for name in found}
    yield Row(what=f"tiny {rows} rows, {done} decodes", rate=done / seconds, unit="decodes/s", more=more)


def launch_rows(setup: Setup, shape: str, rows: int) -> Iterator[Row]:
    """Launches, graphs and waits of a decode, shared out among its steps."""
    model = setup.model(shape)
    steps = setup.sizes.profiled_tokens
    for name, run in arms_of(setup, model, rows, steps).items():
        run()
        found = per_step(run, steps)
        yield Row(what=f"{shape} {rows} rows, {name}", rate=found.launches, unit="launches/step", more=found._asdict())


def operation_rows(setup: Setup, shape: str, rows: int) -> Iterator[Row]:
    """Operations of a step that is taken ahead, beside those of the model's forward pass."""
    model, steps = setup.model(shape), setup.sizes.profiled_tokens
    for name in ("ahead", "static", "policy"):
        counts = of_a_step(lambda tokens, name=name: arms_of(setup, model, rows, tokens)[name](), steps)
        own = counts.pop(MODEL)
        yield Row(
            what=f"{shape} {rows} rows, {name}", rate=round(sum(counts.values()), 2), unit="operations/step",
            more={"model": own, **counts},
        )  # fmt: skip

"""Prompts fed in bulk, and their keys and values kept, beside one plain batched forward pass of them."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Iterator

from figures import bandwidth, in_turn

from accelerator.decoding import random_prompts
from accelerator.sections import Part, Row, Setup
from trimtab.lm import DecodeConfig, PromptCache, decode
from trimtab.lm.batch import TokenBatch


def parts(setup: Setup) -> Iterable[Part]:
    """One model."""
    shape = setup.sizes.shapes[-1]
    yield Part(name=shape, measure=functools.partial(prompt_rows, setup, shape), batch=setup.sizes.rows[0])


def prompt_rows(setup: Setup, shape: str, rows: int) -> Iterator[Row]:
    """Lines for `decode` of one token, a prompt cache that is filled, and one that is read."""
    model, sizes = setup.model(shape), setup.sizes
    prompts = random_prompts(model, rows, max(2, 3 * sizes.prompt_tokens // 4), sizes.prompt_tokens)
    config = DecodeConfig(max_new_tokens=1, stop_at_eos=False, batch_size=rows)
    batch = TokenBatch.pad(prompts, model.pad_id, model.device)
    held = PromptCache(model, batch_size=rows, max_bytes=2**40)
    reserve = sizes.prompt_tokens + sizes.new_tokens

    def plain() -> None:
        model.hf(
            input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip

    def filled(together: bool) -> None:
        PromptCache(model, batch_size=rows, together=together).load(prompts, reserve)

    arms = {
        "plain forward": plain,
        "prefill": lambda: decode(model, prompts, config),
        "prompt cache, filled": lambda: filled(False),
        "prompt cache, filled together": lambda: filled(True),
        "prompt cache, read": lambda: held.load(prompts, reserve),
    }
    for run in arms.values():
        run()
    times = in_turn(arms, sizes.repeats, setup.device)
    tokens = sum(map(len, prompts))
    kept = [t for layer in held.load(prompts[:1], 1).growing for t in (layer.keys, layer.values) if t is not None]
    bytes_per_token = sum(t.shape[1] * t.shape[3] * t.element_size() for t in kept)
    for name, taken in times.items():
        rate = tokens / statistics.median(taken)
        over = statistics.median(b / a for a, b in zip(taken, times["plain forward"], strict=True))
        reads = name == "prompt cache, read"
        yield Row(
            what=f"{shape} {rows} rows, {name}", rate=rate, unit="tokens/s",
            over={} if name == "plain forward" else {"plain forward": over},
            of_floor=2 * rate * bytes_per_token / bandwidth(setup.device) if reads else None,  # read and written
        )  # fmt: skip

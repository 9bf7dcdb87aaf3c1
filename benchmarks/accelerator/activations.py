"""Harvest beside the truncated forward passes, and features scored beside the products of the layers above."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Iterator

import torch
from harvest import Harvests, read_corpus
from score_features import ALPHA, RANDOM_LENGTH, Scored

from accelerator.decoding import middle_site, random_sae
from accelerator.sections import Part, Row, Setup
from trimtab.activations import HarvestOptions
from trimtab.selection import NEUTRAL_PREFIX


def harvest_parts(setup: Setup) -> Iterable[Part]:
    """One site of each model."""
    for shape in setup.sizes.shapes:
        yield Part(
            name=shape, measure=functools.partial(harvest_rows, setup, shape), batch=setup.sizes.harvest_batch
        )  # fmt: skip


def scoring_parts(setup: Setup) -> Iterable[Part]:
    """One model."""
    shape = setup.sizes.shapes[-1]
    yield Part(name=shape, measure=functools.partial(scoring_rows, setup, shape), batch=setup.sizes.score_batch)


def harvest_rows(setup: Setup, shape: str, batch: int) -> Iterator[Row]:
    """From tokens to shards on the disk of temporary files."""
    model, sizes = setup.model(shape), setup.sizes
    site = model.site(middle_site(model))
    options = HarvestOptions(context=sizes.context, batch_size=batch)
    harvests = Harvests(model, [site], read_corpus(model, [], sizes.harvest_tokens), options)
    harvests.plain()
    harvests.harvested([site])
    ratios, rates = [], []
    for _ in range(sizes.repeats):
        before, own, behind = harvests.plain(), harvests.harvested([site]), harvests.plain()
        ratios.append((before.wall + behind.wall) / 2 / own.wall)
        rates.append(harvests.tokens / own.wall)
    yield Row(
        what=f"{shape} {site}", rate=statistics.median(rates), unit="tokens/s",
        over={"truncated forward": statistics.median(ratios)},
        more={"same_activations": harvests.same_activations(), "tokens": harvests.tokens},
    )  # fmt: skip


def scoring_rows(setup: Setup, shape: str, batch: int) -> Iterator[Row]:
    """Delta-confidence of random directions at a prefix's last token."""
    model, sizes = setup.model(shape), setup.sizes
    site = model.site(middle_site(model))
    directions = random_sae(model, str(site), sizes.features).directions
    coefficients = torch.full((sizes.features,), ALPHA * RANDOM_LENGTH)
    ids = model.encode_text(NEUTRAL_PREFIX)
    scored = Scored(model, site, ids, directions, coefficients, batch=batch, naive=sizes.naive)
    for run in (scored.naive, scored.products, scored.batched):
        run()
    rates = scored.rates(sizes.repeats)
    pairs = list(zip(rates["batched"], rates["naive"], rates["operations"], strict=True))
    yield Row(
        what=f"{shape} {sizes.features} features", rate=statistics.median(rates["batched"]), unit="features/s",
        over={"naive": statistics.median(own / naive for own, naive, _ in pairs)},
        of_floor=statistics.median(own * scored.operations / operations for own, _, operations in pairs),
    )  # fmt: skip

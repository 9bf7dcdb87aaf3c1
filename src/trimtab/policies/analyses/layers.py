"""The same training at several sites: the doses that each tolerates, and what kind of features each chooses.

The kind of a feature is read from text: the shares of its activation's variance that the identity of the current token,
of the previous token and of the document explain. Each share stands beside that of random live features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from trimtab.activations import read_documents, sample_text, tokenise
from trimtab.control.answers import ItemSet
from trimtab.control.task_prompts import TaskPrompts
from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.evaluation.documents import batches, pack
from trimtab.lm import LanguageModel, Site, capture
from trimtab.policies.analyses.variance_shares import variance_share
from trimtab.policies.networks import Policy
from trimtab.policies.setup import Setup
from trimtab.stats import Interval, bootstrap_difference, bootstrap_mean
from trimtab.steering import DirectionTable

FACTORS = ("token", "previous token", "document")
BATCH, BLOCK = 16, 4096
"""Sequences that are fed, and rows that are encoded, together."""


@dataclass(frozen=True)
class DosePoint:
    """The policy at one dose, on validation."""

    dose: float
    reward: Interval
    difference: Interval
    """To the unsteered model, paired by item."""
    kl: Interval
    """To the unsteered model, in nats per answer."""
    malformed: float


@dataclass(frozen=True)
class KindShare:
    """How much of the activation variance one factor explains."""

    factor: str
    """`token`, `previous token` or `document`."""
    chosen: Interval
    """Mean over the features that the policy chose, each once; bootstrapped over features."""
    by_use: float
    """Mean over choices: features count as often as they were chosen."""
    live: Interval
    """Mean over random live features."""
    difference: Interval
    """Chosen minus live."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One run."""

    run: str
    site: str
    unit: str
    trained_dose: float
    unsteered: Interval
    doses: tuple[DosePoint, ...]
    tolerated: float | None
    """The largest dose tried up to which no reward is clearly below the unsteered model's; None if the smallest is."""
    chosen_features: int
    kinds: tuple[KindShare, ...]
    rows: int
    """Tokens of text that the shares were computed on."""
    shares: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """Of each chosen feature, in the order of `FACTORS`; features that never fire in the text are left out."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """Activations of a text at a site, with what each row's groups are."""

    x: Float[torch.Tensor, "R d"]
    token: Int[np.ndarray, " R"]
    previous: Int[np.ndarray, " R"]
    document: Int[np.ndarray, " R"]


def text_rows(
    model: LanguageModel,
    site: Site,
    text: Sequence[str] = (),
    *,
    rows: int = 16_384,
    context: int = 128,
    seed: int = 0,
) -> TextRows:
    """Activations at tokens whose previous token is in the same document, taken from all over a text.

    Args:
        model: the model.
        site: where.
        text: files or directories; a sample that ships with trimtab by default.
        rows: how many, about.
        context: tokens of a sequence.
        seed: of the choice of sequences.

    Raises:
        UserError: there is no such text, or it does not fill a sequence.
    """
    corpus = tokenise(read_documents(list(text) or [sample_text()]), model.tokenizer)
    packed = pack(corpus, "all", 0.0, context, model)
    order = np.random.default_rng([seed, 5]).permutation(len(packed))[: max(1, -(-rows // (context - 2)))]
    special = [int(i) for i in model.tokenizer.all_special_ids]
    found: list[torch.Tensor] = []
    labels: list[NDArray[np.int64]] = []
    for batch in batches(packed, BATCH, special, model.device, np.sort(order)):
        ids, document = batch.tokens.ids, batch.document
        keep = batch.candidate.clone()
        keep[:, 1:] &= (document[:, 1:] == document[:, :-1]) & batch.candidate[:, :-1]
        keep[:, 0] = False
        previous = ids.roll(1, dims=1)
        found.append(capture(model, batch.tokens, [site])[site][keep].float())
        labels.append(torch.stack([ids[keep], previous[keep], document[keep]]).cpu().numpy())
    token, previous, document = np.concatenate(labels, axis=1)
    return TextRows(x=torch.cat(found), token=token, previous=previous, document=document)


@torch.no_grad()
def feature_shares(rows: TextRows, dictionary: Dictionary, features: Sequence[int]) -> Float[np.ndarray, "m factors"]:
    """Variance shares of features, in the order of `FACTORS`; NaN for features that never fire in the text."""
    ids = torch.tensor(list(features), dtype=torch.long, device=rows.x.device)
    codes = [dictionary.in_model_units(dictionary.encode_features(x, ids), x) for x in rows.x.split(BLOCK)]
    f = torch.cat(codes).float().cpu().numpy()
    return np.stack([variance_share(f, groups) for groups in (rows.token, rows.previous, rows.document)], axis=1)


def kind_shares(
    rows: TextRows, dictionary: Dictionary, uses: Counter[int], *, live_sample: int = 256, seed: int = 0
) -> tuple[tuple[KindShare, ...], dict[int, tuple[float, ...]]]:
    """Shares of chosen features beside those of live ones.

    Args:
        rows: of a text.
        dictionary: whose features were chosen.
        uses: how often each was.
        live_sample: live features to draw.
        seed: of the draw and of the bootstrap.

    Returns:
        A line per factor, and every chosen feature's shares.

    Raises:
        UserError: no chosen feature fires in the text.
    """
    chosen = sorted(uses)
    live = DirectionTable.of(dictionary).live_ids().numpy()
    drawn = np.random.default_rng([seed, 13]).choice(live, min(live_sample, len(live)), replace=False)
    of_chosen, of_live = feature_shares(rows, dictionary, chosen), feature_shares(rows, dictionary, drawn.tolist())
    known = np.asarray(~np.isnan(of_chosen).any(1))
    of_live = of_live[~np.isnan(of_live).any(1)]
    if not known.any() or not len(of_live):
        raise UserError("the kinds of features", "none of those chosen fires in the text", "give another --text")
    weight = np.array([uses[i] for i in chosen], dtype=np.float64)[known]
    of_chosen, kept = of_chosen[known], [i for i, k in zip(chosen, known, strict=True) if k]
    lines = tuple(
        KindShare(
            factor,
            bootstrap_mean(of_chosen[:, j], seed=seed),
            float(np.average(of_chosen[:, j], weights=weight)),
            bootstrap_mean(of_live[:, j], seed=seed),
            bootstrap_difference(of_chosen[:, j], of_live[:, j], paired=False, seed=seed),
        )
        for j, factor in enumerate(FACTORS)
    )
    return lines, {i: tuple(shares) for i, shares in zip(kept, of_chosen.tolist(), strict=True)}


def layer_report(
    setup: Setup,
    policy: Policy,
    prompts: TaskPrompts,
    rows: TextRows,
    *,
    run: str = "",
    factors: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    live_sample: int = 256,
    seed: int = 0,
) -> LayerReport:
    """Answer items under a policy at several doses and say what kind of features it chooses at its own.

    Args:
        setup: of its run.
        policy: the policy.
        prompts: validation items.
        rows: a text's activations at the run's site.
        run: its name.
        factors: doses, as multiples of the one it was trained with; that one is added if it is missing.
        live_sample: live features for the base rate.
        seed: of draws and bootstrap.
    """
    items = ItemSet.of(setup, prompts)
    unsteered = items.answer().reward
    points = []
    uses: Counter[int] = Counter()
    for factor in sorted({*factors, 1.0}):
        source = setup.source(policy, greedy=True, dose=factor * setup.dose)
        answers = items.answer(source, kl=True)
        assert answers.kl is not None
        points.append(
            DosePoint(
                factor * setup.dose,
                bootstrap_mean(answers.reward, seed=seed),
                bootstrap_difference(answers.reward, unsteered, seed=seed),
                bootstrap_mean(answers.kl.numpy(), seed=seed),
                float(np.mean([o.malformed for o in answers.outcomes])),
            )
        )
        if factor == 1.0:
            uses = Counter(answers.edits.feature[answers.edits.feature >= 0].tolist())
    tolerated = [point.dose for point in takewhile(lambda point: not point.difference.high < 0, points)]
    kinds: tuple[KindShare, ...] = ()
    shares: dict[int, tuple[float, ...]] = {}
    note = "" if uses else "the policy chose no feature"
    if uses:
        try:
            kinds, shares = kind_shares(rows, setup.dictionary, uses, live_sample=live_sample, seed=seed)
        except UserError as error:
            note = error.why
    return LayerReport(
        run=run,
        site=str(setup.site),
        unit=setup.unit,
        trained_dose=setup.dose,
        unsteered=bootstrap_mean(unsteered, seed=seed),
        doses=tuple(points),
        tolerated=tolerated[-1] if tolerated else None,
        chosen_features=len(uses),
        kinds=kinds,
        rows=len(rows.x),
        shares=shares,
        note=note,
    )

"""Test 3 of Makelov, Lange and Nanda 2024 for computations: which pairs of features make up an attention score?

With q = b_q + Σ_i f_i u_i + e_q and k = b_k + Σ_j g_j w_j + e_k a score is a sum of terms, one for each pair of parts.
Few terms that explain most of a score's variance over prompts say in a dictionary's words what a head looks for. Terms
with an error in them are no words of the dictionary: they count towards nothing. What all others together explain is
what the reconstruction explains, and few terms are held against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.errors import UserError
from trimtab.evaluation.circuits.circuit import Circuit
from trimtab.evaluation.circuits.patched_runs import Location
from trimtab.evaluation.supervised.approximation import FloatArray
from trimtab.evaluation.supervised.attention_result import (
    ALL,
    BOTH,
    DIFFERENCE,
    AttentionTerms,
    HeadTerms,
    Term,
    TermShare,
)
from trimtab.evaluation.supervised.attention_scores import (
    EVERY,
    KEYS,
    ScoredHead,
    check_scores,
    score_locations,
    scored_heads,
)
from trimtab.evaluation.supervised.cross_sections import Values, activations_of
from trimtab.evaluation.supervised.parts import ERROR, Parts, Splitters, n_parts, split, width_of
from trimtab.lm import LanguageModel
from trimtab.stats import Interval, bootstrap_mean, bootstrap_ratio_of_sums
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt

N_TERMS = (1, 2, 4, 8, 16, 32)
SHOWN = 8
"""Terms that a result names."""
MOST_PROMPTS = 2_000
"""By which terms are chosen."""
MOST_TERMS = 6_000_000
"""Of one key over prompts that are held at once: what two gigabytes hold."""
CHUNK, PRODUCTS = 200, 2_000_000
"""Prompts that are taken apart at once, and products of parts that are computed at once."""
N_RESAMPLES = 2_000
CONSTANT = 1e-9
"""A variance below this share of the mean square is rounding."""


class Terms(NamedTuple):
    """All terms of P scores that are not 0, as a list; pairs are numbered query part · parts of a key + key part."""

    pair: Tensor  # [m]
    prompt: Tensor  # [m]
    value: Tensor  # [m]
    allowed: Tensor  # [m] whether no error is in them

    @classmethod
    def of(cls, query: Parts, key: Parts, head: ScoredHead, position: str, rows: slice) -> Terms:
        """Terms of a head's score of a key, on some of its prompts, which are numbered from 0 on."""
        q, k = (
            head.through[place](parts.vectors, rows)
            for place, parts in ((head.query, query), (head.keys[position], key))
        )
        found: list[Terms] = []
        step = max(1, PRODUCTS // (q.shape[1] * k.shape[1]))
        for start in range(0, len(q), step):
            few = slice(start, start + step)
            which_q, which_k = query.which[few], key.which[few]
            value = head.scaling * q[few] @ k[few].transpose(1, 2)  # [p, a_q, a_k]
            pair = which_q[:, :, None] * key.n + which_k[:, None, :]
            allowed = (which_q != ERROR)[:, :, None] & (which_k != ERROR)[:, None, :]
            prompt, _, _ = at = value.nonzero(as_tuple=True)
            found.append(cls(pair[at], prompt + start, value[at], allowed[at]))
        return cls.joined(found)

    @classmethod
    def joined(cls, terms: Sequence[Terms]) -> Terms:
        """Terms of several."""
        return cls(*(torch.cat(parts) for parts in zip(*terms, strict=True)))

    def minus(self, other: Terms) -> Terms:
        """Terms of the difference of two scores; those of `other` have numbers below 0."""
        return Terms(
            torch.cat([self.pair, -1 - other.pair]),
            torch.cat([self.prompt, other.prompt]),
            torch.cat([self.value, -other.value]),
            torch.cat([self.allowed, other.allowed]),
        )

    def beside(self, other: Terms, n_prompts: int) -> Terms:
        """Terms of two scores of each prompt, those of `other` as scores of further prompts; numbered as by `minus`."""
        found = self.minus(other)
        further = torch.cat([self.prompt, other.prompt + n_prompts])
        sign = torch.cat([torch.ones_like(self.value), -torch.ones_like(other.value)])
        return found._replace(prompt=further, value=found.value * sign)

    def total(self, n_prompts: int, chosen: Bool[Tensor, " m"] | None = None) -> Float[Tensor, " P"]:
        """Per prompt the sum of some terms; of all by default."""
        value = self.value if chosen is None else self.value * chosen
        return value.new_zeros(n_prompts).index_add_(0, self.prompt, value)


def best_terms(terms: Terms, n_prompts: int, most: int) -> list[int]:
    """The pairs whose terms leave the least variance of the score over prompts, one after the other, at most so many.

    Pairs that would leave more are not taken.
    """
    pairs, at = terms.pair[terms.allowed].unique(return_inverse=True)
    prompt, value = terms.prompt[terms.allowed], terms.value[terms.allowed]

    def sums(of: Tensor) -> Float[Tensor, " pairs"]:
        return value.new_zeros(len(pairs)).index_add_(0, at, of)

    own = sums(value.square()) - sums(value).square() / n_prompts
    left = terms.total(n_prompts)
    chosen: list[int] = []
    taken = torch.zeros(len(pairs), dtype=torch.bool)
    while len(chosen) < min(most, len(pairs)):
        left = left - left.mean()
        gain = (2 * sums(left[prompt] * value) - own).masked_fill(taken, -torch.inf)
        best = int(gain.argmax())
        if gain[best] <= 1e-12 * left.square().sum():
            break
        chosen.append(int(pairs[best]))
        taken[best] = True
        here = at == best
        left = left.index_add(0, prompt[here], -value[here])
    return chosen


def attention_terms(
    model: LanguageModel,
    ioi: IOIDistribution,
    heads: Circuit | Sequence[tuple[int, int]],
    train: Sequence[IOIPrompt],
    test: Sequence[IOIPrompt],
    contenders: Mapping[str, Splitters],
    *,
    n_terms: Sequence[int] = N_TERMS,
    train_activations: Values | None = None,
    test_activations: Values | None = None,
    progress: Callable[[int], None] | None = None,
) -> AttentionTerms:
    """Split heads' attention scores from END to IO and to S1, and their difference, into terms.

    Args:
        model: with attention sites.
        ioi: where the prompts are from.
        heads: a circuit, whose name movers are meant, or (layer, query head) of each.
        train: prompts by which terms are chosen: by the first 2,000 at most, and by fewer where features are so dense
            that their terms do not fit into two gigabytes.
        test: other prompts, on which they are reported.
        contenders: by name, for every one of `score_locations`, supervised codes, a rotation or a dictionary. Terms of
            codes and rotations are pairs of factors, whatever their values; those of dictionaries pairs of features.
        n_terms: numbers of terms.
        train_activations: of the train prompts, or of their first 2,000, at those locations, if they have been read.
        test_activations: the same for the test prompts.
        progress: called with 1 for each head and contender that is done.

    Raises:
        UserError: no head; a contender that has nothing for a location, or something of another width; a number of
            terms below 1; scores that are capped or come about in a way that is not known; one prompt with millions of
            terms.
    """
    pairs = [(h.layer, h.head) for h in heads.of("name mover")] if isinstance(heads, Circuit) else list(heads)
    if not pairs:
        raise UserError("attention terms", "there is no name mover, or no head was given", "give heads")
    if not n_terms or min(n_terms) < 1:
        raise UserError(f"n_terms {tuple(n_terms)}", "at least one term must be chosen", "give numbers from 1 on")
    places, splits = score_locations(model, pairs), (train[:MOST_PROMPTS], test)
    x = [
        activations_of(model, ioi, prompts, places)
        if given is None
        else {place: given[place][: len(prompts)] for place in places}
        for prompts, given in zip(splits, (train_activations, test_activations), strict=True)
    ]
    _check_contenders(contenders, places, x[1])
    found = [scored_heads(model, ioi, prompts, pairs, of) for prompts, of in zip(splits, x, strict=True)]
    check_scores(model, ioi, test, found[1], x[1])
    results: list[HeadTerms] = []
    for name, contender in contenders.items():
        left: dict[str, list[_Residuals]] = {}
        for of_train, of_test in zip(*found, strict=True):
            rows = blocks(of_train, contender, x[0])[0]
            chosen = {
                score: _Chosen.of(scored, max(n_terms), rows.stop)
                for score, scored in terms_of(of_train, contender, splits[0], x[0], rows).items()
            }
            sums: dict[str, list[_Sums]] = {score: [] for score in chosen}
            for rows in blocks(of_test, contender, x[1]):
                for score, scored in terms_of(of_test, contender, test, x[1], rows).items():
                    sums[score].append(_Sums.of(scored, chosen[score].pairs))
            for score, of in chosen.items():
                measured, residuals = _measured(
                    name, of_test.name, score, of, _Sums.joined(sums[score], score), n_terms
                )
                results.append(measured)
                left.setdefault(score, []).append(residuals)
            if progress is not None:
                progress(1)
        if len(pairs) > 1:
            results += [_together(name, score, parts, n_terms) for score, parts in left.items()]
    return AttentionTerms(model=model.name, n_train=len(splits[0]), n_test=len(test), scores=tuple(results))


def _check_contenders(contenders: Mapping[str, Splitters], places: Sequence[Location], x: Values) -> None:
    if not contenders:
        raise UserError("attention terms", "there is no contender", "give codes or dictionaries")
    for name, contender in contenders.items():
        for place in places:
            size, width = width_of(contender[place], place) if place in contender else 0, x[place].shape[1]
            if not size:
                raise UserError(f"contender {name}", f"it has nothing for {place}", "fit or train it there, too")
            if size != width:
                why = f"its width at {place} is {size}, the site's is {width}"
                raise UserError(f"contender {name}", why, "use another")


class Scored(NamedTuple):
    """One score's terms, and what its pairs are called."""

    terms: Terms
    n: int  # observations: prompts, or twice as many
    name: Callable[[int], tuple[str, str, str]]  # of a pair: what of the query, what of the key, the key's position


def blocks(head: ScoredHead, contender: Splitters, x: Values) -> list[slice]:
    """Prompts one after the other, as many at once as have `MOST_TERMS` terms of a key.

    Raises:
        UserError: one prompt has more.
    """
    n = {place: n_parts(contender[place], x[place]) for place in (head.query, *head.keys.values())}
    counts = torch.stack([n[head.query] * n[place] for place in head.keys.values()]).max(0).values.tolist()
    if max(counts) > MOST_TERMS:
        raise UserError(
            f"attention terms of head {head.name}",
            f"{max(counts):,} pairs of active features in one prompt, at most {MOST_TERMS:,} fit",
            "use sparser dictionaries",
        )
    starts, held = [0], 0
    for row, count in enumerate(counts):
        if held + count > MOST_TERMS:
            starts.append(row)
            held = 0
        held += count
    return [slice(*ends) for ends in itertools.pairwise([*starts, len(counts)])]


def terms_of(
    head: ScoredHead, contender: Splitters, prompts: Sequence[IOIPrompt], x: Values, rows: slice = EVERY
) -> dict[str, Scored]:
    """Per score its terms, on some of the prompts; these are numbered from 0 on."""
    first, end, _ = rows.indices(len(prompts))
    n, parts = end - first, dict[str, list[Terms]]()
    called: dict[str, Callable[[int], tuple[str, str, str]]] = {}
    for start in range(first, end, CHUNK):
        few = slice(start, min(start + CHUNK, end))
        query, *keys = (
            split(contender[place], place, x[place][few], prompts[few]) for place in (head.query, *head.keys.values())
        )
        for position, key in zip(head.keys, keys, strict=True):
            terms = Terms.of(query, key, head, position, few)
            parts.setdefault(position, []).append(terms._replace(prompt=terms.prompt + (start - first)))
            called[position] = _namer(query, key, position)
    found = {position: Terms.joined(parts.pop(position)) for position in head.keys}
    io, s = (found[position] for position in KEYS)

    of_io, of_s = (called[position] for position in KEYS)
    of_any: Callable[[int], tuple[str, str, str]] = lambda pair: of_io(pair) if pair >= 0 else of_s(-1 - pair)  # noqa: E731
    return {
        BOTH: Scored(io.beside(s, n), len(KEYS) * n, of_any),
        DIFFERENCE: Scored(io.minus(s), n, of_any),
        **{position: Scored(terms, n, called[position]) for position, terms in found.items()},
    }


def _namer(query: Parts, key: Parts, position: str) -> Callable[[int], tuple[str, str, str]]:
    of_query, of_key, n = query.name, key.name, key.n  # the parts themselves are large
    return lambda pair: (of_query(pair // n), of_key(pair % n), position)


class _Chosen(NamedTuple):
    """The best terms of one head's score on train prompts."""

    pairs: list[int]
    names: list[tuple[str, str, str]]  # of the first
    n_terms: int  # there were
    n_train: int  # prompts

    @classmethod
    def of(cls, scored: Scored, most: int, n_train: int) -> _Chosen:
        pairs = best_terms(scored.terms, scored.n, most)
        n_terms = len(scored.terms.pair[scored.terms.allowed].unique())
        return cls(pairs, [scored.name(pair) for pair in pairs[:SHOWN]], n_terms, n_train)


class _Sums(NamedTuple):
    """Sums of terms on n observations."""

    score: Tensor  # [n] of all
    allowed: Tensor  # [n] of those without an error
    each: Tensor  # [T, n] the chosen terms themselves

    @classmethod
    def of(cls, scored: Scored, pairs: Sequence[int]) -> _Sums:
        terms, n = scored.terms, scored.n
        score = terms.total(n)
        each = [terms.total(n, terms.pair == pair) for pair in pairs]
        return cls(score, terms.total(n, terms.allowed), torch.stack(each) if each else score.new_zeros(0, n))

    @classmethod
    def joined(cls, blocks: Sequence[_Sums], score: str) -> _Sums:
        """Of all blocks of prompts, in order; where a prompt has two observations, all first ones come first."""
        keys = len(KEYS) if score == BOTH else 1
        return cls(
            *(
                torch.cat([part.unflatten(-1, (keys, -1)) for part in parts], -1).flatten(-2)
                for parts in zip(*blocks, strict=True)
            )
        )


class _Residuals(NamedTuple):
    """Of one head, per test prompt."""

    score: Tensor  # [P]
    n_terms: int
    n_train: int
    whole: Tensor  # [P] what the reconstruction leaves
    after: dict[int, Tensor]  # number of terms → what the best ones leave


def _measured(
    contender: str, head: str, score: str, chosen: _Chosen, test: _Sums, n_terms: Sequence[int]
) -> tuple[HeadTerms, _Residuals]:
    """What the terms that were chosen explain on test prompts."""
    value, each = test.score, list(test.each)
    after = {t: value - sum(each[:t], torch.zeros_like(value)) for t in n_terms}
    left = _Residuals(value, chosen.n_terms, chosen.n_train, value - test.allowed, after)
    first = tuple(
        Term(query=query, key=key, position=position, alone=_share([value - part], [value], score))
        for (query, key, position), part in zip(chosen.names, each, strict=False)
    )
    return _result(contender, head, score, [left], n_terms, first), left


def _together(contender: str, score: str, parts: Sequence[_Residuals], n_terms: Sequence[int]) -> HeadTerms:
    return _result(contender, ALL, score, parts, n_terms, ())


def _result(
    contender: str,
    head: str,
    score: str,
    parts: Sequence[_Residuals],
    n_terms: Sequence[int],
    terms: tuple[Term, ...],
) -> HeadTerms:
    values = [part.score for part in parts]
    return HeadTerms(
        contender=contender, head=head, score=score, n_terms=sum(part.n_terms for part in parts),
        n_train=min(part.n_train for part in parts),
        mean=bootstrap_mean(_by_prompt(torch.stack(values).mean(0), score), n_resamples=N_RESAMPLES),
        shares=tuple(TermShare(t=t, share=_share([part.after[t] for part in parts], values, score)) for t in n_terms),
        whole=_share([part.whole for part in parts], values, score), terms=terms,
    )  # fmt: skip


def _by_prompt(values: Float[Tensor, " P"], score: str) -> FloatArray:
    """The mean of each prompt's observations."""
    return (values.unflatten(0, (len(KEYS), -1)).mean(0) if score == BOTH else values).numpy()


def _share(left: Sequence[Float[Tensor, " P"]], values: Sequence[Float[Tensor, " P"]], score: str) -> Interval | None:
    """1 − Var(left) / Var(values), both summed over heads."""
    top, bottom = (
        _by_prompt(torch.stack([(x - x.mean()).square() for x in xs]).sum(0), score) for xs in (left, values)
    )
    if bottom.mean() <= CONSTANT * float(torch.stack(list(values)).square().mean()):
        return None
    return bootstrap_ratio_of_sums(top, bottom, transform=lambda ratio: 1 - ratio, n_resamples=N_RESAMPLES)

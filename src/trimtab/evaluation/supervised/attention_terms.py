"""Test 3 of Makelov, Lange and Nanda 2024 for computations: which pairs of features make up an attention score?

With q = b_q + Σ_i f_i u_i + e_q and k = b_k + Σ_j g_j w_j + e_k a score is a sum of terms, one for each pair of parts.
Few terms that explain most of a score's variance over prompts say in a dictionary's words what a head looks for. Terms
with an error in them are no words of the dictionary: they count towards nothing, and what all others together explain
is what any choice of them could be hoped to.
"""

from __future__ import annotations

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
    KEYS,
    ScoredHead,
    check_scores,
    score_locations,
    scored_heads,
)
from trimtab.evaluation.supervised.cross_sections import Values, activations_of
from trimtab.evaluation.supervised.parts import ERROR, Contender, Parts, split, width_of
from trimtab.lm import LanguageModel
from trimtab.stats import Interval, bootstrap_mean, bootstrap_ratio_of_sums
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt

N_TERMS = (1, 2, 4, 8, 16, 32)
SHOWN = 8
"""Terms that a result names."""
MOST_PAIRS = 20_000_000
"""Active pairs of one head's score over all prompts: what two gigabytes hold."""
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
    def of(cls, query: Parts, key: Parts, head: ScoredHead, position: str) -> Terms:
        """Terms of a head's score of a key.

        Raises:
            UserError: there are too many.
        """
        n = query.which.shape[1] * key.which.shape[1] * len(query.which)
        if n > MOST_PAIRS:
            raise UserError(
                f"attention terms of head {head.name}",
                f"{n:,} pairs of active features over all prompts, at most {MOST_PAIRS:,} fit",
                "give fewer prompts, or sparser dictionaries",
            )
        q, k = (
            head.through[place](parts.vectors) for place, parts in ((head.query, query), (head.keys[position], key))
        )
        value = head.scaling * q @ k.transpose(1, 2)  # [P, a_q, a_k]
        pair = query.which[:, :, None] * key.n + key.which[:, None, :]
        allowed = (query.which != ERROR)[:, :, None] & (key.which != ERROR)[:, None, :]
        prompt, _, _ = at = value.nonzero(as_tuple=True)
        return cls(pair[at], prompt, value[at], allowed[at])

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
    contenders: Mapping[str, Contender],
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
        train: prompts by which terms are chosen.
        test: other prompts, on which they are reported.
        contenders: by name, for every one of `score_locations`, supervised codes, a rotation or a dictionary. Terms of
            codes and rotations are pairs of factors, whatever their values; those of dictionaries pairs of features.
        n_terms: numbers of terms.
        train_activations: of the train prompts at those locations, if they have been read.
        test_activations: the same for the test prompts.
        progress: called with 1 for each head and contender that is done.

    Raises:
        UserError: no head; a contender that has nothing for a location, or something of another width; a number of
            terms below 1; scores that are capped or come about in a way that is not known; too many active features.
    """
    pairs = [(h.layer, h.head) for h in heads.of("name mover")] if isinstance(heads, Circuit) else list(heads)
    if not pairs:
        raise UserError("attention terms", "there is no name mover, or no head was given", "give heads")
    if not n_terms or min(n_terms) < 1:
        raise UserError(f"n_terms {tuple(n_terms)}", "at least one term must be chosen", "give numbers from 1 on")
    places, splits = score_locations(model, pairs), (train, test)
    x = [
        activations_of(model, ioi, prompts, places) if given is None else given
        for prompts, given in zip(splits, (train_activations, test_activations), strict=True)
    ]
    _check_contenders(contenders, places, x[1])
    found = [scored_heads(model, ioi, prompts, pairs, of) for prompts, of in zip(splits, x, strict=True)]
    check_scores(model, ioi, test, found[1], x[1])
    results: list[HeadTerms] = []
    for name, contender in contenders.items():
        left: dict[str, list[_Residuals]] = {}
        for of_train, of_test in zip(*found, strict=True):
            own = [
                terms_of(head, contender, prompts, of)
                for head, prompts, of in zip((of_train, of_test), splits, x, strict=True)
            ]
            for score in own[0]:
                measured, residuals = _measured(name, of_train.name, score, own[0][score], own[1][score], n_terms)
                results.append(measured)
                left.setdefault(score, []).append(residuals)
            if progress is not None:
                progress(1)
        if len(pairs) > 1:
            results += [_together(name, score, parts, n_terms) for score, parts in left.items()]
    return AttentionTerms(model=model.name, n_train=len(train), n_test=len(test), scores=tuple(results))


def _check_contenders(contenders: Mapping[str, Contender], places: Sequence[Location], x: Values) -> None:
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


def terms_of(head: ScoredHead, contender: Contender, prompts: Sequence[IOIPrompt], x: Values) -> dict[str, Scored]:
    """Per score its terms."""

    def parts_at(place: Location) -> Parts:
        return split(contender[place], place, x[place], prompts)

    n, query = len(prompts), parts_at(head.query)
    keys = {position: parts_at(place) for position, place in head.keys.items()}
    found = {position: Terms.of(query, key, head, position) for position, key in keys.items()}
    io, s = (found[position] for position in KEYS)

    def named(position: str) -> Callable[[int], tuple[str, str, str]]:
        key = keys[position]
        return lambda pair: (query.name(pair // key.n), key.name(pair % key.n), position)

    of_io, of_s = (named(position) for position in KEYS)
    of_any: Callable[[int], tuple[str, str, str]] = lambda pair: of_io(pair) if pair >= 0 else of_s(-1 - pair)  # noqa: E731
    return {
        BOTH: Scored(io.beside(s, n), len(KEYS) * n, of_any),
        DIFFERENCE: Scored(io.minus(s), n, of_any),
        **{position: Scored(terms, n, named(position)) for position, terms in found.items()},
    }


class _Residuals(NamedTuple):
    """Of one head, per test prompt."""

    score: Tensor  # [P]
    n_terms: int
    whole: Tensor  # [P] what the reconstruction leaves
    after: dict[int, Tensor]  # number of terms → what the best ones leave


def _measured(
    contender: str, head: str, score: str, train: Scored, test: Scored, n_terms: Sequence[int]
) -> tuple[HeadTerms, _Residuals]:
    """Choose on train prompts, measure on test prompts."""
    chosen = best_terms(train.terms, train.n, max(n_terms))
    terms, n_test = test.terms, test.n
    value = terms.total(n_test)
    each = [terms.total(n_test, terms.pair == pair) for pair in chosen]
    after = {t: value - sum(each[:t], torch.zeros_like(value)) for t in n_terms}
    left = _Residuals(
        value, len(train.terms.pair[train.terms.allowed].unique()), value - terms.total(n_test, terms.allowed), after
    )
    named = [train.name(pair) for pair in chosen[:SHOWN]]
    first = tuple(
        Term(query=query, key=key, position=position, alone=_share([value - part], [value], score))
        for (query, key, position), part in zip(named, each, strict=False)
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

"""What every feature of every SAE would do to a wish's score, to first order, from one backward pass per example.

With x_p the activation at an edited place and g_p the score's gradient there, adding a feature at relative dose r, as
r·‖x_p‖·v̂, changes the score by r·Σ_p ‖x_p‖ ⟨g_p, v̂⟩, and removing it by −Σ_p f(x_p)·⟨g_p, W_dec⟩ (attribution
patching: Nanda 2023; Syed et al. 2023, arXiv 2310.10348). The same pass reads what features say of the answers: where
they fire on wanted answers and not on unwanted ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.dictionaries import Dictionary
from trimtab.finding.examples import Answered, Example, Examples
from trimtab.finding.passes import answer_log_probs, batches, check_finite, check_lengths, fed_ids, run
from trimtab.finding.steering_edit import SteeringEdit, Tables, steering
from trimtab.lm import LanguageModel, PromptCache, RowDelta, Site, edited

GRADIENT_WEIGHT = 3
"""How many times the logits of a pass are held for its gradients."""
FEATURES = 1 << 16
"""Whose effects on all examples are held at once."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FirstOrder:
    """One SAE's features on some examples."""

    add: Float[Tensor, " n"]
    """Mean change of the score per unit of relative dose; the other sign has the opposite one."""
    error: Float[Tensor, " n"]
    """Its standard error over examples; NaN of one example."""
    remove: Float[Tensor, " n"]
    """Mean change of the score if the feature is removed where it fires; 0 where it never does."""
    reads: Float[Tensor, " n"]
    """Mean activation on wanted answers' tokens minus that on unwanted ones; NaN if there are none of a kind."""
    auc: Float[Tensor, " n"]
    """How often a wanted answer's mean activation is above an unwanted one's; NaN if there are none of a kind."""
    gradient: Float[Tensor, " d"]
    """Mean over examples of Σ_p ‖x_p‖ g_p: where a vector of equal dose would do most."""
    difference: Float[Tensor, " d"]
    """Mean activation vector on wanted answers' tokens minus that on unwanted ones; NaN if there are none of a kind."""

    @property
    def certainty(self) -> Float[Tensor, " n"]:
        """`add` in units of its standard error, to which the median feature's is added: a feature whose error is small
        by chance is not put first (as in Tusher et al. 2001)."""
        return self.add / (self.error + self.error.median())


def first_order(
    model: LanguageModel,
    saes: Mapping[Site, Dictionary],
    examples: Examples,
    *,
    cache: PromptCache | None = None,
    at: SteeringEdit | None = None,
    tables: Tables | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[Site, FirstOrder]:
    """First-order effects of all features, by one forward and one backward pass per example.

    Args:
        model: the model.
        saes: by site.
        examples: their scores are differentiated, and averaged over examples.
        cache: of prompts.
        at: an edit that is there already, so that effects are those of what is added to it.
        tables: of that edit's directions.
        progress: called with the number of examples that are done.

    Returns:
        What each SAE's features do, by site, on the CPU.

    Raises:
        UserError: an answer does not fit the context, or a score is not finite.
    """
    found = _Pass(model, saes, examples, cache or PromptCache(model), at, tables)
    # An example's answers stay together, since its score is a function of all of them.
    longest = [max(example.answered, key=lambda one: len(one.answer)) for example in examples.examples]
    most = max(len(example.answered) for example in examples.examples)
    for part in batches(model, longest, GRADIENT_WEIGHT * most):
        found.see([examples.examples[i] for i in part])
        if progress is not None:
            progress(len(part))
    return {site: sums.found() for site, sums in found.sums.items()}


class _Pass:
    """The forward and backward passes, and what they add up to at each site."""

    def __init__(
        self, model: LanguageModel, saes: Mapping[Site, Dictionary], examples: Examples, cache: PromptCache,
        at: SteeringEdit | None, tables: Tables | None,
    ) -> None:  # fmt: skip
        check_lengths(model, examples.answered)
        self.model, self.cache, self.at, self.tables = model, cache, at, tables or {}
        self.sums = {site: _Sums(sae) for site, sae in saes.items()}
        self._leaves: dict[Site, tuple[Tensor, Tensor]] = {}

    def see(self, part: Sequence[Example]) -> None:
        """Run some examples forward and backward."""
        model = self.model
        answered = [one for example in part for one in example.answered]
        # One more token is fed than a decode feeds, so that an answer's last one is read, too.
        fed = [Answered(one.prompt, (*one.answer, model.pad_id)) for one in answered]
        with torch.enable_grad():
            logits = run(model, fed, self.cache, self._watched(fed))
            logp = answer_log_probs(logits[:, :-1], [one.answer for one in answered]).sum(-1)
            score = Examples(kind="", unit="", examples=tuple(part)).scores(logp)
            check_finite(score, "scores")
            leaves = {site: leaf for site, (leaf, _) in self._leaves.items()}
            *gradients, weights = torch.autograd.grad(score.sum(), [*leaves.values(), logp])
        example = torch.tensor([i for i, example in enumerate(part) for _ in example.answered], device=model.device)
        lengths = torch.tensor([len(one.answer) for one in answered], device=model.device)
        time = torch.arange(logits.shape[1], device=model.device)
        decides, reads = time < lengths[:, None], (time > 0) & (time <= lengths[:, None])
        for site, g in zip(leaves, gradients, strict=True):
            self.sums[site].see(self._leaves[site][1], g, decides, reads, weights, example)

    @contextmanager
    def _watched(self, fed: Sequence[Answered]) -> Iterator[None]:
        """The model with its gradients at all sites, under the edit that is there already."""
        model = self.model
        with ExitStack() as stack:
            if self.at is not None:
                source = self.at.source(self.tables)
                stack.enter_context(steering(model, source, [one.prompt for one in fed], fed_ids(model, fed)))
            stack.enter_context(edited(model, {site: self._leaf(site) for site in self.sums}))
            yield

    def _leaf(self, site: Site) -> Callable[[Tensor], RowDelta]:
        """Adds zeros whose gradient is the activation's."""

        def add(x: Tensor) -> RowDelta:
            leaf = torch.zeros_like(x).requires_grad_()
            self._leaves[site] = leaf, x.detach()
            rows, times = torch.ones(x.shape[:2], device=x.device).nonzero(as_tuple=True)
            return RowDelta(rows, times, leaf.flatten(0, 1))

        return add


class _Sums:
    """What one site gathers."""

    def __init__(self, sae: Dictionary) -> None:
        self.sae = sae
        device, dtype = sae.W_dec.device, sae.W_dec.dtype
        self.gradients: list[Tensor] = []
        self.remove = torch.zeros(sae.n_features, device=device, dtype=dtype)
        self.codes: list[Tensor] = []
        self.means: list[Tensor] = []
        self.weights: list[Tensor] = []

    def see(
        self, x: Float[Tensor, "R A d"], g: Float[Tensor, "R A d"], decides: Bool[Tensor, "R A"],
        reads: Bool[Tensor, "R A"], weights: Float[Tensor, " R"], example: Int[Tensor, " R"],
    ) -> None:  # fmt: skip
        """Take in activations and gradients of some answers, how much each is wanted, and of which example it is."""
        x, g = x.to(self.remove), g.to(self.remove)
        g = g * decides[..., None]
        gradient = g.new_zeros(int(example[-1]) + 1, g.shape[-1])
        self.gradients.append(gradient.index_add_(0, example, (x.norm(dim=-1, keepdim=True) * g).sum(1)))
        share = reads / reads.sum(1, keepdim=True)
        self.means.append((share.to(x.dtype)[..., None] * x).sum(1).cpu())
        self.codes.append(self._codes(x.flatten(0, 1), g.flatten(0, 1), share.to(x.dtype)).cpu())
        self.weights.append(weights.cpu())

    def _codes(
        self, x: Float[Tensor, "P d"], g: Float[Tensor, "P d"], share: Float[Tensor, "R A"]
    ) -> Float[Tensor, "R n"]:
        """Mean codes of each answer; what removing features does is added up."""
        W, n = self.sae.W_dec.detach(), self.sae.n_features
        codes, unit = self.sae.encode_sparse(x), self.sae.code_unit(x)
        row = torch.arange(len(share), device=x.device).repeat_interleave(share.shape[1])
        found = x.new_zeros(len(share), n)
        if isinstance(codes, Tensor):
            self.remove -= (codes * unit * (g @ W.T)).sum(0)
            return found.index_add_(0, row, share.flatten()[:, None] * codes)
        slope = torch.einsum("pkd,pd->pk", W[codes.indices], g)
        self.remove.index_add_(0, codes.indices.flatten(), -(codes.values * unit * slope).flatten())
        place = row[:, None] * n + codes.indices
        found.view(-1).index_add_(0, place.flatten(), (share.flatten()[:, None] * codes.values).flatten())
        return found

    def found(self) -> FirstOrder:
        """Means over examples, and differences between what is wanted and what is not."""
        codes, means, weights = (torch.cat(parts) for parts in (self.codes, self.means, self.weights))
        wanted, unwanted = weights > 0, weights < 0
        gradient = torch.cat(self.gradients)  # [X, d]
        effects = (gradient @ rows.T for rows in self.sae.directions.split(FEATURES))
        add, deviation = (torch.cat(each) for each in zip(*((e.mean(0), e.std(0)) for e in effects), strict=True))
        return FirstOrder(
            add=add.cpu(),
            error=deviation.cpu() / len(gradient) ** 0.5,
            remove=(self.remove / len(gradient)).cpu(),
            gradient=gradient.mean(0).cpu(),
            reads=codes[wanted].mean(0) - codes[unwanted].mean(0),
            auc=_auc(codes[wanted], codes[unwanted]),
            difference=means[wanted].mean(0) - means[unwanted].mean(0),
        )


def _auc(wanted: Float[Tensor, "P n"], unwanted: Float[Tensor, "M n"]) -> Float[Tensor, " n"]:
    """Ties count ½; NaN without rows of a kind."""
    won = wanted.new_zeros(wanted.shape[1])
    for row in wanted:
        won += (row > unwanted).to(won).mean(0) + 0.5 * (row == unwanted).to(won).mean(0)
    return won / len(wanted)

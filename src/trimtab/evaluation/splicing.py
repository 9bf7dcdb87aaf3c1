"""What the model loses when activations at a site are replaced: cross-entropy and KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.activations import PackedText
from trimtab.activations.rows import norms
from trimtab.errors import UserError
from trimtab.evaluation.documents import DocumentSums, EvaluationBatch, batches
from trimtab.evaluation.upper_layers import RecordedBatch, Splice
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture
from trimtab.selection.unembedding import Unembedding

Replacement = Callable[[Float[Tensor, "R d"]], Float[Tensor, "R d"]]
"""What activations are replaced by."""

_CHUNK_BYTES = 64 << 20
"""Size of the logits that are held at once, per variant."""


def splice_losses(
    model: LanguageModel,
    site: Site,
    packed: PackedText,
    variants: Mapping[str, tuple[Replacement, bool]],
    *,
    batch_size: int,
    special_ids: list[int],
    norm_limit: float,
    progress: Callable[[int], None] | None = None,
) -> DocumentSums:
    """Losses by document, untouched and with each variant spliced in.

    Args:
        variants: by name a replacement, and whether it takes every position. Otherwise position 0, special tokens and
            rows above `norm_limit` are left untouched, as they were left out of training.
        progress: called with the number of sequences done.

    Returns:
        Sums `targets` (tokens predicted), `ce` (nats, untouched), and for each variant `ce.NAME` and `kl.NAME`, where
        kl is KL(untouched ‖ spliced) of the next-token distributions.
    """
    sums = DocumentSums(len(packed.corpus.ids))
    unembedding = Unembedding(model)
    rows = max(1, _CHUNK_BYTES // (4 * unembedding.vocab_size))
    whole: bool | None = None
    with torch.no_grad():
        for batch in batches(packed, batch_size, special_ids, model.device):
            recorded = RecordedBatch(model, site, batch.tokens)
            if whole is None:
                check_unembedding(model, unembedding, batch.tokens.ids[:1])
                whole = not recorded.is_faithful()
            at, time = batch.target.nonzero(as_tuple=True)
            document, next_token = batch.document[at, time], batch.tokens.ids[at, time + 1]
            hidden = {
                name: recorded.spliced(_splice(batch, replacement, norm_limit, everywhere), whole=whole)[at, time]
                for name, (replacement, everywhere) in variants.items()
            }
            clean = recorded.hidden[at, time]
            sums.add("targets", document, torch.ones(len(document)))
            for start in range(0, len(document), rows):
                part = slice(start, start + rows)
                target, owner = next_token[part, None], document[part]
                log_p = unembedding.logits(clean[part]).log_softmax(dim=-1)
                p = log_p.exp()
                sums.add("ce", owner, -log_p.gather(1, target)[:, 0])
                for name, spliced in hidden.items():
                    log_q = unembedding.logits(spliced[part]).log_softmax(dim=-1)
                    sums.add(f"ce.{name}", owner, -log_q.gather(1, target)[:, 0])
                    sums.add(f"kl.{name}", owner, (p * (log_p - log_q)).sum(dim=-1))
            if progress:
                progress(len(batch.document))
    return sums


def _splice(batch: EvaluationBatch, replacement: Replacement, norm_limit: float, everywhere: bool) -> Splice:
    def fn(x: Tensor) -> RowDelta:
        chosen: Bool[Tensor, "B T"] = torch.ones_like(batch.candidate)
        if not everywhere:
            chosen = batch.candidate & (norms(x) <= norm_limit)
        at, time = chosen.nonzero(as_tuple=True)
        rows = x[at, time].float()
        return RowDelta(at, time, replacement(rows) - rows)

    return fn


def check_unembedding(model: LanguageModel, unembedding: Unembedding, ids: Int[Tensor, "1 T"]) -> None:
    """Compare final norm and head with the model's own logits at the last token.

    Raises:
        UserError: they differ, as where a model scales its logits in a way that is not known here.
    """
    tokens = TokenBatch.full(ids)
    site = f"resid_post.{model.n_layers - 1}"
    (hidden,) = capture(model, tokens, [site]).values()
    ours, own = unembedding.logits(hidden[:, -1]), model.forward(tokens, last=1)[:, -1].float()
    if not torch.allclose(ours, own, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise UserError(
            f"model {model.name}", "its logits are not final norm and head of its residual", "it cannot be evaluated"
        )

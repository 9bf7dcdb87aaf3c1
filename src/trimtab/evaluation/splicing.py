"""What the model loses when activations at a site are replaced: cross-entropy and KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.activations import PackedText
from trimtab.activations.row_selection import norms
from trimtab.evaluation.documents import DocumentSums, EvaluationBatch, PassOptions
from trimtab.lm import LanguageModel, RowDelta, Site, capture, edited, not_finite_error
from trimtab.lm.token_statistics import kl_divergence
from trimtab.lm.unembedding import Unembedding
from trimtab.lm.upper_layers import first_edited_layer, input_site, starting_at

Replacement = Callable[[Float[Tensor, "R d"]], Float[Tensor, "R d"]]
"""What activations are replaced by."""

_CHUNK_BYTES = 64 << 20
"""Size of the logits that are held at once, per variant."""


def splice_losses(
    model: LanguageModel,
    site: Site,
    packed: PackedText,
    variants: Mapping[str, tuple[Replacement, bool]],
    options: PassOptions,
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
    layer, end = first_edited_layer([site]), input_site(model.n_layers)
    checked = False
    with torch.no_grad():
        for batch in options.batches(packed, model):
            found = capture(model, batch.tokens, [input_site(layer), end])
            if not checked:
                with starting_at(model, model.n_layers, found[end]):
                    logits = model.forward(batch.tokens, last=1)[0, -1]
                unembedding.check(found[end][0, -1], logits)
                checked = True
            at, time = batch.target.nonzero(as_tuple=True)
            document, next_token = batch.document[at, time], batch.tokens.ids[at, time + 1]
            hidden = {}
            for name, (replacement, everywhere) in variants.items():
                splice = _splice(batch, replacement, norm_limit, everywhere)
                with starting_at(model, layer, found[input_site(layer)]), edited(model, {site: splice}):
                    hidden[name] = capture(model, batch.tokens, [end])[end][at, time]
            clean = found[end][at, time]
            sums.add("targets", document, torch.ones(len(document)))
            for start in range(0, len(document), rows):
                part = slice(start, start + rows)
                target, owner = next_token[part, None], document[part]
                log_p = unembedding.logits(clean[part]).log_softmax(dim=-1)
                loss = -log_p.gather(1, target)[:, 0]
                if len(bad := loss.isnan().nonzero()):
                    row, last = (int(each[start + int(bad[0])]) for each in (at, time))
                    raise not_finite_error(model, batch.tokens.ids[row, : last + 1].tolist())
                sums.add("ce", owner, loss)
                for name, spliced in hidden.items():
                    log_q = unembedding.logits(spliced[part]).log_softmax(dim=-1)
                    sums.add(f"ce.{name}", owner, -log_q.gather(1, target)[:, 0])
                    sums.add(f"kl.{name}", owner, kl_divergence(log_p, log_q))
            if progress:
                progress(len(batch.document))
    return sums


def _splice(
    batch: EvaluationBatch, replacement: Replacement, norm_limit: float, everywhere: bool
) -> Callable[[Float[Tensor, "B T d"]], RowDelta]:
    def fn(x: Tensor) -> RowDelta:
        chosen: Bool[Tensor, "B T"] = torch.ones_like(batch.candidate)
        if not everywhere:
            chosen = batch.candidate & (norms(x) <= norm_limit)
        at, time = chosen.nonzero(as_tuple=True)
        rows = x[at, time].float()
        return RowDelta(at, time, replacement(rows) - rows)

    return fn

"""Path patching (Wang et al. 2022, arXiv 2211.00593): what a head does through certain receivers alone.

A sender's output is taken from a corrupted prompt; all other heads keep what they gave in the clean one, so that only
the residual stream and the MLPs carry the change to the receivers. What the receivers then read is put into a clean
run, in which everything behind them is computed anew.

With attention fixed, tokens no longer see one another. So the first half runs single tokens, from the sender's layer
to the receivers', all heads of a layer in one batch; the second half starts at the receivers' layer and position,
behind the cached keys and values of the clean run. A loop of hooked forward passes gives the same numbers
(`tests/evaluation/test_path_patching.py`), many times slower (`benchmarks/ioi.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location, PatchedRuns
from trimtab.evaluation.circuits.rows import PlainRun, PromptRows, logit_difference
from trimtab.lm import LanguageModel, RowDelta, Site, TokenBatch, capture, edited
from trimtab.lm.unembedding import Unembedding
from trimtab.lm.upper_layers import starting_at


def logits_location(model: LanguageModel) -> Location:
    """The logits behind the last token: with this receiver, path patching gives a head's direct effect."""
    return Location(Site("resid_post", model.n_layers - 1), "END")


@torch.no_grad()
def path_patch(
    model: LanguageModel,
    rows: PromptRows,
    corrupted: Int[Tensor, "B T"],
    receivers: Sequence[Location],
    progress: Callable[[int], None] | None = None,
    senders: Bool[Tensor, "layers heads"] | None = None,
) -> Float[Tensor, "B layers heads"]:
    """The change of the logit difference when each head's output is the corrupted prompt's, for these receivers alone.

    Args:
        model: with attention sites; nothing of ours changing it at the moment.
        rows: clean prompts.
        corrupted: as many prompts of the same length.
        receivers: patched together; the logits by themselves.
        progress: called with the number of senders' layers that are done.
        senders: which heads are patched; all by default.

    Returns:
        Patched minus clean, in logits; 0 for heads from which no receiver can be reached, and for those not patched.

    Raises:
        UserError: no receiver, a site that is none, or the logits beside others.
    """
    logits = logits_location(model)
    receivers = list(dict.fromkeys(receivers))
    if not receivers or (logits in receivers and len(receivers) > 1):
        raise UserError("receivers", "give heads' queries, keys or values, or the logits alone", "see path_patch")
    for receiver in receivers:
        model.site(receiver.site)
        if receiver != logits and (
            receiver.site.kind not in ("attn_q", "attn_k", "attn_v") or receiver.site.head is None
        ):
            raise UserError(f"receiver {receiver.site}", "it is not a head's attn_q, attn_k or attn_v", "name the head")
    clean, other = PlainRun.of(model, rows.ids), PlainRun.of(model, corrupted).z
    unembedding, answers = Unembedding(model), rows.answers
    before = logit_difference(unembedding, rows.at(clean.inputs[-1], "END"), answers)
    n_heads = clean.z[0].shape[2]
    effect = torch.zeros(len(before), model.n_layers, n_heads, device=before.device)
    runs: dict[int, PatchedRuns] = {}  # by the number of copies
    done = progress or (lambda _n: None)
    for layer in range(model.n_layers):
        heads = list(range(n_heads)) if senders is None else senders[layer].nonzero()[:, 0].tolist()
        reached = [r for r in receivers if r == logits or r.site.layer > layer]
        if not reached:
            break
        if not heads:
            done(1)
            continue
        read: dict[Location, Tensor] = {}
        for position in dict.fromkeys(receiver.position for receiver in reached):
            there = [receiver for receiver in reached if receiver.position == position]
            values = _read_by(model, rows, clean, other[layer], layer, heads, position, [r.site for r in there])
            read |= {receiver: values[receiver.site] for receiver in there}
        if logits not in read and len(heads) not in runs:
            runs[len(heads)] = PatchedRuns(model, rows, clean, receivers, len(heads))
        final = read[logits] if logits in read else runs[len(heads)].run(read)
        after = logit_difference(unembedding, final, answers.repeat_interleave(len(heads), 0))
        effect[:, layer, heads] = after.unflatten(0, (-1, len(heads))) - before[:, None]
        done(1)
    return effect


def _read_by(
    model: LanguageModel,
    rows: PromptRows,
    clean: PlainRun,
    other: Float[Tensor, "B T heads head_dim"],
    layer: int,
    heads: Sequence[int],
    position: str,
    sites: Sequence[Site],
) -> dict[Site, Float[Tensor, "B*copies width"]]:
    """What sites read at a position when one of these heads at a time is patched and all others are as they were."""
    own = rows.at(clean.z[layer], position)
    copies = own[:, None].expand(-1, len(heads), -1, -1).clone()  # [B, copies, heads, head_dim]
    copies[:, torch.arange(len(heads), device=own.device), heads] = rows.at(other, position)[:, heads]

    def fixed(x: Tensor) -> Tensor:
        return rows.at(x, position).flatten(1).repeat_interleave(len(heads), 0)

    hidden = fixed(clean.inputs[layer])
    # Where a model cannot start at a layer, the layers below compute something and this takes its place.
    replacing = {Site("resid_pre", layer): hidden, Site("attn_z", layer): copies.flatten(0, 1).flatten(1)}
    last = max(site.layer for site in sites)
    through = range(layer + 1, last + (sites[0].kind == "resid_post"))
    replacing |= {Site("attn_z", above): fixed(clean.z[above]) for above in through}
    batch = TokenBatch.full(torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device))
    with starting_at(model, layer, hidden[:, None]), edited(model, {s: _replaced(x) for s, x in replacing.items()}):
        found = capture(model, batch, sites)
    return {site: found[site][:, 0] for site in sites}


def _replaced(values: Float[Tensor, "N width"]) -> Callable[[Tensor], RowDelta]:
    number = torch.arange(len(values), device=values.device)
    change = RowDelta(number, torch.zeros_like(number), torch.zeros_like(values), values)
    return lambda _x: change

"""What a model is used for, held against its own plain forward passes; what it refuses must be refused by that name.

Nothing here asks how the model checked itself: logits come from calls without a cache, edits from hooks of our own on
the layers, and heads are told apart by what zeroing one of them must do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, LanguageModel, RowDelta, Site, TokenBatch, capture, decode, edited
from trimtab.lm.logit_lens import lens_logits
from trimtab.selection.scorer import LastTokenScorer

LENGTHS = (5, 13)
"""Of prompts: padded beside each other, and with what is decoded beyond a window of 8."""
NEW = 6
MASKED_BY_VALUES = ("doge",)
"""Types in which all heads' masks are made of all values, so that each head feels them all."""


def faults(model: LanguageModel) -> list[str]:
    """What is wrong and not refused; empty if all is well."""
    found = []
    for check in (_decoding, _padding, _lens, _scoring, _residuals, _sums, _values, _queries_and_keys, _mixtures):
        try:
            found += [f"{check.__name__}: {fault}" for fault in check(model)]
        except UserError as error:
            known = tuple(model.capabilities.off.values())
            if not error.why.startswith(known) and "site" not in error.what:
                found.append(f"{check.__name__}: refused for no reason: {error}")
    return found


def _ids(model: LanguageModel, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(6, 100, (length,), generator=generator).tolist()


@torch.no_grad()
def _plain(model: LanguageModel, ids: list[int]) -> Tensor:
    return model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def _apart(model: LanguageModel, found: Tensor, expected: Tensor) -> float:
    """The difference in units of what is allowed: 1e-4 of a row's spread, or of rounding in low precision."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    allowed = 1e-4 if model.dtype == torch.float32 else 0.1
    return float(((found - expected).norm(dim=-1) / (spread * allowed + 1e-6)).max())


def _decoding(model: LanguageModel) -> list[str]:
    prompts = [_ids(model, length) for length in LENGTHS]
    seen: dict[tuple[int, int], Tensor] = {}

    def observe(rows: Tensor, step: int, logits: Tensor) -> None:
        seen.update({(row, step): logits[i].float() for i, row in enumerate(rows.tolist())})

    done = decode(model, prompts, DecodeConfig(max_new_tokens=NEW, stop_at_eos=False), repeats=2, observe=observe)
    worst = 0.0
    for row, tokens in enumerate(done.token_ids):
        prompt = prompts[row // 2]
        expected = _plain(model, [*prompt, *tokens])[len(prompt) - 1 : -1]
        found = torch.stack([seen[row, step] for step in range(NEW)])
        worst = max(worst, _apart(model, found, expected))
    return [f"logits are off {worst:.0f} times what is allowed"] if worst > 1 else []


def _padding(model: LanguageModel) -> list[str]:
    rows = [_ids(model, length) for length in LENGTHS]
    with torch.no_grad():
        logits = model.forward(TokenBatch.pad(rows, 0)).float()
    worst = max(_apart(model, x[-len(ids) :], _plain(model, ids)) for x, ids in zip(logits, rows, strict=True))
    return [f"logits are off {worst:.0f} times what is allowed"] if worst > 1 else []


def _lens(model: LanguageModel) -> list[str]:
    ids = _ids(model, 9)
    (rows,) = capture(model, TokenBatch.full(torch.tensor([ids])), [f"resid_post.{model.n_layers - 1}"]).values()
    found = torch.cat([block.clone() for block in lens_logits(model, rows[0])])
    worst = _apart(model, found, _plain(model, ids))
    return [f"logits are off {worst:.0f} times what is allowed"] if worst > 1 else []


def _hooked_plain(model: LanguageModel, ids: list[int], layer: int, delta: Tensor) -> Tensor:
    """Logits where the layer's last output is pushed."""

    def hook(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        x = (output if isinstance(output, Tensor) else output[0]).clone()
        x[0, -1] += delta.to(x.dtype)
        return x if isinstance(output, Tensor) else (x, *output[1:])

    handle = model.layout.layers[layer].module.register_forward_hook(hook)  # type: ignore[arg-type]
    try:
        return _plain(model, ids)[-1]
    finally:
        handle.remove()


def _scoring(model: LanguageModel) -> list[str]:
    ids, layer = _ids(model, 13), model.n_layers // 2
    scorer = LastTokenScorer(model, f"resid_post.{layer}", ids)
    size = scorer.continuation.x.norm() / 5
    deltas = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(4)) * size
    found = scorer.logits(deltas)
    expected = torch.stack([_hooked_plain(model, ids, layer, delta) for delta in deltas])
    worst = _apart(model, found, expected)
    return [f"logits are off {worst:.0f} times what is allowed"] if worst > 1 else []


def _residuals(model: LanguageModel) -> list[str]:
    """Residuals are what `transformers` calls hidden states."""
    ids = torch.tensor([_ids(model, 9)])
    sites = [f"resid_pre.{layer}" for layer in range(model.n_layers)]
    got = capture(model, TokenBatch.full(ids), sites)
    with torch.no_grad():
        states = model.hf(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    if states is None or len(states) < model.n_layers:
        return []
    if _close(got[Site("resid_pre", 1)], states[0]):  # Mamba's begin with the first layer's output
        states = (got[Site("resid_pre", 0)], *states)
    pairs = zip(got.items(), states, strict=False)
    return [f"{site} is no hidden state" for (site, x), own in pairs if not _close(x, own)]


def _sums(model: LanguageModel) -> list[str]:
    found = []
    batch = TokenBatch.full(torch.tensor([_ids(model, 9)]))
    for layer in range(model.n_layers):
        got: dict[str, Tensor] = {}
        for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"):
            with suppress(UserError):
                (got[kind],) = capture(model, batch, [f"{kind}.{layer}"]).values()
        for total, parts in (
            ("resid_mid", ("resid_pre", "attn_out")),
            ("resid_post", ("resid_mid", "mlp_out") if "resid_mid" in got else ("resid_pre", "attn_out", "mlp_out")),
        ):
            if not all(name in got for name in (total, *parts)):
                continue
            if not _close(torch.stack([got[name].float() for name in parts]).sum(0), got[total].float(), model.dtype):
                found.append(f"{' + '.join(parts)} is not {total} in layer {layer}")
    return found


def _close(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return x.shape == y.shape and bool((x - y).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * y.norm() + 1e-6)


def _zeroed(model: LanguageModel, layer: int, kind: str, head: int) -> Tensor:
    """`[T, heads, width]`: what all heads give where one head's queries, keys or values are zero."""

    def zero(x: Tensor) -> RowDelta:
        batch, time = torch.ones(x.shape[:2]).nonzero(as_tuple=True)
        return RowDelta(batch, time, -x[batch, time])

    batch = TokenBatch.full(torch.tensor([_ids(model, 6)]))
    z = Site("attn_z", layer)
    with edited(model, {Site(kind, layer, head): zero}):
        return capture(model, batch, [z])[z][0].float()


def _heads(model: LanguageModel, *kinds: str) -> list[tuple[Tensor, int, int, Callable[[str, int], Tensor]]]:
    """Of each layer that has all of some kinds: what its heads give, how many they are, and what zeroing does."""
    found = []
    for layer in range(model.n_layers):
        for kind in kinds:
            model.site(f"{kind}.{layer}")
        attention = model.layout.layers[layer].attention
        assert attention is not None
        batch, z = TokenBatch.full(torch.tensor([_ids(model, 6)])), Site("attn_z", layer)
        own = capture(model, batch, [z])[z][0].float()
        found.append((own, attention.n_heads, attention.n_kv_heads, partial(_zeroed, model, layer)))
    return found


def _values(model: LanguageModel) -> list[str]:
    """Without values a head gives nothing; heads of other groups give what they gave."""
    found = []
    for own, n, n_kv, zeroed in _heads(model, "attn_v", "attn_z"):
        for head in range(n_kv):
            z, of = zeroed("attn_v", head), torch.arange(n) // (n // n_kv) == head
            others = model.name in MASKED_BY_VALUES or _close(z[:, ~of], own[:, ~of], model.dtype)
            if not others or float(z[:, of].norm()) > 1e-3 * float(own.norm()):
                found.append(f"value head {head} is not its own")
    return found


def _queries_and_keys(model: LanguageModel) -> list[str]:
    """Without queries a head attends as it does without keys."""
    found = []
    for own, n, n_kv, zeroed in _heads(model, "attn_q", "attn_k", "attn_z"):
        for head in (0, n - 1):
            queries, keys = zeroed("attn_q", head), zeroed("attn_k", head // (n // n_kv))
            if not _close(queries[:, head], keys[:, head], model.dtype):
                found.append(f"head {head}: no queries is not no keys")
            if _close(queries[-1, head], own[-1, head], model.dtype):
                found.append(f"head {head}: its queries do nothing")
    return found


def _mixtures(model: LanguageModel) -> list[str]:
    """Heads enter the attention branch by the output projection alone."""
    found = []
    for layer in range(model.n_layers):
        z, out = model.site(f"attn_z.{layer}"), model.site(f"attn_out.{layer}")
        attention = model.layout.layers[layer].attention
        assert attention is not None
        if model.layout.layers[layer].attn_branch is not attention.out:
            continue  # a norm follows
        got = capture(model, TokenBatch.full(torch.tensor([_ids(model, 6)])), [z, out])
        with torch.no_grad():
            if not _close(attention.out(got[z].flatten(-2)).float(), got[out].float(), model.dtype):
                found.append(f"attn_out.{layer} is not the projection of attn_z.{layer}")
    return found

"""Whether sites are what they are called: one forward pass, edited at all of them, held against what must follow.

With x′ an activation as edited, in every layer: resid_pre′ + attn_out′ = resid_mid and resid_mid′ + mlp_out′ =
resid_post (one sum where the branches are parallel), resid_post′ = the next layer's resid_pre, and of the last residual
the final norm and head give the logits. What the attention function is given is made of q′, k′ and v′ head by head: at
the first position, where rotary embeddings turn nothing, and for values everywhere, one is the other times factors that
are the same in all rows (a norm's weights) and of a head's own length. What it gives is z.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.findings import Findings, said
from trimtab.lm.layouts import check_site
from trimtab.lm.model import LanguageModel
from trimtab.lm.sites import HEAD_KINDS, KINDS, Site
from trimtab.lm.taps import RowDelta, hooked, site_width
from trimtab.lm.unembedding import Unembedding
from trimtab.lm.upper_layers import difference

PUSH = 0.1
"""Size of edits, of the activation's: branches can still be told from the stream after very many layers."""
FELT = 1e-4
"""Share by which an edit changes at least what it is felt in."""
TINY = 1e-30
ENDS = ("resid_pre", "resid_post")
"""Kinds of sites whose edits are followed to the logits."""


class _Attended(NamedTuple):
    """What a layer's attention function was given, and what it gave."""

    attn_q: Float[Tensor, "B heads T width"]
    attn_k: Float[Tensor, "B kv_heads T width"]
    attn_v: Float[Tensor, "B kv_heads T width"]
    attn_z: Float[Tensor, "B T heads width"]


ABSENT = "its layers have no such part that is known"
"""The reason where there is nothing to check."""


def check_sites(
    model: LanguageModel,
    ids: Int[Tensor, "B T"],
    found: Findings,
    *,
    plain: Float[Tensor, "R T V"] | None = None,
    last: Float[Tensor, "R T d"] | None = None,
) -> tuple[Float[Tensor, "B T V"], dict[Site, Tensor]]:
    """Switch off kinds of sites that are not what they are called, and the logit lens if it is not.

    Args:
        model: the model.
        ids: tokens. All rows but the last are edited at every site, at their first and their last place but one; the
            last at that place alone, at the input of the layer in the middle. Without `plain`, that is the upper half
            of the rows, and the lower half, the same tokens, are not edited.
        found: what is off so far.
        plain: the logits of the untouched model.
        last: its last residuals, if they can be read.

    Returns:
        The pass's logits, and activations before edits; nothing if it failed.
    """
    rows = len(ids) if plain is not None else len(ids) // 2
    run = _EditedRun(model, ids, rows, found)
    found.fail([kind for kind in KINDS if kind not in run.kinds], ABSENT)
    try:
        with hooked(model.layout, {site: run.edit(site) for site in run.sites}), run.attention_seen():
            logits = model.hf(input_ids=ids, use_cache=False).logits.float().to(model.device)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found.fail([*run.kinds, "logit-lens"], said(error))
        return torch.empty(0), {}
    _attempt(found, run.kinds, run.compare_readings)
    _attempt(found, [kind for kind in run.kinds if kind not in HEAD_KINDS], run.compare_streams)
    _attempt(found, [kind for kind in run.kinds if kind in HEAD_KINDS], run.compare_heads)
    untouched = logits[rows:] if plain is None else plain
    if plain is None and run.end in run.read and run.read[run.end].shape[:2] == ids.shape:
        last = run.read[run.end][rows:]
    residuals = [kind for kind in run.kinds if kind in ENDS]
    _attempt(found, [*residuals, "logit-lens"], lambda: run.compare_logits(logits, untouched, last))
    return logits, run.read


def _attempt(found: Findings, names: list[str], compare: Callable[[], None]) -> None:
    """Switch off what cannot be compared."""
    try:
        compare()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever becomes of a foreign model's activations
        found.fail(names, said(error))


class _EditedRun:
    """A forward pass that reads and edits at every site, and what is found there."""

    def __init__(self, model: LanguageModel, ids: Int[Tensor, "B T"], rows: int, found: Findings) -> None:
        self.model, self.layout, self.ids, self.found = model, model.layout, ids, found
        self.alone, self.middle = rows - 1, model.n_layers // 2
        self.end = Site("resid_post", model.n_layers - 1)
        layers = range(model.n_layers)
        self.sites = [Site(kind, layer) for kind in KINDS for layer in layers if self._has(kind, layer)]
        self.kinds = list(dict.fromkeys(site.kind for site in self.sites))
        self.read: dict[Site, Tensor] = {}
        """Activations before an edit."""
        self.after: dict[Site, Tensor] = {}
        """The same as the rest of the model must see them."""
        self.calls: Counter[Site] = Counter()
        self.attended: dict[int, _Attended] = {}
        self.time = ids.shape[1] - 2
        places = [*((row, time) for row in range(self.alone) for time in (0, self.time)), (self.alone, self.time)]
        self.places = torch.tensor(places, device=model.device).T
        """Rows and times of edits; the last one is made at one site alone."""
        self.tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
        self.generator = torch.Generator().manual_seed(1)

    def _has(self, kind: str, layer: int) -> bool:
        with suppress(UserError):
            check_site(self.layout, Site(kind, layer), "")
            return True
        return False

    def _copy(self, x: Tensor) -> Tensor:
        """On one device, since layers may be spread over several."""
        return x.to(self.model.device, copy=True)

    def edit(self, site: Site) -> Callable[[Tensor], RowDelta | None]:
        """Reads and pushes the activation at a site."""
        everywhere = site == Site("resid_pre", self.middle)
        batch, time = self.places[:, : None if everywhere else -1]

        def fn(x: Tensor) -> RowDelta | None:
            self.calls[site] += 1
            own = self.read[site] = self.after[site] = self._copy(x)
            if x.shape[:-1] != self.ids.shape:
                return None
            at = batch.to(x.device), time.to(x.device)
            now = x[at]
            push = torch.randn(now.shape, generator=self.generator).to(x)
            size = now.norm(dim=-1, keepdim=True)
            if not bool(size.all()):  # a zero is pushed, too
                usual = x.norm(dim=-1).max()
                size = torch.where(size > 0, size, torch.where(usual > 0, usual, 1))
            change = RowDelta(*at, push * (size * (PUSH / max(now.shape[-1], 1) ** 0.5)))
            self.after[site] = own.clone()
            self.after[site][batch, time] = change.of(now).to(own.device)
            return change

        return fn

    @contextmanager
    def attention_seen(self) -> Iterator[None]:
        """Keep what attention functions are given and give, whichever implementation a model uses."""
        of_module = {id(part): n for n, layer in enumerate(self.layout.layers) for part in layer.module.modules()}
        from transformers.modeling_utils import AttentionInterface  # loads model classes, which help has no need of

        interface: Any = AttentionInterface
        own = interface.get_interface

        def get_interface(functions: Any, *args: Any, **kwargs: Any) -> Any:
            function = own(functions, *args, **kwargs)

            def seen(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
                given = self._copy(q), self._copy(k), self._copy(v)
                output = function(module, q, k, v, *args, **kwargs)
                if (layer := of_module.get(id(module))) is not None:
                    self.attended[layer] = _Attended(*given, self._copy(output[0]))
                return output

            return seen

        interface.get_interface = get_interface
        try:
            yield
        finally:
            interface.get_interface = own

    def compare_readings(self) -> None:
        """Each site is passed once, and an activation has the shape that is claimed."""
        for site in self.sites:
            if self.calls[site] != 1:
                times = f"{self.calls[site]} times in a forward pass, not once"
                self.found.fail([site.kind], f"layer {site.layer} passes it {times}")
                continue
            found, expected = tuple(self.read[site].shape), (*self.ids.shape, site_width(self.model, site))
            if found != expected:
                self.found.fail([site.kind], f"in layer {site.layer} it is {list(found)}, not {list(expected)}")

    def _usable(self, *sites: Site) -> bool:
        return all(site in self.read and site.kind not in self.found.off for site in sites)

    def compare_streams(self) -> None:
        """Sums of residuals and branches, layer by layer."""
        bad: dict[str, tuple[str, float | None]] = {}
        for layer in range(self.model.n_layers):
            pre, mid, post, attn, mlp = (
                Site(kind, layer) for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
            )
            if self._usable(pre, mid, post, attn, mlp):
                first, second = self._off_by(mid, pre, attn), self._off_by(post, mid, mlp)
                if first:
                    bad.setdefault("attn_out", (f"in layer {layer} resid_pre + attn_out is not resid_mid", first))
                if second:
                    bad.setdefault("mlp_out", (f"in layer {layer} resid_mid + mlp_out is not resid_post", second))
                if first and second:
                    reason = f"in layer {layer} it is not between resid_pre and resid_post"
                    bad.setdefault("resid_mid", (reason, min(first, second)))
            elif self._usable(pre, post, attn, mlp):
                if by := self._off_by(post, pre, attn, mlp):
                    reason = f"in layer {layer} resid_pre + attn_out + mlp_out is not resid_post"
                    bad |= dict.fromkeys(("attn_out", "mlp_out"), (reason, by))
            elif mlp not in self.sites and self._usable(pre, mid, attn):
                if by := self._off_by(mid, pre, attn):
                    reason = f"in layer {layer} resid_pre + attn_out is not resid_mid"
                    bad |= dict.fromkeys(("attn_out", "resid_mid"), (reason, by))
            else:
                reason = f"layer {layer} has no sum to check it by"
                bad |= dict.fromkeys(("attn_out", "resid_mid", "mlp_out"), (reason, None))
            after = Site("resid_pre", layer + 1)
            if self._usable(post, after) and (by := self._off_by(after, post)):
                bad["resid_pre"] = f"layer {layer + 1} begins with something else than layer {layer} gives", by
        for kind, (reason, by) in bad.items():
            self.found.fail([kind], reason, by)

    def _off_by(self, total: Site, *parts: Site) -> float:
        """By what share of them edited activations do not add up; 0 as far as rounding goes."""
        terms = [self.after[part].float() for part in parts]
        error = (self.read[total].float() - sum(terms)).norm(dim=-1)
        sizes = torch.stack([term.norm(dim=-1) for term in terms])
        largest = sizes.amax(0)
        allowed = self.tolerance * sizes.amin(0) + 8 * torch.finfo(self.model.dtype).eps * largest
        return 0.0 if bool((error <= allowed).all()) else float((error / (largest + TINY)).max())

    def compare_heads(self) -> None:
        """Queries, keys, values and what comes of them, as the attention function sees them."""
        for site in self.sites:
            if site.kind not in HEAD_KINDS or not self._usable(site):
                continue
            if site.layer not in self.attended:
                self.found.fail([site.kind], f"what attention is given in layer {site.layer} cannot be seen")
                continue
            seen = getattr(self.attended[site.layer], site.kind).float()
            if site.kind != "attn_z":
                seen = seen.transpose(1, 2)
            head = site_width(self.model, site._replace(head=0))
            x = (self.read if site.kind == "attn_z" else self.after)[site].float().unflatten(-1, (-1, head))
            by: float | None = None
            if seen.shape == x.shape:
                if site.kind == "attn_z":
                    by = float(((seen - x).norm(dim=-1) / (x.norm(dim=-1) + TINY)).max())
                else:
                    by = self._turned(seen, x) if site.kind == "attn_v" else self._turned(seen[:, :1], x[:, :1])
            if by is None or not by <= self.tolerance:
                done = "gives" if site.kind == "attn_z" else "is given"
                self.found.fail([site.kind], f"in layer {site.layer} it is not what the attention function {done}", by)

    def _turned(self, seen: Float[Tensor, "B T h w"], x: Float[Tensor, "B T h w"]) -> float:
        """How far one is from being the other, but for a factor per column and one per vector: 1 - |cosine|."""
        left, right = seen * x[:1, :1], seen[:1, :1] * x
        cosine = torch.nn.functional.cosine_similarity(left, right, dim=-1, eps=TINY)
        # Vectors whose columns are empty where the first one's are not, as weights set by hand make them, say nothing.
        scale = seen.norm(dim=-1) * x[:1, :1].norm(dim=-1) + seen[:1, :1].norm(dim=-1) * x.norm(dim=-1)
        nothing = torch.maximum(left.norm(dim=-1), right.norm(dim=-1)) <= self.tolerance * scale
        return float(torch.where(nothing, 0, 1 - cosine.abs()).max())

    def compare_logits(
        self, logits: Float[Tensor, "B T V"], plain: Float[Tensor, "R T V"], last: Float[Tensor, "R T d"] | None
    ) -> None:
        """Edits of single residuals are felt from their place on, not before; final norm and head give the logits."""
        found, end, kinds, at = self.found, self.end, ENDS, self.time
        alone, unedited = logits[self.alone], plain[self.alone]
        found.compare(kinds, "an edit changes logits before its place", difference(alone[:at], unedited[:at]))
        by = math.nan
        if self._usable(end):
            with suppress(Exception):  # whatever a foreign norm or head says to plain residuals
                by = difference(Unembedding(self.model).logits(self.after[end][0]).to(logits), logits[0])
        found.compare(["logit-lens"], "its logits are not final norm and head of its last residual", by)
        if difference(alone[at:], unedited[at:]) <= FELT:
            # A head may be blind to it, as one set by hand is; if it is this model's head, the last residual tells.
            blind = "logit-lens" in found.capabilities and last is not None and self._usable(end)
            if not blind or _change(self.read[end][self.alone, at:], last[self.alone, at:].to(self.read[end])) <= FELT:  # type: ignore[index]
                found.fail(kinds, "an edit changes no logits")


def _change(x: Tensor, before: Tensor) -> float:
    return float((x.float() - before.float()).norm() / (before.float().norm() + TINY))

"""Whether sites are what they are called: one forward pass, edited at all of them, held against what must follow.

With x′ an activation as edited, in every layer: resid_pre′ + attn_out′ = resid_mid and resid_mid′ + mlp_out′ =
resid_post (one sum where the branches are parallel), resid_post′ = the next layer's resid_pre, and of the last residual
the final norm and head give the logits. What the attention function is given is made of q′, k′ and v′ head by head: at
the first position, where rotary embeddings turn nothing, and for values everywhere, one is the other times factors that
are the same in all rows (a norm's weights) and of a head's own length. What it gives is z.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.layouts import check_site
from trimtab.lm.model import LanguageModel
from trimtab.lm.sites import HEAD_KINDS, KINDS, Site
from trimtab.lm.taps import RowDelta, hooked, site_width
from trimtab.lm.unembedding import Unembedding
from trimtab.lm.upper_layers import agree

PUSH = 0.1
"""Size of edits, of the activation's: branches can still be told from the stream after very many layers."""


class _Attended(NamedTuple):
    """What a layer's attention function was given, and what it gave."""

    attn_q: Float[Tensor, "B heads T width"]
    attn_k: Float[Tensor, "B kv_heads T width"]
    attn_v: Float[Tensor, "B kv_heads T width"]
    attn_z: Float[Tensor, "B T heads width"]


def check_sites(
    model: LanguageModel, ids: Int[Tensor, "3 T"], plain: Float[Tensor, "3 T V"], middle: int
) -> dict[str, str]:
    """Kinds of sites that are not what they are called, and the logit lens if it is not, with reasons.

    Args:
        model: the model.
        ids: tokens. The first two rows are edited at every site, at their first and their last place but one; the third
            at that place alone, at the input of one layer.
        plain: the logits of the untouched model.
        middle: that layer.
    """
    run = _EditedRun(model, ids, middle)
    absent = {kind: "its layers have no such part that is known" for kind in KINDS if kind not in run.kinds}
    try:
        with hooked(model.layout, {site: run.edit(site) for site in run.sites}), run.attention_seen():
            logits = model.hf(input_ids=ids, use_cache=False).logits.float()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return absent | dict.fromkeys([*run.kinds, "logit-lens"], said(error))
    run.compare_readings()
    run.compare_streams()
    run.compare_heads()
    run.compare_logits(logits, plain)
    return absent | run.off


FAILS = "it fails"
"""How a reason begins that is an error."""


def said(error: Exception) -> str:
    """One line on what a model answered."""
    lines = str(error).strip().splitlines() or [""]
    return f"{FAILS} on a few random tokens ({type(error).__name__}: {lines[0][:120]})"


class _EditedRun:
    """A forward pass that reads and edits at every site, and what is found there."""

    def __init__(self, model: LanguageModel, ids: Int[Tensor, "3 T"], middle: int) -> None:
        self.model, self.layout, self.ids, self.middle = model, model.layout, ids, middle
        layers = range(model.n_layers)
        self.sites = [Site(kind, layer) for kind in KINDS for layer in layers if self._has(kind, layer)]
        self.kinds = list(dict.fromkeys(site.kind for site in self.sites))
        self.read: dict[Site, Tensor] = {}
        """Activations before an edit."""
        self.after: dict[Site, Tensor] = {}
        """The same as the rest of the model must see them."""
        self.calls: Counter[Site] = Counter()
        self.attended: dict[int, _Attended] = {}
        self.off: dict[str, str] = {}
        self.time = ids.shape[1] - 2
        self.tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
        self.generator = torch.Generator().manual_seed(1)

    def _has(self, kind: str, layer: int) -> bool:
        with suppress(UserError):
            check_site(self.layout, Site(kind, layer), "")
            return True
        return False

    def edit(self, site: Site) -> Callable[[Tensor], RowDelta | None]:
        """Reads and pushes the activation at a site."""
        places = [(row, time) for row in (0, 1) for time in (0, self.time)]
        if site == Site("resid_pre", self.middle):
            places.append((2, self.time))

        def fn(x: Tensor) -> RowDelta | None:
            self.calls[site] += 1
            self.read[site] = self.after[site] = x.clone()
            if x.shape[:-1] != self.ids.shape:
                return None
            batch, time = torch.tensor(places, device=x.device).T
            now = x[batch, time]
            push = torch.randn(now.shape, generator=self.generator).to(x)
            change = RowDelta(batch, time, PUSH * push * now.norm(dim=-1, keepdim=True) / now.shape[-1] ** 0.5)
            after = x.clone()
            after[batch, time] = change.of(now)
            self.after[site] = after
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
                given = q.clone(), k.clone(), v.clone()
                output = function(module, q, k, v, *args, **kwargs)
                if (layer := of_module.get(id(module))) is not None:
                    self.attended[layer] = _Attended(*given, output[0].clone())
                return output

            return seen

        interface.get_interface = get_interface
        try:
            yield
        finally:
            interface.get_interface = own

    def _fail(self, kinds: str | tuple[str, ...], reason: str) -> None:
        for kind in (kinds,) if isinstance(kinds, str) else kinds:
            if kind in self.kinds or kind == "logit-lens":
                self.off.setdefault(kind, reason)

    def compare_readings(self) -> None:
        """Each site is passed once, and an activation has the shape that is claimed."""
        for site in self.sites:
            if self.calls[site] != 1:
                self._fail(
                    site.kind, f"layer {site.layer} passes it {self.calls[site]} times in a forward pass, not once"
                )
                continue
            found, expected = tuple(self.read[site].shape), (*self.ids.shape, site_width(self.model, site))
            if found != expected:
                self._fail(site.kind, f"in layer {site.layer} it is {list(found)}, not {list(expected)}")

    def _usable(self, *sites: Site) -> bool:
        return all(site in self.read and site.kind not in self.off for site in sites)

    def compare_streams(self) -> None:
        """Sums of residuals and branches, layer by layer."""
        bad: dict[str, str] = {}
        for layer in range(self.model.n_layers):
            pre, mid, post, attn, mlp = (
                Site(kind, layer) for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
            )
            if self._usable(pre, mid, post, attn, mlp):
                first, second = self._sums(mid, pre, attn), self._sums(post, mid, mlp)
                if not first:
                    bad.setdefault("attn_out", f"in layer {layer} resid_pre + attn_out is not resid_mid")
                if not second:
                    bad.setdefault("mlp_out", f"in layer {layer} resid_mid + mlp_out is not resid_post")
                if not (first or second):
                    bad.setdefault("resid_mid", f"in layer {layer} it is not between resid_pre and resid_post")
            elif self._usable(pre, post, attn, mlp):
                if not self._sums(post, pre, attn, mlp):
                    reason = f"in layer {layer} resid_pre + attn_out + mlp_out is not resid_post"
                    bad |= dict.fromkeys(("attn_out", "mlp_out"), reason)
            elif mlp not in self.sites and self._usable(pre, mid, attn):
                if not self._sums(mid, pre, attn):
                    reason = f"in layer {layer} resid_pre + attn_out is not resid_mid"
                    bad |= dict.fromkeys(("attn_out", "resid_mid"), reason)
            else:
                bad |= dict.fromkeys(("attn_out", "resid_mid", "mlp_out"), f"layer {layer} has no sum to check it by")
            after = Site("resid_pre", layer + 1)
            if self._usable(post, after) and not self._sums(after, post):
                bad["resid_pre"] = f"layer {layer + 1} begins with something else than layer {layer} gives"
        for kind, reason in bad.items():
            self._fail(kind, reason)

    def _sums(self, total: Site, *parts: Site) -> bool:
        """Whether edited activations add up, as far as rounding goes."""
        terms = [self.after[part].float() for part in parts]
        error = (self.read[total].float() - sum(terms)).norm(dim=-1)
        largest = torch.stack([term.norm(dim=-1) for term in terms])
        rounding = 8 * torch.finfo(self.model.dtype).eps * largest.amax(0)
        return bool((error <= self.tolerance * largest.amin(0) + rounding).all())

    def compare_heads(self) -> None:
        """Queries, keys, values and what comes of them, as the attention function sees them."""
        for site in self.sites:
            if site.kind not in HEAD_KINDS or not self._usable(site):
                continue
            if site.layer not in self.attended:
                self._fail(site.kind, f"what attention is given in layer {site.layer} cannot be seen")
                continue
            seen = getattr(self.attended[site.layer], site.kind).float()
            if site.kind != "attn_z":
                seen = seen.transpose(1, 2)
            head = site_width(self.model, site._replace(head=0))
            x = (self.read if site.kind == "attn_z" else self.after)[site].float().unflatten(-1, (-1, head))
            if seen.shape != x.shape:
                good = False
            elif site.kind == "attn_z":
                good = bool(((seen - x).norm(dim=-1) <= self.tolerance * x.norm(dim=-1) + 1e-30).all())
            else:
                good = (
                    self._proportional(seen, x) if site.kind == "attn_v" else self._proportional(seen[:, :1], x[:, :1])
                )
            if not good:
                done = "gives" if site.kind == "attn_z" else "is given"
                self._fail(site.kind, f"in layer {site.layer} it is not what the attention function {done}")

    def _proportional(self, seen: Float[Tensor, "B T h w"], x: Float[Tensor, "B T h w"]) -> bool:
        """Whether one is the other, but for a factor per column and one per vector."""
        left, right = seen * x[:1, :1], seen[:1, :1] * x
        cosine = torch.nn.functional.cosine_similarity(left, right, dim=-1, eps=1e-30)
        return bool((cosine.abs() > 1 - self.tolerance).all())

    def compare_logits(self, logits: Float[Tensor, "3 T V"], plain: Float[Tensor, "3 T V"]) -> None:
        """Edits of single residuals are felt from their place on, not before; final norm and head give the logits."""
        dtype, last = self.model.dtype, Site("resid_post", self.model.n_layers - 1)
        alone, unedited = logits[2], plain[2]
        if not agree(alone[: self.time], unedited[: self.time], dtype):
            self._fail(("resid_pre", "resid_post"), "an edit changes logits before its place")
        if agree(alone[self.time :], unedited[self.time :], torch.float32):
            self._fail(("resid_pre", "resid_post"), "an edit changes no logits")
        good = False
        if self._usable(last):
            with suppress(Exception):  # whatever a foreign norm or head says to plain residuals
                good = agree(
                    Unembedding(self.model).logits(self.after[last].flatten(0, 1)), logits.flatten(0, 1), dtype
                )
        if not good:
            self._fail("logit-lens", "its logits are not final norm and head of its last residual")

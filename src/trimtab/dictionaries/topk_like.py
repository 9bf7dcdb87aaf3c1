"""What TopK, BatchTopK and Matryoshka SAEs share in training: k features a row, AuxK, the schedule of k.

Loss: mean over rows of ‖x − x̂‖², plus AuxK (Gao et al. 2024, appendix A.2): features that have long been silent
reconstruct the residual x − x̂.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.dictionaries.active import Active, DensePairs, SparsePairs, Values
from trimtab.dictionaries.encoding import DenseEncoder
from trimtab.dictionaries.precision import product
from trimtab.dictionaries.sparse import ActivePairs, keep_largest
from trimtab.dictionaries.trainable import Loss, TrainableConfig, TrainableSAE
from trimtab.errors import UserError
from trimtab.runs import check_least, check_values

LOOK_EVERY = 32
"""Steps between looks at an accelerator for features that may be dead."""
LIST_LENGTHS = 16
"""Lengths, beside 0, that lists of such features are filled up to, so that most looks change none."""


@dataclass(frozen=True, kw_only=True)
class TopKLikeConfig(TrainableConfig):
    """What TopK-like SAEs have in common."""

    k: int
    """Active features per row; where a batch shares them, on average."""
    k_start: int | None = None
    """Active features per row at the start, if more; shrinks to k over `k_anneal_share` of the training."""
    k_anneal_share: float = 0.3
    """Share of the training over which k_start shrinks to k."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss; 0 leaves it out."""
    k_aux: int | None = None
    """Silent features per row that reconstruct the residual; half the width if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_active("k", self.k, self.n_features)
        low, last = self.k, self.n_features - 1
        check_values(self, f"from k = {low} to n_features − 1 = {last}", lambda k: low <= k <= last, "k_start")
        check_values(self, "from 0 to 1", lambda share: 0 <= share <= 1, "k_anneal_share")
        check_least(self, 0, "aux_coefficient")
        check_least(self, 1, "k_aux")


def check_active(name: str, value: float, n_features: int) -> None:
    """Raise a `UserError` if a dictionary cannot have so many active features per row; `name` is what the user set."""
    last = n_features - 1
    if not 1 <= value <= last:
        raise UserError(
            f"{name} {value:g}", f"it must be from 1 to n_features − 1 = {last}", f"choose a smaller {name}"
        )


class ErrorGradient(NamedTuple):
    """The squared error of a batch, and its gradient by the codes."""

    loss: Float[Tensor, ""]
    """What is minimised: the squared error, or the sum of those of several reconstructions."""
    squared_error: Float[Tensor, ""]
    """Of the full reconstruction, mean over rows."""
    residual: Float[Tensor, "B d"]
    """x − x̂ of the full reconstruction."""
    by_value: Values


class TopKLike(TrainableSAE):
    """Base of SAEs that keep a fixed number of features; a subclass chooses them (`active_pairs` and `kept`)."""

    not_in_step = ("_looks_in", "_lists")
    config: TopKLikeConfig

    def __init__(self, config: TopKLikeConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, d, seed=seed, dtype=dtype)
        self.k = config.k_start or config.k
        """Active features per row now."""
        self._may_be_dead: Tensor | None = None
        self._looks_in = 0
        self._lists: dict[int, Tensor] = {}

    def set_progress(self, done: float) -> None:
        """Set k: from k_start to k in equal ratios."""
        c = self.config
        if c.k_start is not None:
            share = min(1.0, done / c.k_anneal_share) if c.k_anneal_share else 1.0
            self.k = round(c.k_start * (c.k / c.k_start) ** share)

    def metrics(self) -> dict[str, float]:
        return {"k": self.k}

    def aux_loss(self, h: Float[Tensor, "B n"], error: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
        """AuxK: ‖e − ê‖² over the variance of the residual e, which counts as data; ê decodes the k_aux largest codes
        of the dead features, without b_dec."""
        dead, e = self.dead_features(), error.detach()
        if not dead.any() or not self.config.aux_coefficient:
            return e.new_zeros(())
        h = h[:, dead]
        kept = torch.zeros_like(h).scatter_(1, h.topk(self._k_aux(h.shape[1]), dim=1).indices, 1.0)
        e_hat = (h.relu() * kept) @ self.W_dec[dead]
        return (e - e_hat).square().sum() / _variance(e)

    def before_step(self, x: Float[Tensor, "B d"]) -> None:
        """On an accelerator, ask every `LOOK_EVERY` steps which features may be dead until it is asked again."""
        if not looks_late(x.device):
            return
        if self._looks_in == 0:
            soon = self.tokens_since_fired > self.config.dead_after - (LOOK_EVERY - 1) * len(x)
            self._may_be_dead, self._looks_in = self._listed(soon), LOOK_EVERY
        self._looks_in -= 1

    def _listed(self, soon: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
        """The features of a mask, and others to fill up with; lists of one length are at one address."""
        found, n = soon.nonzero().squeeze(1), len(soon)
        unit = -(-n // LIST_LENGTHS)
        length = min(n, -(-len(found) // unit) * unit)
        listed = self._lists.setdefault(length, found.new_empty(length))
        listed[: len(found)] = found
        listed[len(found) :] = soon.int().argmin()
        return listed

    @property
    def waits(self) -> bool:
        return super().waits or (self.by_autograd and self.config.aux_coefficient > 0)

    def look_again(self) -> None:
        self._may_be_dead, self._looks_in = None, 0

    def active_pairs(self, z: Float[Tensor, "B d"]) -> ActivePairs:
        """Choose the active features of encoder inputs z, and their codes."""
        raise NotImplementedError

    def kept(self, h: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
        """The codes of a batch from all its pre-activations: those of the active features, 0 for the others. They may
        be written over h, unless it is differentiated."""
        raise NotImplementedError

    def active(self, z: Float[Tensor, "B d"]) -> Active:
        """The active features of encoder inputs z with their codes, as a list or as a table."""
        if self.execution == "dense":
            f = self.kept(self.encoder().table(z))
            return DensePairs(f, f > 0, self.precision)
        return SparsePairs(self.active_pairs(z), self.config.n_features)

    def reconstruction(self, active: Active, x: Float[Tensor, "B d"]) -> ErrorGradient:
        """The reconstruction loss of the codes `active.h`; sets the gradients by the decoder and its bias."""
        decoded = active.decode(active.h, self.W_dec)
        error = decoded.x + self.b_dec - x
        grad = error * (2 / x.shape[0])
        squared_error = error.square().sum() / x.shape[0]
        self.W_dec.grad, self.b_dec.grad = active.collect(active.h, grad), grad.sum(0)
        return ErrorGradient(squared_error, squared_error, -error, decoded.dot(grad))

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "B d"]) -> Loss:
        z = self.encoder_input(x)
        active = self.active(z)
        rebuilt = self.reconstruction(active, x)
        by_h = rebuilt.by_value * (active.h > 0)
        self.W_enc_rows.grad = active.collect(by_h, z)
        self.b_enc.grad = active.by_feature(by_h)
        aux = self._add_aux_gradients(z, rebuilt.residual)
        if self.config.apply_b_dec_to_input:
            assert self.b_dec.grad is not None
            self.b_dec.grad -= self.b_enc.grad @ self.W_enc_rows
        total = rebuilt.loss + self.config.aux_coefficient * aux
        return Loss(total, rebuilt.squared_error, active.h, aux=aux, fired=active.fired(active.h))

    def _add_aux_gradients(self, z: Tensor, residual: Tensor) -> Tensor:
        """AuxK: the k_aux largest of the dead features' codes reconstruct the residual, which counts as data."""
        coefficient, is_dead, precision = self.config.aux_coefficient, self.dead_features(), self.precision
        looked = self._may_be_dead
        dead: Int[Tensor, " m"] = is_dead.nonzero().squeeze(1) if looked is None else looked
        if not len(dead) or not coefficient:
            return residual.new_zeros(())
        assert self.W_dec.grad is not None
        assert self.W_enc_rows.grad is not None
        assert self.b_enc.grad is not None
        W_enc, W_dec = self.W_enc_rows[dead], self.W_dec[dead]
        h = DenseEncoder(W_enc, self.b_enc[dead], precision).table(z)
        if looked is not None:  # those that are not dead yet are never chosen, or with code 0
            h.masked_fill_(~is_dead[dead], -torch.inf)
        f = keep_largest(h, self._k_aux(len(dead)), folded=False)
        error = product(f, W_dec, precision) - residual
        variance = _variance(residual)
        grad = error * (2 * coefficient / variance)
        grad_f = product(grad, W_dec.T, precision).mul_(f > 0)
        self.W_dec.grad.index_add_(0, dead, product(f.T, grad, precision))
        self.W_enc_rows.grad.index_add_(0, dead, product(grad_f.T, z, precision))
        self.b_enc.grad.index_add_(0, dead, grad_f.sum(0))
        return (error.square().sum() / variance).masked_fill_(~is_dead.any(), 0.0)

    def _k_aux(self, n_dead: int) -> int:
        return min(self.config.k_aux or self.d // 2, n_dead)


def looks_late(device: torch.device) -> bool:
    """Whether steps go on for a while before the device is asked about them."""
    return device.type == "cuda"


def _variance(e: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
    return (e - e.mean(0)).square().sum().clamp_min(torch.finfo(e.dtype).tiny)

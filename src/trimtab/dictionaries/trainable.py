"""What TopK-like SAEs share in training: loss, gradients through active features only, AuxK, unit decoder rows.

Loss: mean over rows of ‖x − x̂‖², plus AuxK (Gao et al. 2024, appendix A.2): features that have long been silent
reconstruct the residual x − x̂. Gradients are written out instead of recorded, because they need k of n features where
automatic differentiation would take all; the tests compare each with a dense autograd reference.

The encoder is kept as rows, one per feature, so that both weights are read and collected in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.sparse import (
    ActivePairs,
    collect_rows,
    decode_pairs,
    dot_pairs,
    order_by_feature,
    sum_by_feature,
)
from trimtab.errors import UserError

BiasInit = Literal["geometric_median", "mean", "zeros"]
EncoderDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class SparseSAEConfig:
    """What TopK-like SAEs have in common."""

    n_features: int
    """Features to learn."""
    k: int
    """Active features per row."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss; 0 leaves it out."""
    k_aux: int | None = None
    """Silent features per row that reconstruct the residual; half the width if not given."""
    dead_after: int = 10_000_000
    """Rows without firing after which a feature counts as dead."""
    b_dec_init: BiasInit = "geometric_median"
    """Where the decoder bias starts, estimated from a sample of rows."""
    apply_b_dec_to_input: bool = True
    """Whether the encoder sees x − b_dec."""
    encoder_dtype: EncoderDtype = "float32"
    """Precision of the dense product that chooses active features; `bfloat16` is faster where the processor has matrix
    units for it. Codes and gradients are in full precision in any case."""
    block_rows: int = 512
    """Rows encoded at once, so that dense pre-activations stay in the cache."""

    def __post_init__(self) -> None:
        if self.n_features < 1:
            raise UserError(f"n_features {self.n_features}", "an SAE needs at least one feature", "set it above 0")
        if not 1 <= self.k < self.n_features:
            raise UserError(
                f"k {self.k}", f"it must be from 1 to n_features − 1 = {self.n_features - 1}", "choose a smaller k"
            )
        for name in ("aux_coefficient", "dead_after"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} {getattr(self, name)}", "it must not be negative", "set it to 0 or more")
        for name, value in (("k_aux", self.k_aux), ("block_rows", self.block_rows)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value}", "it must be positive", "set it to 1 or more")


class StepLoss(NamedTuple):
    """Sums over one batch, in the units of the rows that were given."""

    loss: Float[Tensor, ""]
    """What is minimised: squared error per row plus the weighted AuxK loss."""
    squared_error: Float[Tensor, ""]
    """Mean over rows of ‖x − x̂‖²."""
    variance: Float[Tensor, ""]
    """Mean over rows of ‖x − x̄‖², x̄ the batch's mean."""
    aux: Float[Tensor, ""]
    """AuxK loss before its coefficient: share of the residual's variance left; 0 when no feature is dead."""
    l0: float
    """Features with a positive code, mean over rows."""
    n_dead: int
    """Dead features before this batch."""


class TrainableSAE(nn.Module):
    """Base of the training classes. A subclass chooses active features (`active_pairs`) and exports (`export`).

    `gradients(x)` fills every parameter's `.grad`; an optimiser's step and `normalise_decoder()` follow. Rows are in
    whatever units the caller scales them to.
    """

    architecture: ClassVar[str]
    tokens_since_fired: Tensor

    def __init__(self, config: SparseSAEConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.d = config, d
        self.k = config.k
        """Active features per row now; training may start with more than config.k."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(config.n_features, d, generator=generator, dtype=torch.float32).to(dtype)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_enc_rows = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.n_features, dtype=dtype))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype))
        self.register_buffer("tokens_since_fired", torch.zeros(config.n_features, dtype=torch.long))

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "m d"]) -> None:
        """Set b_dec from a sample of scaled rows."""
        if self.config.b_dec_init == "mean":
            self.b_dec.copy_(sample.mean(0))
        elif self.config.b_dec_init == "geometric_median":
            self.b_dec.copy_(geometric_median(sample))

    def active_pairs(self, z: Float[Tensor, "B d"]) -> ActivePairs:
        """Choose the active features of encoder inputs z, and their codes."""
        raise NotImplementedError

    def export(self, info: DictionaryInfo) -> SAE:
        """The dictionary for inference, in the units of the rows that were given; `fold_scale` brings it to others."""
        raise NotImplementedError

    def calibrate(self, rows: Float[Tensor, "m d"]) -> dict[str, float]:
        """Estimate from held-out scaled rows what inference needs beyond the weights; by default nothing."""
        return {}

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "B d"]) -> StepLoss:
        """Compute the loss of a batch and fill every parameter's `.grad`; count which features fired."""
        n, rows = self.config.n_features, x.shape[0]
        z = self.encoder_input(x)
        pairs = self.active_pairs(z)
        with torch.enable_grad():
            value = pairs.value.detach().requires_grad_()
            decoded = decode_pairs(pairs._replace(value=value), self.W_dec.detach())
        error = decoded.detach() + self.b_dec - x
        grad_x = error * (2 / rows)
        (grad_value,) = torch.autograd.grad(decoded, value, grad_x)
        fired = pairs.value > 0
        grad_value *= fired

        order = order_by_feature(pairs, n)
        self.W_dec.grad = collect_rows(order, pairs.value, grad_x)
        self.W_enc_rows.grad = collect_rows(order, grad_value, z)
        self.b_enc.grad = sum_by_feature(pairs, grad_value, n)
        self.b_dec.grad = grad_x.sum(0)
        dead = (self.tokens_since_fired > self.config.dead_after).nonzero().squeeze(1)
        aux = self._add_aux_gradients(dead, z, -error)
        if self.config.apply_b_dec_to_input:
            self.b_dec.grad -= self.b_enc.grad @ self.W_enc_rows

        self.tokens_since_fired += rows
        self.tokens_since_fired[pairs.feature[fired]] = 0
        squared_error = error.square().sum() / rows
        return StepLoss(
            loss=squared_error + self.config.aux_coefficient * aux,
            squared_error=squared_error,
            variance=(x - x.mean(0)).square().sum() / rows,
            aux=aux,
            l0=int(fired.sum()) / rows,
            n_dead=len(dead),
        )

    def encoder_input(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """What the encoder sees of rows x."""
        return x - self.b_dec.detach() if self.config.apply_b_dec_to_input else x

    def dense_encoder(self) -> Callable[[Float[Tensor, "B d"]], Float[Tensor, "B n"]]:
        """The map from encoder inputs to all pre-activations, in the precision that features are chosen in."""
        W, b = self.W_enc_rows.detach(), self.b_enc.detach()
        if self.config.encoder_dtype == "float32":
            return lambda z: F.linear(z, W, b)
        W, b = W.bfloat16(), b.bfloat16()
        return lambda z: F.linear(z.bfloat16(), W, b)

    def full_precision(self, pairs: ActivePairs, z: Float[Tensor, "B d"]) -> ActivePairs:
        """The pairs with their codes computed anew, if they were chosen in less than full precision."""
        if self.config.encoder_dtype == "float32":
            return pairs
        h = dot_pairs(pairs, z, self.W_enc_rows) + self.b_enc.detach()[pairs.feature]
        return pairs._replace(value=h.relu_())

    def _add_aux_gradients(self, dead: Tensor, z: Tensor, residual: Tensor) -> Tensor:
        """AuxK: the k_aux largest of the dead features' codes reconstruct the residual, which counts as data."""
        coefficient = self.config.aux_coefficient
        if not len(dead) or not coefficient:
            return residual.new_zeros(())
        assert self.W_dec.grad is not None
        assert self.W_enc_rows.grad is not None
        assert self.b_enc.grad is not None
        W_enc, W_dec = self.W_enc_rows[dead], self.W_dec[dead]
        k_aux = min(self.config.k_aux or self.d // 2, len(dead))
        h = torch.addmm(self.b_enc[dead], z, W_enc.T)
        top = h.topk(k_aux, dim=1, sorted=False)
        f = torch.zeros_like(h).scatter_(1, top.indices, top.values.relu())
        error = f @ W_dec - residual
        variance = (residual - residual.mean(0)).square().sum().clamp_min(torch.finfo(h.dtype).tiny)
        grad = error * (2 * coefficient / variance)
        grad_f = (grad @ W_dec.T).mul_(f > 0)
        self.W_dec.grad.index_add_(0, dead, f.T @ grad)
        self.W_enc_rows.grad.index_add_(0, dead, grad_f.T @ z)
        self.b_enc.grad.index_add_(0, dead, grad_f.sum(0))
        return error.square().sum() / variance

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from each decoder row's gradient the part along the row, which the unit norm would undo."""
        assert self.W_dec.grad is not None
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad.addcmul_(self.W_dec, along, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring every decoder row back to norm 1."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)

    def inference_weights(self) -> dict[str, Tensor]:
        """Encoder, decoder and biases under the names that inference classes use, in scaled units."""
        return {
            "W_enc": self.W_enc_rows.detach().T.contiguous(),
            "b_enc": self.b_enc.detach().clone(),
            "W_dec": self.W_dec.detach().clone(),
            "b_dec": self.b_dec.detach().clone(),
        }

    def named_info(self, info: DictionaryInfo, architecture: str) -> DictionaryInfo:
        """`info` with the inference architecture's name and the training recipe."""
        recipe: dict[str, Any] = {"architecture": self.architecture, **dataclasses.asdict(self.config)}
        return dataclasses.replace(info, architecture=architecture, metadata={**info.metadata, "training": recipe})


def geometric_median(x: Float[Tensor, "m d"], iterations: int = 100, tolerance: float = 1e-5) -> Float[Tensor, " d"]:
    """The point with the least summed distance to the rows (Weiszfeld's iteration)."""
    median = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - median).norm(dim=1).clamp_min(torch.finfo(x.dtype).eps)
        new = (weight @ x) / weight.sum()
        moved, median = (new - median).norm(), new
        if moved <= tolerance * median.norm():
            break
    return median

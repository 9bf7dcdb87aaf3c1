"""The JumpReLU SAE: a ReLU SAE whose feature fires only above its own threshold θ (Rajamanoharan et al. 2024b,
arXiv 2407.14435).

BatchTopK and Matryoshka SAEs are saved as this architecture, with one threshold for all features.

In training, f = h·[h > θ] has no useful derivative by θ. The straight-through estimator takes, with the rectangle
K(u) = [|u| < 1/2] and a bandwidth ε, ∂f/∂θ = −(θ/ε) K((h − θ)/ε) and ∂[h > θ]/∂θ = −(1/ε) K((h − θ)/ε): pairs a little
below their threshold count as well as those a little above it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.active import Active, Values, active_above, pairs_above
from trimtab.dictionaries.encoding import DenseEncoder, exceeded_on
from trimtab.dictionaries.penalised import Penalised, PenalisedConfig
from trimtab.dictionaries.sae import SAE, columns
from trimtab.dictionaries.screening import screening_is_fast
from trimtab.dictionaries.sparse import ActivePairs
from trimtab.dictionaries.trainable import Loss
from trimtab.errors import UserError
from trimtab.runs import check_values

Penalty = Literal["l0_target", "tanh", "l0"]

BANDWIDTH = {"l0_target": 0.5, "tanh": 2.0, "l0": 0.5}
"""Default bandwidths, for rows with E‖x‖ = √d."""
TARGET_WEIGHT = 20.0
"""Weight of the target penalty, in units of L0*·θ² at the start. The last features to fire are worth a small part of
that θ², so that L0 stays near L0*."""
START_WEIGHT = 0.3
"""Where a driven weight starts, in units of θ² at the start."""


class JumpReLU(SAE):
    """JumpReLU SAE for inference: f = ReLU(z) · [z > θ] with z = (x − b_dec) W_enc + b_enc; at z = θ it is silent."""

    architecture = "jumprelu"
    shapes: ClassVar = {"W_enc": "d n", "b_enc": "n", "W_dec": "n d", "b_dec": "d", "threshold": "n"}
    b_enc: nn.Parameter
    threshold: nn.Parameter

    def codes(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"] | None) -> Float[Tensor, "... m"]:
        z = self.encoder_input(x) @ columns(self.W_enc, ids) + columns(self.b_enc, ids)
        return torch.where(z > columns(self.threshold, ids), z.relu(), 0.0)

    def encode_pairs(self, x: Float[Tensor, "B d"]) -> ActivePairs:
        """Codes of rows as a list: by blocks, so that those of all features are never held at once."""
        encoder = DenseEncoder(self.W_enc.T, self.b_enc)
        if screening_is_fast(encoder):  # which takes single rows
            encoder = DenseEncoder(self.W_enc.T.contiguous(), self.b_enc)
        return pairs_above(encoder, self.encoder_input(x), self.threshold.clamp_min(0))


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(PenalisedConfig):
    """Training of a JumpReLU SAE.

    Bandwidth, initial threshold and tanh scale are for rows with E‖x‖ = √d; for rows that are scaled otherwise they
    are converted, by the mean norm of the sample that `initialise` is given.
    """

    penalty: Penalty | None = None
    """`l0_target` is w·(L0/l0 − 1)² with a w taken from the data, without warm-up: the default with a target `l0`. `l0`
    is λ·L0, the default with a fixed weight. `tanh` is λ·Σ tanh(c·f), which also draws the codes (Anthropic, January
    2025). λ is `sparsity_weight` or driven to `l0`."""
    bandwidth: float | None = None
    """ε of the straight-through estimator; 2 for `tanh` and 0.5 for the others if not given."""
    theta_init: float | None = None
    """Threshold of every feature at the start. If not given, each feature starts with the one that it exceeds on
    l0/n_features of the rows, so that L0 starts at l0 and no feature starts dead."""
    tanh_scale: float = 4.0
    """c of the `tanh` penalty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty == "l0_target" and self.l0 is None:
            raise UserError("l0 None", "the penalty l0_target needs a target", "give --l0, or another --penalty")
        check_values(self, "positive and finite", lambda value: 0 < value < math.inf, "bandwidth", "tanh_scale")
        check_values(self, "at least 0 and finite", lambda value: 0 <= value < math.inf, "theta_init")

    @property
    def kind(self) -> Penalty:
        """The penalty: `l0_target` with a target and `l0` without, unless it is given."""
        return self.penalty or ("l0" if self.l0 is None else "l0_target")

    @property
    def weight_target(self) -> float | None:
        return None if self.kind == "l0_target" else self.l0


class PenaltyTerm(NamedTuple):
    """A sparsity penalty with its weight, mean over rows, and its derivatives."""

    value: Float[Tensor, ""]
    by_l0: Float[Tensor, ""] | float
    """By the mean number of active features per row."""
    by_f: Values | float
    """By every code."""


class TrainableJumpReLU(Penalised):
    """JumpReLU in training, with decoder rows of norm 1.

    The parameter is θ itself, not its logarithm, divided by the mean norm of the rows: so Adam, whose steps have the
    size of the learning rate, moves thresholds about as fast as weights, however rows are scaled.
    """

    architecture = "jumprelu"
    config_class = JumpReLUConfig
    inference_class = JumpReLU
    vectors = ("b_enc", "theta")
    on_host = ("row_norm", "target_weight")
    config: JumpReLUConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    theta: nn.Parameter
    row_norm: Tensor
    target_weight: Tensor

    def __init__(self, config: JumpReLUConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, d, seed=seed, dtype=dtype)
        self.theta.data = self.theta.data.to(torch.promote_types(dtype, torch.float32))
        self.theta.data.fill_((config.theta_init or 0.0) / math.sqrt(d))
        self.register_buffer("row_norm", torch.tensor(math.sqrt(d), dtype=torch.float64))
        self.register_buffer("target_weight", torch.ones((), dtype=torch.float64))

    def loss(self, x: Float[Tensor, "B d"]) -> Loss:
        """‖x − x̂‖² and a penalty (equation 9), f = h·[h > θ], with the estimators of equations 11 and 12."""
        h, theta = self.pre_activations(x), self.theta * self.row_norm.to(self.theta.dtype)
        kernel = ((h - theta).abs() < self.bandwidth / 2).to(h.dtype) / self.bandwidth  # K((h − θ)/ε) / ε
        through = theta.detach() - theta  # 0, of derivative −1
        fires = (h > theta) + kernel * through
        f = h * (h > theta) + theta.detach() * kernel * through
        squared_error = (x - self.reconstruct(f)).square().sum(1).mean()
        sparsity = self.penalty(f, fires.sum(1).mean())
        return Loss(squared_error + sparsity, squared_error, f, sparsity=sparsity)

    def penalty(self, f: Float[Tensor, "B n"], l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """λ·L0, w·(L0/l0 − 1)² or λ·Σ tanh(c·f)."""
        if self.config.kind == "l0_target":
            assert self.config.l0 is not None
            return float(self.target_weight) * (l0 / self.config.l0 - 1) ** 2
        return self.control.weight * (l0 if self.config.kind == "l0" else torch.tanh(self.tanh_scale * f).sum(1).mean())

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "m d"]) -> None:
        """Set b_dec and the thresholds, and bring what depends on the scale of the rows to that of the sample."""
        super().initialise(sample)
        c = self.config
        self.row_norm.copy_(sample.norm(dim=1).mean().clamp_min(torch.finfo(sample.dtype).tiny))
        if c.theta_init is None:
            start_l0 = c.l0 if c.l0 is not None else min(self.d, c.n_features) / 4
            self.theta.copy_(
                exceeded_on(self.encoder_input(sample), self.W_enc_rows, start_l0 / c.n_features, self.b_enc)
                / self.row_norm
            )
        worth = max(float(self.threshold.double().square().mean()), torch.finfo(torch.float32).tiny)
        self.target_weight.fill_(TARGET_WEIGHT * (c.l0 or 1.0) * worth)
        self.control.start(START_WEIGHT * worth)

    @property
    def threshold(self) -> Float[Tensor, " n"]:
        """θ of every feature, in the unit of the codes."""
        return self.theta.detach() * self.row_norm.to(self.theta.dtype)

    @property
    def bandwidth(self) -> float:
        """ε, for rows as they are scaled."""
        return self._unit * (self.config.bandwidth or BANDWIDTH[self.config.kind])

    @property
    def tanh_scale(self) -> float:
        """c of the tanh penalty, for rows as they are scaled."""
        return self.config.tanh_scale / self._unit

    @property
    def _unit(self) -> float:
        """How the rows are scaled: 1 where their mean norm is √d."""
        return float(self.row_norm) / math.sqrt(self.d)

    def metrics(self) -> dict[str, float]:
        driven = {} if self.config.kind == "l0_target" else super().metrics()
        return {**driven, "threshold": float(self.threshold.mean())}

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "B d"]) -> Loss:
        z, rows = self.encoder_input(x), len(x)
        theta, bandwidth = self.threshold, self.bandwidth
        active = active_above(self.encoder(), z, theta - bandwidth / 2, execution=self.execution)
        theta_of = active.of_feature(theta)
        fires, near = active.h > theta_of, (active.h - theta_of).abs() < bandwidth / 2
        f = active.h * fires
        decoded = active.decode(f, self.W_dec)
        error = decoded.x + self.b_dec - x
        grad = error * (2 / rows)
        penalty = self._penalty_and_slopes(active, f, fires, rows)
        by_f = decoded.dot(grad) + penalty.by_f
        by_theta = (by_f * theta_of + penalty.by_l0 / rows) * near / -bandwidth
        self.b_enc.grad = self.fill_gradients(active, f, by_f * fires, grad, z)
        self.theta.grad = active.by_feature(by_theta).to(self.theta.dtype) * float(self.row_norm)
        squared_error = error.square().sum() / rows
        fired = active.fired(fires.to(f.dtype))
        return Loss(squared_error + penalty.value, squared_error, f, sparsity=penalty.value, fired=fired)

    def _penalty_and_slopes(self, active: Active, f: Values, fires: Tensor, rows: int) -> PenaltyTerm:
        if self.config.kind == "tanh":
            weight, scale = self.control.weight / rows, self.tanh_scale
            saturation = torch.tanh(scale * f)
            slope = (1 - saturation.square()) * (self.control.weight * scale / rows).to(f.dtype)
            return PenaltyTerm(active.total(saturation) * weight.to(f.dtype), 0.0, slope)
        l0 = active.total(fires.to(f.dtype)).double() / rows
        if self.config.kind == "l0":
            return PenaltyTerm((self.control.weight * l0).to(f.dtype), self.control.weight, 0.0)
        assert self.config.l0 is not None
        weight, excess = float(self.target_weight), l0 / self.config.l0 - 1
        return PenaltyTerm((weight * excess**2).to(f.dtype), 2 * weight * excess / self.config.l0, 0.0)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """As every SAE, and shrink θ's gradient: Adam does not mind, but it would rule the clipping of the others."""
        super().project_gradients()
        assert self.theta.grad is not None
        self.theta.grad /= math.sqrt(self.d)

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.theta.clamp_(min=0.0)

    def inference_weights(self) -> dict[str, Tensor]:
        weights = super().inference_weights()
        del weights["theta"]
        return {**weights, "threshold": self.threshold.to(self.W_dec.dtype)}

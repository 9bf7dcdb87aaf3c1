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

from trimtab.dictionaries.active import DENSE_ABOVE, Active, Values, active_above
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.encoding import exceeded_on
from trimtab.dictionaries.l0_control import L0Control, PenalisedConfig
from trimtab.dictionaries.sae import SAE, columns
from trimtab.dictionaries.trainable import StepLoss, TrainableSAE, batch_variance

Penalty = Literal["l0_target", "tanh", "l0"]

BANDWIDTH = {"l0_target": 0.5, "tanh": 2.0, "l0": 0.5}
"""Default bandwidths, for rows with E‖x‖ = √d."""
TARGET_WEIGHT = 20.0
"""Weight of the target penalty, in units of L0*·θ² at the start. The last features to fire are worth a small part of
that θ², so that L0 stays near L0*."""
START_WEIGHT = 0.3
"""Where a driven weight starts, in units of θ² at the start."""


class JumpReLU(SAE):
    """JumpReLU SAE for inference: f = ReLU(z) · [z > θ] with z = (x − b_dec) W_enc + b_enc; at z = θ it is silent.

    Args:
        W_enc, b_enc: encoder.
        W_dec, b_dec: decoder.
        threshold: θ of every feature.
        apply_b_dec_to_input: whether the encoder sees x − b_dec (True) or x.
        info: where it comes from.
    """

    architecture = "jumprelu"
    shapes: ClassVar = {"W_enc": "d n", "b_enc": "n", "W_dec": "n d", "b_dec": "d", "threshold": "n"}
    b_enc: nn.Parameter
    threshold: nn.Parameter

    def __init__(
        self,
        W_enc: Float[Tensor, "d n"],
        b_enc: Float[Tensor, " n"],
        W_dec: Float[Tensor, "n d"],
        b_dec: Float[Tensor, " d"],
        threshold: Float[Tensor, " n"],
        *,
        apply_b_dec_to_input: bool = True,
        info: DictionaryInfo | None = None,
    ) -> None:
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
        info = info or DictionaryInfo(architecture=self.architecture)
        super().__init__(weights, apply_b_dec_to_input=apply_b_dec_to_input, info=info)

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        return self._encode(x, None)

    def encode_features(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"]) -> Float[Tensor, "... m"]:
        return self._encode(x, ids)

    def _encode(self, x: Tensor, ids: Tensor | None) -> Tensor:
        z = self.encoder_input(x) @ columns(self.W_enc, ids) + columns(self.b_enc, ids)
        return torch.where(z > columns(self.threshold, ids), z.relu(), 0.0)


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
        choices = Penalty.__args__  # pyright: ignore[reportAttributeAccessIssue]
        self.check("penalty", self.kind in choices, f"it is one of {', '.join(choices)}", "choose one")
        ok = self.penalty != "l0_target" or self.l0 is not None
        self.check("l0", ok, "the penalty l0_target needs a target", "give --l0, or another --penalty")
        for name in ("bandwidth", "tanh_scale"):
            value = getattr(self, name)
            self.check(name, value is None or 0 < value < math.inf, "it must be positive", "set it above 0")
        ok = self.theta_init is None or 0 <= self.theta_init < math.inf
        self.check("theta_init", ok, "a threshold must not be negative", "set it to 0 or more")

    @property
    def kind(self) -> Penalty:
        """The penalty: `l0_target` with a target and `l0` without, unless it is given."""
        return self.penalty or ("l0" if self.l0 is None else "l0_target")


class PenaltyTerm(NamedTuple):
    """A sparsity penalty with its weight, mean over rows, and its derivatives."""

    value: Float[Tensor, ""]
    by_l0: float
    """By the mean number of active features per row."""
    by_f: Values | float
    """By every code."""


class TrainableJumpReLU(TrainableSAE):
    """JumpReLU in training, with decoder rows of norm 1.

    The parameter is θ itself, not its logarithm, divided by the mean norm of the rows: so Adam, whose steps have the
    size of the learning rate, moves thresholds about as fast as weights, however rows are scaled.
    """

    architecture = "jumprelu"
    config_class = JumpReLUConfig
    vectors = ("b_enc", "theta")
    config: JumpReLUConfig
    theta: nn.Parameter
    row_norm: Tensor
    target_weight: Tensor
    dense_above: float = DENSE_ABOVE
    """Share of pairs in play above which a step is dense."""

    def __init__(self, config: JumpReLUConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, d, seed=seed, dtype=dtype)
        self.theta.data = self.theta.data.to(torch.promote_types(dtype, torch.float32))
        self.theta.data.fill_((config.theta_init or 0.0) / math.sqrt(d))
        self.register_buffer("row_norm", torch.tensor(math.sqrt(d), dtype=torch.float64))
        self.register_buffer("target_weight", torch.ones((), dtype=torch.float64))
        target = None if config.kind == "l0_target" else config.l0
        weight = 1.0 if config.sparsity_weight is None else config.sparsity_weight
        self.control = L0Control(weight, target, warmup_share=config.sparsity_warmup_share)

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
    def unit(self) -> float:
        """How the rows are scaled: 1 where their mean norm is √d."""
        return float(self.row_norm) / math.sqrt(self.d)

    def begin_step(self, done: float) -> None:
        self.control.begin_step(done)

    def knobs(self) -> dict[str, float]:
        driven = {} if self.config.kind == "l0_target" else {"sparsity_weight": self.control.weight}
        return {**driven, "threshold": float(self.threshold.mean())}

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "B d"]) -> StepLoss:
        z = self.encoder_input(x)
        theta, bandwidth = self.threshold, self.unit * (self.config.bandwidth or BANDWIDTH[self.config.kind])
        active = active_above(self.encoder(), z, theta - bandwidth / 2, dense_above=self.dense_above)
        theta_of = active.of_feature(theta)
        fires, near = active.h > theta_of, (active.h - theta_of).abs() < bandwidth / 2
        f = active.h * fires
        decoded = active.decode(f, self.W_dec)
        error = decoded.x + self.b_dec - x
        grad = error * (2 / len(x))
        l0 = float(active.total(fires.to(f.dtype))) / len(x)
        penalty = self._penalty(active, f, l0, len(x))
        by_f = decoded.dot(grad) + penalty.by_f
        by_h = by_f * fires
        by_theta = (by_f * theta_of + penalty.by_l0 / len(x)) * near / -bandwidth
        self.W_enc_rows.grad = active.collect(by_h, z)
        self.b_enc.grad = active.by_feature(by_h)
        self.theta.grad = active.by_feature(by_theta).to(self.theta.dtype) * float(self.row_norm)
        self.W_dec.grad = active.collect(f, grad)
        self.b_dec.grad = grad.sum(0)
        if self.config.apply_b_dec_to_input:
            self.b_dec.grad -= self.b_enc.grad @ self.W_enc_rows
        n_dead = int(self.dead_features().sum())
        self.count_fired(active.fired(fires.to(f.dtype)), len(x))
        self.control.update(l0)
        squared_error = error.square().sum() / len(x)
        return StepLoss(
            loss=squared_error + penalty.value,
            squared_error=squared_error,
            variance=batch_variance(x),
            sparsity=penalty.value,
            aux=penalty.value.new_zeros(()),
            l0=l0,
            n_dead=n_dead,
        )

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

    def export(self, info: DictionaryInfo) -> JumpReLU:
        weights = self.inference_weights()
        del weights["theta"]
        return JumpReLU(
            **weights,
            threshold=self.threshold.to(self.W_dec.dtype),
            apply_b_dec_to_input=self.config.apply_b_dec_to_input,
            info=self.named_info(info, JumpReLU.architecture),
        )

    def _penalty(self, active: Active, f: Values, l0: float, rows: int) -> PenaltyTerm:
        if self.config.kind == "l0_target":
            assert self.config.l0 is not None
            weight, excess = float(self.target_weight), l0 / self.config.l0 - 1
            return PenaltyTerm(f.new_tensor(weight * excess**2), 2 * weight * excess / self.config.l0, 0.0)
        weight = self.control.weight
        if self.config.kind == "l0":
            return PenaltyTerm(f.new_tensor(weight * l0), weight, 0.0)
        scale = self.config.tanh_scale / self.unit
        saturation = torch.tanh(scale * f)
        slope = (1 - saturation.square()) * (weight * scale / rows)
        return PenaltyTerm(active.total(saturation) * (weight / rows), 0.0, slope)

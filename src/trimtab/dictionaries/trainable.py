"""What every SAE in training is: parameters, one step's gradients, and the way to its inference class.

Conventions for all architectures: the squared error is summed over the width and averaged over rows; rows come scaled
by one scalar (`training` names it and folds it into the saved weights); penalties are averaged over rows. The encoder
is kept as rows, one per feature, so that both weights are read and collected in the same way.

Gradients are written out instead of recorded, because they need the active features only, where automatic
differentiation would take all; the tests compare each with a dense autograd reference.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.encoding import DenseEncoder, EncoderDtype
from trimtab.dictionaries.sae import SAE
from trimtab.errors import UserError

BiasInit = Literal["geometric_median", "mean", "zeros"]


@dataclass(frozen=True, kw_only=True)
class TrainableConfig:
    """What the training of every architecture has in common."""

    n_features: int
    """Features to learn."""
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
        self.check("dead_after", self.dead_after >= 0, "it must not be negative", "set it to 0 or more")
        self.check("block_rows", self.block_rows >= 1, "it must be positive", "set it to 1 or more")

    def check(self, name: str, ok: bool, rule: str, mend: str) -> None:
        """Raise a `UserError` about a field unless it is as it must be."""
        if not ok:
            raise UserError(f"{name} {getattr(self, name)}", rule, mend)


class StepLoss(NamedTuple):
    """The loss of one batch, in the units of the rows that were given."""

    loss: Float[Tensor, ""]
    """What is minimised: squared error per row plus the weighted penalties."""
    squared_error: Float[Tensor, ""]
    """Mean over rows of ‖x − x̂‖²."""
    variance: Float[Tensor, ""]
    """Mean over rows of ‖x − x̄‖², x̄ the batch's mean."""
    sparsity: Float[Tensor, ""]
    """The sparsity penalty with its weight, mean over rows; 0 where sparsity is by construction."""
    aux: Float[Tensor, ""]
    """The auxiliary loss before its coefficient; 0 without one."""
    l0: float
    """Features with a positive code, mean over rows."""
    n_dead: int
    """Dead features before this batch."""


class TrainableSAE(nn.Module):
    """Base of the training classes.

    `gradients(x)` fills every parameter's `.grad`; `project_gradients()`, an optimiser's step and `constrain()` follow.
    Whatever changes in training is a parameter or a buffer, so that `state_dict()` is the whole state.

    Args:
        config: of the architecture's `config_class`.
        d: width of the rows.
        seed: of the initial weights.
        dtype: of the parameters.
    """

    architecture: ClassVar[str]
    """Name of the training architecture; the saved one may differ (BatchTopK is saved as JumpReLU)."""
    config_class: ClassVar[type[TrainableConfig]]
    vectors: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters with one entry per feature; all start at 0."""
    W_enc_rows: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    tokens_since_fired: Tensor

    def __init__(self, config: TrainableConfig, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert isinstance(config, self.config_class), f"{type(config).__name__} is not of {self.architecture}"
        self.config, self.d = config, d
        n = config.n_features
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(n, d, generator=generator, dtype=torch.float32).to(dtype)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_enc_rows = nn.Parameter(rows.clone())
        for name in self.vectors:
            self.register_parameter(name, nn.Parameter(torch.zeros(n, dtype=dtype)))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype))
        self.register_buffer("tokens_since_fired", torch.zeros(n, dtype=torch.long))

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "m d"]) -> None:
        """Set b_dec from a sample of scaled rows."""
        if self.config.b_dec_init == "mean":
            self.b_dec.copy_(sample.mean(0))
        elif self.config.b_dec_init == "geometric_median":
            self.b_dec.copy_(geometric_median(sample))

    def begin_step(self, done: float) -> None:
        """Set what depends on how much of the training is done (0 ≤ done < 1); by default nothing does."""

    def gradients(self, x: Float[Tensor, "B d"]) -> StepLoss:
        """Compute the loss of a batch and fill every parameter's `.grad`; count which features fired."""
        raise NotImplementedError

    def knobs(self) -> dict[str, float]:
        """What the schedule or the L0 control has set (k, p, sparsity_weight), for the metrics."""
        return {}

    def calibrate(self, rows: Float[Tensor, "m d"]) -> dict[str, float]:
        """Estimate from held-out scaled rows what inference needs beyond the weights; by default nothing."""
        return {}

    def export(self, info: DictionaryInfo) -> SAE:
        """The dictionary for inference, in the units of the rows that were given; `fold_scale` brings it to others."""
        raise NotImplementedError

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove from each decoder row's gradient the part along the row, which the unit norm would undo."""
        assert self.W_dec.grad is not None
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad.addcmul_(self.W_dec, along, value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring every decoder row back to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    def encoder_input(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """What the encoder sees of rows x."""
        return x - self.b_dec.detach() if self.config.apply_b_dec_to_input else x

    def encoder(self, bias: Float[Tensor, " n"] | None = None) -> DenseEncoder:
        """The map from encoder inputs to all pre-activations.

        Args:
            bias: added to the product; b_enc by default.
        """
        bias = self.b_enc if bias is None else bias
        return DenseEncoder(self.W_enc_rows.detach(), bias.detach(), self.config.encoder_dtype, self.config.block_rows)

    def count_fired(self, fired: Bool[Tensor, " n"], rows: int) -> None:
        """Note which features fired in a batch of so many rows."""
        self.tokens_since_fired += rows
        self.tokens_since_fired.masked_fill_(fired, 0)

    def dead_features(self) -> Bool[Tensor, " n"]:
        """Which features have been silent for more than `dead_after` rows."""
        return self.tokens_since_fired > self.config.dead_after

    def inference_weights(self) -> dict[str, Tensor]:
        """Encoder, decoder and every per-feature vector under the names that inference classes use, in scaled units."""
        return {
            "W_enc": self.W_enc_rows.detach().T.contiguous(),
            **{name: getattr(self, name).detach().clone() for name in self.vectors},
            "W_dec": self.W_dec.detach().clone(),
            "b_dec": self.b_dec.detach().clone(),
        }

    def named_info(self, info: DictionaryInfo, architecture: str) -> DictionaryInfo:
        """`info` with the inference architecture's name and the training recipe."""
        recipe: dict[str, Any] = {"architecture": self.architecture, **dataclasses.asdict(self.config)}
        return dataclasses.replace(info, architecture=architecture, metadata={**info.metadata, "training": recipe})


def batch_variance(x: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
    """Mean over rows of ‖x − x̄‖²."""
    return (x - x.mean(0)).square().sum() / x.shape[0]


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

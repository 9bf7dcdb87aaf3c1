"""What every SAE in training is: parameters, the paper's loss, a step's gradients, and what it is saved as.

Conventions for all architectures: the squared error is summed over the width and averaged over rows; rows come scaled
by one scalar (`training` names it and folds it into the saved weights); penalties are averaged over rows. The encoder
is kept as rows, one per feature, so that both weights are read and collected in the same way.

An architecture states its `loss`; everything else follows from it by automatic differentiation. It may override
`gradients` with the same gradients written out, which need the active features only; the tests compare the two.

On an accelerator a step asks the device for nothing, as that would make both wait: numbers that follow from the rows
stay there as tensors, and what Python decides by is on the host (`on_host`). What changes is changed in place, so that
a step may be replayed as a graph (`training.step_graph`), without its Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.active import Active, Execution, Values
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.encoding import DenseEncoder
from trimtab.dictionaries.precision import Precision, float32_products, precision_on
from trimtab.dictionaries.sae import SAE
from trimtab.kernels import row_kernel_for
from trimtab.runs import LEFT_OUT_AT_DEFAULT, check_choices, check_least

BiasInit = Literal["geometric_median", "mean", "zeros"]

TRAINABLE: dict[str, type[TrainableSAE]] = {}
"""Every architecture that can be trained, by its name."""


@dataclass(frozen=True, kw_only=True)
class TrainableConfig:
    """What the training of every architecture has in common. Options that an architecture adds have a default."""

    n_features: int
    """Features to learn."""
    dead_after: int = 10_000_000
    """Rows without firing after which a feature counts as dead."""
    b_dec_init: BiasInit = "geometric_median"
    """Where the decoder bias starts, estimated from a sample of rows."""
    apply_b_dec_to_input: bool = True
    """Whether the encoder sees x − b_dec."""
    freeze_decoder: bool = field(default=False, metadata=LEFT_OUT_AT_DEFAULT)
    """Leave decoder rows as they were drawn, at random: a control, in which the encoder alone learns."""
    precision: Precision = "auto"
    """Of dense matrix products; see `training.Recipe`."""
    block_rows: int = 512
    """Rows encoded at once, so that dense pre-activations stay in the cache."""

    def __post_init__(self) -> None:
        check_least(self, 1, "n_features", "block_rows")
        check_least(self, 0, "dead_after")
        check_choices(self)


class Loss(NamedTuple):
    """The loss of a batch, what it is made of, and the codes; numbers are means over rows."""

    total: Float[Tensor, ""]
    """What is minimised."""
    squared_error: Float[Tensor, ""]
    """‖x − x̂‖²."""
    codes: Float[Tensor, "B n"]
    """f. Gradients that are written out may give those of the active pairs only, [m], and say what `fired`."""
    sparsity: Float[Tensor, ""] | float = 0.0
    """The sparsity penalty with its weight."""
    aux: Float[Tensor, ""] | float = 0.0
    """The auxiliary loss before its coefficient."""
    fired: Bool[Tensor, " n"] | None = None
    """Features with a positive code in any row; None: as `codes` say."""
    variance: Float[Tensor, ""] | float = 0.0
    """‖x − x̄‖², x̄ the batch's mean. `backward` adds this and what follows."""
    l0: Float[Tensor, ""] | float = 0.0
    """Features with a positive code, in float64."""
    n_dead: Int[Tensor, ""] | int = 0
    """Dead features before this batch."""


class TrainableSAE(nn.Module):
    """Base of the training classes. A subclass that names its `architecture` can be trained by that name.

    It states its `loss`, and `inference_class`, what it is saved as. A step is `set_progress`, `backward`,
    `project_gradients`, an optimiser's step and `constrain`. Whatever changes in training is a parameter or a buffer,
    so that `state_dict()` is the whole state.

    Args:
        config: of the architecture's `config_class`.
        d: width of the rows.
        seed: of the initial weights.
        dtype: of the parameters.
    """

    architecture: ClassVar[str]
    """Name of the training architecture; the saved one may differ (BatchTopK is saved as JumpReLU)."""
    config_class: ClassVar[type[TrainableConfig]]
    inference_class: ClassVar[type[SAE]]
    vectors: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters with one entry per feature; all start at 0."""
    on_host: ClassVar[tuple[str, ...]] = ()
    """Buffers of one number that Python reads at every step: they stay on the host."""
    not_in_step: ClassVar[tuple[str, ...]] = ()
    """Attributes that Python changes between steps and that nothing in a step goes by. Any other that holds another
    value than before ends the replaying of a graph (`training.step_graph`)."""
    by_autograd: bool = False
    """Differentiate `loss` even where gradients are written out."""
    execution: Execution | None = None
    """How gradients that are written out are computed; None: as is known to be faster on a CPU."""
    W_enc_rows: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    tokens_since_fired: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "architecture" in vars(cls):
            TRAINABLE[cls.architecture] = cls

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast everything but what is `on_host`."""
        kept = {name: self._buffers[name] for name in self.on_host}
        super()._apply(fn, recurse)
        self._buffers.update(kept)
        return self

    @property
    def precision(self) -> Precision:
        """Of dense products, where the SAE is now."""
        return precision_on(self.b_dec.device, self.config.precision)

    @property
    def is_written_out(self) -> bool:
        """Whether there are gradients that are written out, and they are taken."""
        return type(self).gradients is not TrainableSAE.gradients and not self.by_autograd

    @property
    def waits(self) -> bool:
        """Whether a step is known to wait for an accelerator, as for a list of active pairs."""
        return self.execution in ("sparse", "screened")

    def loss(self, x: Float[Tensor, "B d"]) -> Loss:
        """The paper's loss of a batch, differentiable by every parameter. It changes no state."""
        raise NotImplementedError

    def gradients(self, x: Float[Tensor, "B d"]) -> Loss:
        """Compute the loss of a batch and fill every parameter's `.grad`; here by differentiating `loss`.

        An override gives the same numbers in less time.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss, parameters = self.loss(x), list(self.parameters())
        found = torch.autograd.grad(loss.total, parameters, allow_unused=True, materialize_grads=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        return loss._replace(
            **{name: part.detach() for name, part in loss._asdict().items() if isinstance(part, Tensor)}
        )

    def backward(self, x: Float[Tensor, "B d"]) -> Loss:
        """Fill every parameter's `.grad`, and update what follows the training: silent features, L0 control."""
        self.prepare(x)
        return self.backward_prepared(x)

    def prepare(self, x: Float[Tensor, "B d"]) -> None:
        """What comes before a batch's loss and may be decided in Python (`before_step`)."""
        with float32_products(self.precision, x.device):
            self.before_step(x)

    def backward_prepared(self, x: Float[Tensor, "B d"]) -> Loss:
        """What `backward` does after `prepare`. On an accelerator it may be replayed as a graph."""
        with float32_products(self.precision, x.device):
            n_dead = self.dead_features().sum()
            loss = TrainableSAE.gradients(self, x) if self.by_autograd else self.gradients(x)
        if self.config.freeze_decoder:
            assert self.W_dec.grad is not None
            self.W_dec.grad.zero_()
        active = loss.codes > 0
        count = active.count_nonzero()
        l0 = (count.cpu() if count.device.type == "mps" else count).double() / len(x)  # there is no float64 there
        self.tokens_since_fired += len(x)
        self.tokens_since_fired.masked_fill_(active.any(0) if loss.fired is None else loss.fired, 0)
        self.after_step(loss.codes, l0)
        variance = (x - x.mean(0)).square().sum() / x.shape[0]
        return loss._replace(variance=variance, l0=l0, n_dead=n_dead)

    def set_progress(self, done: float) -> None:
        """Set what depends on how much of the training is done (0 ≤ done < 1); by default nothing does."""

    def before_step(self, x: Float[Tensor, "B d"]) -> None:
        """Change what must change before a batch's loss; by default nothing."""

    def after_step(self, codes: Tensor, l0: Float[Tensor, ""]) -> None:
        """Update what follows from a batch's codes (as in `Loss`) and its mean number of active features."""

    def look_again(self) -> None:
        """Forget what was fetched from the device for several steps, as where a resumed training begins."""

    def metrics(self) -> dict[str, float]:
        """What is logged beside the loss: values that a schedule or a control has set (k, p, sparsity_weight)."""
        return {}

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "m d"]) -> None:
        """Set b_dec from a sample of scaled rows."""
        if self.config.b_dec_init == "mean":
            self.b_dec.copy_(sample.mean(0))
        elif self.config.b_dec_init == "geometric_median":
            self.b_dec.copy_(geometric_median(sample))

    def calibrate(self, rows: Float[Tensor, "m d"]) -> dict[str, float]:
        """Estimate from held-out scaled rows what inference needs beyond the weights; by default nothing."""
        return {}

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove from each decoder row's gradient the part along the row, which the unit norm would undo."""
        assert self.W_dec.grad is not None
        if remove_along_rows := row_kernel_for("remove_along_rows", self.W_dec.grad, self.W_dec):
            remove_along_rows(self.W_dec.grad, self.W_dec)
            return
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad.addcmul_(self.W_dec, along, value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring every decoder row back to norm 1."""
        if divide_rows_by_norm := row_kernel_for("divide_rows_by_norm", self.W_dec):
            divide_rows_by_norm(self.W_dec)
            return
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    def encoder_input(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """What the encoder sees of rows x."""
        return x - self.b_dec if self.config.apply_b_dec_to_input else x

    def pre_activations(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B n"]:
        """h = (x − b_dec) W_enc + b_enc, or x W_enc + b_enc."""
        return self.encoder_input(x) @ self.W_enc_rows.T + self.b_enc

    def reconstruct(self, f: Float[Tensor, "B n"]) -> Float[Tensor, "B d"]:
        """x̂ = f W_dec + b_dec."""
        return f @ self.W_dec + self.b_dec

    def encoder(self, bias: Float[Tensor, " n"] | None = None) -> DenseEncoder:
        """The map from encoder inputs to all pre-activations, with b_enc or another bias, not differentiable."""
        bias = self.b_enc if bias is None else bias
        screened = None if self.execution is None else self.execution == "screened"
        return DenseEncoder(
            self.W_enc_rows.detach(), bias.detach(), self.precision, self.config.block_rows, screened=screened
        )

    def fill_gradients(
        self, active: Active, f: Values, by_h: Values, by_x_hat: Float[Tensor, "B d"], z: Float[Tensor, "B d"]
    ) -> Float[Tensor, " n"]:
        """Set the gradients of encoder, decoder and b_dec, from those by pre-activations (`by_h`) and reconstruction.

        The active pairs have codes f, the encoder inputs are z. Returns the gradient by the encoder's bias.
        """
        by_bias = active.by_feature(by_h)
        self.W_dec.grad = active.collect(f, by_x_hat)
        self.W_enc_rows.grad = active.collect(by_h, z)
        self.b_dec.grad = by_x_hat.sum(0)
        if self.config.apply_b_dec_to_input:
            self.b_dec.grad -= by_bias @ self.W_enc_rows
        return by_bias

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

    def inference_settings(self) -> dict[str, Any]:
        """What the inference class is told beside the weights."""
        return {"apply_b_dec_to_input": self.config.apply_b_dec_to_input}

    def export(self, info: DictionaryInfo) -> SAE:
        """The dictionary for inference, in the units of the rows that were given; `fold_scale` brings it to others."""
        recipe: dict[str, Any] = {"architecture": self.architecture, **dataclasses.asdict(self.config)}
        kind = self.inference_class
        info = dataclasses.replace(info, architecture=kind.architecture, metadata={**info.metadata, "training": recipe})
        return kind(**self.inference_weights(), **self.inference_settings(), info=info)


def geometric_median(x: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """The point with the least summed distance to the rows (Weiszfeld's iteration)."""
    median = x.mean(0)
    for _ in range(100):
        weight = 1 / (x - median).norm(dim=1).clamp_min(torch.finfo(x.dtype).eps)
        new = (weight @ x) / weight.sum()
        moved, median = (new - median).norm(), new
        if moved <= 1e-5 * median.norm():
            break
    return median

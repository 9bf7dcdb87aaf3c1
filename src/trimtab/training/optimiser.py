"""Adam over an SAE's parameters, in one fused pass, with its state as named tensors.

The moments are dense: a feature that is silent in a batch still sees them decay, which is what Adam means. In a batch
of thousands of rows nearly every live feature fires, so that skipping silent ones would save nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam:
    """Adam for those of a module's parameters that require gradients, the whole gradient clipped to a norm (0: none).

    With a `weight_decay` it is AdamW (Loshchilov and Hutter 2019): each step takes lr · weight_decay off the weights.
    """

    def __init__(
        self, module: nn.Module, *, betas: tuple[float, float], clip_norm: float, weight_decay: float = 0.0
    ) -> None:
        self._parameters = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._adam = torch.optim.Adam(
            self._parameters.values(),
            betas=betas,
            weight_decay=weight_decay,
            decoupled_weight_decay=weight_decay > 0,
            fused=True,
        )
        self._clip_norm = clip_norm

    def step(self, lr: float | Float[Tensor, ""], skip: Bool[Tensor, ""] | None = None) -> Float[Tensor, ""]:
        """Clip the gradient and apply one step, unless its norm is not finite; returns the norm before clipping.

        Nothing waits for the device.

        Args:
            lr: learning rate; on a CUDA device it may be a tensor there, in float32.
            skip: whether to leave all as it is, as a tensor there.
        """
        parameters = list(self._parameters.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        unusable = ~norm.isfinite() if skip is None else ~norm.isfinite() | skip
        self._adam.found_inf = unusable.float()  # pyright: ignore[reportAttributeAccessIssue]
        if self._clip_norm:  # the fused step divides by this on its way, which saves a pass over the gradients
            scale = (norm / self._clip_norm).clamp_min(1).float()
            self._adam.grad_scale = scale  # pyright: ignore[reportAttributeAccessIssue]
        for group in self._adam.param_groups:
            group["lr"], group["capturable"] = lr, norm.is_cuda and torch.cuda.is_current_stream_capturing()
        self._adam.step()
        # What a graph computes is its own once it is captured.
        self._adam.found_inf = self._adam.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        return norm

    def state(self) -> dict[str, Tensor]:
        """Both moments and the step count of every parameter."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._adam.state[parameter].items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`, where parameters that never had a gradient are missing."""
        for name, parameter in self._parameters.items():
            if f"{name}.step" not in state:
                continue
            parts = {key: state[f"{name}.{key}"] for key in (*MOMENTS, "step")}
            self._adam.state[parameter] = {key: part.to(parameter.device, copy=True) for key, part in parts.items()}

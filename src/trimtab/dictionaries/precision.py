"""In which precision the dense matrix products of a training step are made. Weights, moments and sums stay as they are.

`tf32` is what a CUDA card's matrix units make of float32 operands, `bf16` takes operands rounded to bfloat16; both add
up in float32. On a CPU a product of bfloat16 operands is rounded to bfloat16 as well, as torch has no other there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError

Precision = Literal["auto", "fp32", "tf32", "bf16"]
MATRIX_UNITS = (8, 0)
"""Compute capability from which CUDA cards have matrix units for TF32 and bfloat16."""
_FLAGS = threading.RLock()
"""Torch's flags hold for the whole process, so that trainings in several threads take turns."""


def precision_on(device: str | torch.device, asked: Precision) -> Precision:
    """The precision of products on a device: what is asked for; for `auto` tf32 on CUDA cards that have it, else fp32.

    Raises:
        UserError: the device has no such products.
    """
    device = torch.device(device)
    has_units = device.type == "cuda" and torch.cuda.get_device_capability(device) >= MATRIX_UNITS
    if asked == "auto":
        return "tf32" if has_units else "fp32"
    if asked == "tf32" and device.type != "cuda":
        hint = "choose --precision fp32 or bf16, or --device cuda"
        raise UserError("precision tf32", f"device {device} has no such products, CUDA cards do", hint)
    if asked in ("tf32", "bf16") and device.type == "cuda" and not has_units:
        why = f"{torch.cuda.get_device_name(device)} has no such products"
        raise UserError(f"precision {asked}", why, "choose --precision fp32, or leave it out")
    return asked


@contextmanager
def float32_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let a CUDA device's products of float32 matrices be made in TF32 for `tf32`, else in full, whatever torch is set
    to; it is set back afterwards."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    with _FLAGS:
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


@contextmanager
def float32_sums(device: torch.device) -> Iterator[None]:
    """Have a CUDA device add up products of bfloat16 matrices in float32 throughout, whatever torch is set to."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    with _FLAGS:
        before = matmul.allow_bf16_reduced_precision_reduction
        matmul.allow_bf16_reduced_precision_reduction = False
        try:
            yield
        finally:
            matmul.allow_bf16_reduced_precision_reduction = before


def product(a: Float[Tensor, "l m"], b: Float[Tensor, "m n"], precision: Precision) -> Float[Tensor, "l n"]:
    """a b in the dtype of a; with `bf16` of rounded operands."""
    if precision != "bf16":
        return a @ b
    low, other = a.bfloat16(), b.bfloat16()
    made = torch.mm(low, other, out_dtype=torch.float32) if low.is_cuda else low @ other
    return made.to(a.dtype)

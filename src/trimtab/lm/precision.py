"""In which precision matrix products run at the moment, which the dtype of the weights does not say by itself.

torch may be set to round the factors of float32 products: to TF32 on a GPU, by oneDNN to bfloat16 or TF32 on a CPU.
What is compared with a model's own numbers must allow for that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ProductPrecision(NamedTuple):
    """How factors of matrix products are rounded."""

    name: str
    rounding: float
    """The largest share by which rounding changes a number."""
    finer: str = ""
    """How to have finer ones, if there are any."""


_LOAD = "load it in float32 (--dtype float32)"
_SET = 'let torch multiply in float32 (torch.set_float32_matmul_precision("highest"), no autocast)'

FLOAT32 = ProductPrecision("float32", 2.0**-24)
_OF_DTYPE = {torch.float32: FLOAT32, torch.float64: ProductPrecision("float64", 2.0**-53)}
_OF_SETTING = {"tf32": ProductPrecision("TF32", 2.0**-11, _SET), "bf16": ProductPrecision("bfloat16", 2.0**-8, _SET)}
"""By what `torch.backends.*.matmul.fp32_precision` calls it."""
_TF32_SINCE = (8, 0)
"""The compute capability of the first cards that have it."""


def product_precision(dtype: torch.dtype, device: torch.device) -> ProductPrecision:
    """How factors of products are rounded there, by torch's settings: autocast, and those of float32 products.

    Args:
        dtype: of weights and activations.
        device: where they are.
    """
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype, hint = torch.get_autocast_dtype(device.type), _SET
    else:
        hint = _LOAD
    if dtype in _OF_DTYPE:
        return _OF_SETTING.get(_setting(device), FLOAT32) if dtype == torch.float32 else _OF_DTYPE[dtype]
    return ProductPrecision(str(dtype).removeprefix("torch."), torch.finfo(dtype).eps / 2, hint)


def _setting(device: torch.device) -> str:
    if device.type == "cpu":
        return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _TF32_SINCE:
        return str(torch.backends.cuda.matmul.fp32_precision)
    return ""

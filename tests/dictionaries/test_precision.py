"""The precision of products: what devices have, what torch is set to meanwhile, what rounding does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trimtab.dictionaries.precision import Precision, float32_products, float32_sums, precision_on, product
from trimtab.dictionaries.screening import ALIGNED, Screen
from trimtab.errors import UserError

CARD = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a card that is not there says of itself; to be changed."""
    found = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: tuple(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "Some Card")
    return found


def test_auto_is_tf32_where_it_is_to_be_had(capability: list[int]) -> None:
    assert precision_on("cpu", "auto") == "fp32"
    assert precision_on(CARD, "auto") == "tf32"
    capability[:] = [7, 5]
    assert precision_on(CARD, "auto") == "fp32"


@pytest.mark.parametrize(
    ("device", "asked", "message"),
    [
        ("cpu", "tf32", "precision tf32: device cpu has no such products, CUDA cards do; choose --precision fp32 or"),
        ("cuda", "tf32", "precision tf32: Some Card has no such products; choose --precision fp32"),
        ("cuda", "bf16", "precision bf16: Some Card has no such products; choose --precision fp32"),
    ],
)
def test_what_a_device_does_not_have_is_refused(
    device: str, asked: Precision, message: str, capability: list[int]
) -> None:
    capability[:] = [7, 5]
    with pytest.raises(UserError, match=message):
        precision_on(device, asked)
    capability[:] = [8, 0]
    assert precision_on("cuda", asked) == asked
    assert precision_on("cpu", "bf16") == "bf16"


@pytest.fixture
def flags() -> Iterator[Any]:
    """Torch's settings of products on CUDA devices; set back in the end."""
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in ("fp32_precision", "allow_bf16_reduced_precision_reduction")}
    yield matmul
    for name, value in before.items():
        setattr(matmul, name, value)


@pytest.mark.parametrize("usual", ["none", "ieee", "tf32"])
@pytest.mark.parametrize(("precision", "set_to"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_torch_is_set_for_a_while_and_set_back(usual: str, precision: Precision, set_to: str, flags: Any) -> None:
    flags.fp32_precision = usual

    def fail() -> None:
        with float32_products(precision, CARD):
            assert flags.fp32_precision == set_to
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert flags.fp32_precision == usual
    with float32_products(precision, torch.device("cpu")):
        assert flags.fp32_precision == usual


@pytest.mark.parametrize("usual", [True, False])
def test_sums_of_bfloat16_are_not_rounded_meanwhile(usual: bool, flags: Any) -> None:
    flags.allow_bf16_reduced_precision_reduction = usual
    with float32_sums(CARD):
        assert not flags.allow_bf16_reduced_precision_reduction
    assert flags.allow_bf16_reduced_precision_reduction == usual


def test_products_are_of_rounded_operands() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, 50, generator=generator), torch.randn(50, 6, generator=generator)
    assert torch.equal(product(a, b, "fp32"), a @ b)
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    low = product(a, b, "bf16")
    assert low.dtype == torch.float32
    assert (low - rounded).abs().max() <= 2**-8 * rounded.abs().max()
    assert (a.double() @ b.double() - rounded).abs().max() > 2**-10 * rounded.abs().max()
    assert product(a.double(), b.double(), "bf16").dtype == torch.float64


@pytest.mark.parametrize("d", [1, 6, 7, 24])
def test_rows_of_a_screen_are_aligned(d: int) -> None:
    W, b = torch.randn(40, d, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 40)
    screen = Screen(W, b)
    assert screen.W.shape[1] % ALIGNED == 0
    assert screen.W.shape[1] - d - 2 < ALIGNED
    z = torch.randn(9, d, generator=torch.Generator().manual_seed(1))
    h = screen._rounded(z).double() @ screen.W.double().T
    expected = z.bfloat16().double() @ W.bfloat16().double().T + b
    assert torch.allclose(h, expected, atol=2**-16)

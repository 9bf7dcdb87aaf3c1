"""Linear maps by oneDNN against torch's own, and where they are left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from trimtab.lm import LanguageModel, TokenBatch, products
from trimtab.lm.products import fast_products, linears

BATCH = TokenBatch.full(torch.tensor([[3, 9, 14, 20, 5], [8, 2, 30, 41, 7]]))


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor for which it is, and whatever the size."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "FEATURES", 1)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The linear maps that oneDNN multiplies by, as they are called."""
    found: list[nn.Module] = []
    real = products._product

    def product(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        found.append(module)
        return real(module, x)

    monkeypatch.setattr(products, "_product", product)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 5, 48), (0, 48)])
def test_products_are_torchs(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    with torch.no_grad(), fast_products(linears(layer)):
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_models_logits_are_the_same(any_tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        expected = any_tiny.hf(input_ids=BATCH.ids).logits
    fresh, used = LanguageModel(any_tiny.hf, any_tiny.tokenizer, "fresh"), calls(monkeypatch)
    with torch.no_grad():
        assert torch.allclose(fresh.forward(BATCH), expected, atol=1e-4)
    assert {id(module) for module in used} == {id(module) for module in linears(any_tiny.hf)}
    assert not [module for module in any_tiny.hf.modules() if "forward" in vars(module)]


def test_a_wrong_product_shows(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: without the last of the columns."""
    with torch.no_grad():
        expected = tiny_llama.hf(input_ids=BATCH.ids).logits
        fresh = LanguageModel(tiny_llama.hf, tiny_llama.tokenizer, "fresh")
        monkeypatch.setattr(products, "_product", lambda module, x: x[..., :-1] @ module.weight[:, :-1].T)
        assert not torch.allclose(fresh.forward(BATCH), expected, atol=1e-2)


def gradient(model: LanguageModel) -> None:
    model.forward(BATCH)


def autocast(model: LanguageModel) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.forward(BATCH)


@pytest.mark.parametrize("run", [gradient, autocast])
def test_gradients_and_autocast_are_left_alone(
    tiny_llama: LanguageModel, run: Callable[[LanguageModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = LanguageModel(tiny_llama.hf, tiny_llama.tokenizer, "fresh")
    used = calls(monkeypatch)
    run(fresh)
    assert not used


def test_what_is_not_torchs_own_is_left_alone() -> None:
    class Special(nn.Linear):
        pass

    kept = nn.Linear(48, 48)
    others = [Special(48, 48), nn.Linear(48, 48).bfloat16(), nn.Linear(48, 48, device="meta")]
    found = linears(nn.ModuleList([*others, kept]))
    assert found == [kept]
    kept.bfloat16()  # after it was looked at
    with torch.no_grad(), fast_products(found):
        assert kept(torch.ones(48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_way_of_somebodys_stays(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have come after the model was wrapped, as accelerate's does."""
    fresh = LanguageModel(tiny_llama.hf, tiny_llama.tokenizer, "fresh")
    module = next(m for m in tiny_llama.hf.modules() if type(m) is nn.Linear)

    def own(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*x.shape[:-1], module.out_features)

    vars(module)["forward"] = own
    try:
        with torch.no_grad():
            assert torch.allclose(fresh.forward(BATCH), tiny_llama.hf(input_ids=BATCH.ids).logits, atol=1e-4)
        assert vars(module)["forward"] is own
    finally:
        del vars(module)["forward"]


def test_inside_another_call_nothing_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(48, 48)
    used = calls(monkeypatch)
    with torch.no_grad(), fast_products(linears(layer)):
        with fast_products(linears(layer)):
            layer(torch.ones(48))
        layer(torch.ones(48))
    assert len(used) == 2
    assert "forward" not in vars(layer)


def test_a_gradient_that_is_asked_for_inside_is_there() -> None:
    layer, x = nn.Linear(48, 48), torch.ones(48, requires_grad=True)
    with torch.no_grad(), fast_products(linears(layer)), torch.enable_grad():
        layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(0))


def test_an_error_inside_puts_everything_back() -> None:
    layer = nn.Linear(48, 48)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), fast_products(linears(layer)):
        raise ZeroDivisionError
    assert "forward" not in vars(layer)

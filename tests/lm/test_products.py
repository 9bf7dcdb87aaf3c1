"""Linear maps by oneDNN against torch's own, and where they are left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from trimtab.lm import LanguageModel, TokenBatch, products
from trimtab.lm.products import Products, linears

BATCH = TokenBatch.full(torch.tensor([[3, 9, 14, 20, 5], [8, 2, 30, 41, 7]]))


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor for which it is, and whatever the size."""
    if not products.has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "FEATURES", 1)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The linear maps that oneDNN multiplies by, as they are called."""
    found: list[nn.Module] = []
    real = Products._product

    def product(self: Products, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        found.append(module)
        return real(self, module, x)

    monkeypatch.setattr(Products, "_product", product)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 5, 48), (0, 48)])
def test_products_are_torchs(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    with torch.no_grad(), Products(linears(layer)).fast():
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
        monkeypatch.setattr(Products, "_product", lambda _, module, x: x[..., :-1] @ module.weight[:, :-1].T)
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
    others = [Special(48, 48), nn.Linear(48, 48).half(), nn.Linear(48, 48, device="meta")]
    found = linears(nn.ModuleList([*others, kept]))
    assert found == [kept]
    kept.bfloat16()  # after it was looked at
    with torch.no_grad(), Products(found).fast():
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
    with torch.no_grad(), Products(linears(layer)).fast():
        with Products(linears(layer)).fast():
            layer(torch.ones(48))
        layer(torch.ones(48))
    assert len(used) == 2
    assert "forward" not in vars(layer)


def test_a_gradient_that_is_asked_for_inside_is_there() -> None:
    layer, x = nn.Linear(48, 48), torch.ones(48, requires_grad=True)
    with torch.no_grad(), Products(linears(layer)).fast(), torch.enable_grad():
        layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(0))


def test_an_error_inside_puts_everything_back() -> None:
    layer = nn.Linear(48, 48)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), Products(linears(layer)).fast():
        raise ZeroDivisionError
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_kept_weights_give_the_same_bits(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing depends on how many passes are made."""
    monkeypatch.setattr(products, "fast_bfloat16", lambda _device: True)
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(96, 200, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(200, 96, generator=generator))
    layer.to(dtype)
    found, x = Products(linears(layer)), torch.randn(rows, 96, generator=generator).to(dtype)
    assert found.modules
    with torch.no_grad(), found.fast():
        expected = layer(x)
        with found.kept():
            for _ in range(2):
                assert torch.equal(layer(x), expected)
            assert bool(found._kept) == (rows > 1 or dtype == torch.bfloat16)
        assert not found._kept


def test_a_weight_that_is_changed_is_seen() -> None:
    """Mutation: what was kept is used whatever has become of the weight."""
    layer, x = nn.Linear(48, 80), torch.ones(3, 48)
    found = Products(linears(layer))
    with torch.no_grad(), found.kept(), found.fast():
        layer(x)
        layer.weight.mul_(2)
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
        layer.weight = nn.Parameter(torch.zeros(80, 48))
        assert torch.allclose(layer(x), layer.bias.expand(3, -1))
        (only,) = found._kept
        found._kept[only] = found._kept[only][0], torch.ops.mkldnn._reorder_linear_weight(torch.ones(80, 48), None)
        assert not torch.allclose(layer(x), layer.bias.expand(3, -1))


def test_large_models_are_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(48, 80)
    found = Products(linears(layer))
    monkeypatch.setattr(products, "MOST", layer.weight.nbytes - 1)
    with torch.no_grad(), found.kept(), found.fast():
        layer(torch.ones(3, 48))
        assert not found._kept


def test_what_is_kept_is_kept_until_nobody_asks_for_it() -> None:
    layer = nn.Linear(48, 80)
    found = Products(linears(layer))
    with torch.no_grad(), found.kept(), found.fast():
        with found.kept():
            layer(torch.ones(3, 48))
        assert found._kept
    assert not found._kept

"""Supervised codes in closed form: additive activations, balanced designs, least squares by another solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from circuit_prompts import few_names

from trimtab.errors import UserError
from trimtab.evaluation.supervised import codes
from trimtab.evaluation.supervised.codes import FITS, Codes, Factors, mean_codes, mse_codes
from trimtab.tasks.ioi_prompts import IOIPrompt

TEMPLATE = few_names().templates[0]


def balanced() -> list[IOIPrompt]:
    """Every IO with every S and both orders; no name plays both parts, so that factors are independent."""
    found = []
    for io, s in itertools.product(("Anna", "Paul", "Mary"), ("John", "Ruth")):
        found += [IOIPrompt(TEMPLATE, io, s, s, "", ""), IOIPrompt(TEMPLATE, s, io, s, "", "")]
    return found


def additive(prompts: list[IOIPrompt], factors: Factors, noise: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(factors.names), 8, generator=generator, dtype=torch.float64)
    return vectors[factors.rows(prompts)].sum(1) + noise * torch.randn(len(prompts), 8, generator=generator).double()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("parametrisation", ["independent", "coupled"])
def test_additive_activations_are_rebuilt_exactly(fit: str, parametrisation: codes.Parametrisation) -> None:
    prompts = balanced()
    factors = Factors.of(prompts, "independent")
    x = additive(prompts, factors)
    fitted = Factors.of(prompts, parametrisation)
    rows = fitted.rows(prompts)
    if fit == "mean" and parametrisation == "coupled":  # Pos is counted twice
        assert not torch.allclose(FITS[fit](x, fitted, rows).reconstruct(rows), x)
    else:
        torch.testing.assert_close(FITS[fit](x, fitted, rows).reconstruct(rows), x)


def test_mean_and_mse_codes_agree_on_a_balanced_design_and_there_alone() -> None:
    prompts = balanced()
    factors = Factors.of(prompts)
    for chosen, same in ((prompts, True), (prompts[:7], False)):
        rows, x = factors.rows(chosen), additive(chosen, factors, noise=1.0)
        mean, mse = mean_codes(x, factors, rows), mse_codes(x, factors, rows)
        torch.testing.assert_close(mean.mean, mse.mean)
        assert torch.allclose(mean.vectors[rows].sum(1), mse.vectors[rows].sum(1)) == same
        if same:
            torch.testing.assert_close(mean.vectors, mse.vectors)
        error, least = ((x - fit.reconstruct(rows)).square().sum() for fit in (mean, mse))
        assert least <= error + 1e-9


def test_least_squares_as_numpy_solves_it() -> None:
    ioi = few_names()
    prompts = ioi.prompts(60)
    factors = Factors.of(prompts)
    rows = factors.rows(prompts)
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ones = np.zeros((60, len(factors.names) + 1))
    ones[:, -1] = 1
    for prompt, own in enumerate(rows.tolist()):
        ones[prompt, own] = 1
    expected = ones @ np.linalg.lstsq(ones, x.numpy(), rcond=None)[0]
    np.testing.assert_allclose(mse_codes(x, factors, rows).reconstruct(rows).numpy(), expected, atol=1e-9)
    for fit in FITS.values():
        found = fit(x, factors, rows)
        for factor in range(3):
            assert found.vectors[rows[:, factor]].mean(0).abs().max() < 1e-9


def test_mean_codes_are_means() -> None:
    prompts = few_names().prompts(40)
    factors = Factors.of(prompts, "names")
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    found = mean_codes(x, factors, factors.rows(prompts))
    name = prompts[0].first
    expected = x[[i for i, prompt in enumerate(prompts) if prompt.first == name]].mean(0) - x.mean(0)
    torch.testing.assert_close(found.vectors[factors.names.index(f"first={name}")], expected)


def test_factors_and_their_values() -> None:
    prompts = balanced()
    assert Factors.of(prompts).names == ["IO=Anna", "IO=Mary", "IO=Paul", "S=John", "S=Ruth", "Pos=ABB", "Pos=BAB"]
    assert Factors.of(prompts, "coupled").names[:2] == ["IO,Pos=Anna,ABB", "IO,Pos=Anna,BAB"]
    assert Factors.of(prompts).rows(prompts[:2]).tolist() == [[0, 3, 5], [0, 3, 6]]
    with pytest.raises(UserError, match="value S=Anna: it has no code; fit the codes on prompts that have it"):
        Factors.of(prompts).rows([IOIPrompt(TEMPLATE, "Paul", "Anna", "Anna", "", "")])


def test_a_reconstruction_is_a_sum() -> None:
    codes = Codes(torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 2.0], [0.0, 4.0], [8.0, 0.0]]))
    assert codes.reconstruct(torch.tensor([[0, 2], [1, 2]])).tolist() == [[10.0, 2.0], [9.0, 4.0]]

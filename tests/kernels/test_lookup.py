"""Who is given a kernel, that nobody else imports Triton, and that kernels compile for cards without one at hand."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trimtab import kernels
from trimtab.kernels import KERNELS, kernel_for, row_kernel_for


def test_the_cpu_gets_no_kernels() -> None:
    assert not any(kernel_for(name, torch.zeros(2, 2)) for name in KERNELS)


def test_training_and_sampling_on_the_cpu_import_no_triton() -> None:
    """Mutation: a kernel's module is imported beside the lookup."""
    code = """
        import sys, torch
        from trimtab.dictionaries.architectures.topk import TopKConfig, TrainableTopK
        from trimtab.lm.sampling import nucleus_floor
        sae = TrainableTopK(TopKConfig(n_features=8, k=2), 4)
        for sae.execution in ("dense", "sparse"):
            sae.backward(torch.randn(3, 4))
            sae.project_gradients()
            sae.constrain()
        nucleus_floor(torch.full((2, 4), 0.25), 0.5)
        assert not [name for name in sys.modules if name.partition(".")[0] == "triton"]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_kernels_are_for_tensors_that_they_take(found: list[str], device: str) -> None:
    """Mutations: double precision, gradients, a device or a row that is too wide do not matter; a kernel that is taken
    out is given."""
    fits = torch.zeros(2, 4, device=device)
    for name in KERNELS:
        assert callable(row_kernel_for(name, fits, fits.bfloat16()))
    assert found == [*KERNELS]
    assert kernel_for("bag_dots", fits, fits.double()) is None
    assert kernel_for("bag_dots", fits, fits.long()) is None
    assert kernel_for("bag_dots", fits, fits.to("meta")) is None
    assert row_kernel_for("largest_in_rows", torch.empty(0, kernels.WIDEST, device=device)) is not None
    assert row_kernel_for("largest_in_rows", torch.empty(0, kernels.WIDEST + 1, device=device)) is None
    learnt = fits.clone().requires_grad_()
    assert kernel_for("bag_dots", fits, learnt) is None
    with torch.no_grad():
        assert kernel_for("bag_dots", fits, learnt) is not None


def test_a_kernel_that_is_taken_out_is_left_to_torch(
    found: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(KERNELS, "bag_dots")
    assert kernel_for("bag_dots", torch.zeros(2, device=device)) is None
    assert kernel_for("weighted_bags", torch.zeros(2, device=device)) is not None


@pytest.mark.slow
def test_kernels_compile_for_cards(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """What the interpreter runs, the compiler may refuse. It needs no card."""
    code = """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from trimtab.kernels import WIDEST, bags, largest, nucleus, unit_rows

        def compiled(kernel, given, num_warps=4, **constants):
            names = kernel.arg_names
            signature = {name: given.get(name, "constexpr" if name in constants else "i32") for name in names}
            source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})

        tables = {name: "*fp32" for name in ("h", "values", "G", "W", "X", "weight", "probs")}
        given = tables | {"places": "*i64", "index": "*i64", "start": "*i64", "tiny": "fp32", "wanted": "i64"}
        sizes = largest._sizes(WIDEST)
        compiled(largest._largest_in_rows, given, **sizes)
        compiled(largest._keep_largest_in_rows, given | {"h": "*bf16"}, **sizes)
        compiled(unit_rows._remove_along_rows, given, WIDTH=4096)
        compiled(unit_rows._divide_rows_by_norm, given, WIDTH=4096)
        compiled(nucleus._nucleus_floor, given | {"out": "*i32"}, 32, UNIT=2.0**62, COLUMNS=nucleus.COLUMNS_AT_ONCE)
        sizes = {"PAIRS": bags.PAIRS_AT_ONCE, "COLUMNS": bags.COLUMNS_AT_ONCE}
        compiled(bags._weighted_bags, given | {"out": "*fp32"}, **sizes)
        compiled(bags._bag_dots, given | {"out": "*fp32"}, **sizes)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

"""Operations: what each makes of an activation, on axes, on vectors at angles, by a dictionary; adding one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steering_checks import prompts_of
from tiny_dictionary import make_dictionary
from torch import Tensor

from trimtab.dictionaries import save_dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, Edit, EditRequest, LanguageModel, Site, decode
from trimtab.steering import (
    OPERATIONS,
    Choice,
    DirectionSource,
    DirectionTable,
    Slots,
    StaticSource,
    SteerConfig,
    VectorSource,
    operation,
    run_steer,
)

SITE = "resid_post.1"
PLACES = torch.arange(3)


def after(source: StaticSource, x: Tensor) -> Tensor:
    """What a source makes of activations `[3, d]`."""
    request = EditRequest(Site.parse(SITE), x, *[PLACES] * 7, PLACES[:, None])
    edit = source.choose(request)
    assert isinstance(edit, Edit)
    return edit.change(source.directions(request.site), PLACES, PLACES).of(x)


def activations(d: int = 12, seed: int = 0) -> Tensor:
    return 30 * torch.randn(3, d, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(
    x=st.lists(st.floats(-1e6, 1e6, width=32), min_size=36, max_size=36),
    doses=st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3),
)
def test_axes_are_overwritten_bit_for_bit_and_no_other(x: list[float], doses: list[float]) -> None:
    before, dims = torch.tensor(x).reshape(3, 12), [7, 2, 11]
    table = DirectionTable.axes(12, dims)
    found = after(StaticSource(table, [0, 1, 2], doses, SITE, operation="overwrite", unit="absolute"), before)
    expected = before.clone()
    expected[:, dims] = torch.tensor(doses)
    assert torch.equal(found, expected)


def test_axes_are_overwritten_in_every_unit() -> None:
    x, table = activations(), DirectionTable.axes(12, [5])
    table.max_activation = torch.tensor([7.0])
    relative = after(StaticSource(table, 0, 0.3, SITE, operation="overwrite", unit="relative"), x)
    assert torch.equal(relative[:, 5], 0.3 * x.norm(dim=-1))
    most = after(StaticSource(table, 0, 0.3, SITE, operation="overwrite", unit="max_activation"), x)
    assert torch.equal(most[:, 5], torch.tensor(0.3) * 7.0 * torch.ones(3))


@pytest.mark.parametrize("operation", ["overwrite", "clamp", "scale", "ablate"])
def test_vectors_at_angles_are_set_together(operation: str) -> None:
    """Each projection becomes what is asked for, although the vectors are at angles; nothing else moves."""
    vectors = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)) + 1
    unit, x, doses = vectors / vectors.norm(dim=-1, keepdim=True), activations(), torch.tensor([3.0, -2.0, 0.0, 5.0])
    found = after(VectorSource(vectors, SITE, doses.tolist(), operation=operation, unit="absolute"), x)
    was = x @ unit.T
    expected = {"scale": doses * was, "ablate": torch.zeros_like(was)}.get(operation, doses.expand(3, -1))
    torch.testing.assert_close(found @ unit.T, expected, atol=1e-3, rtol=1e-4)
    span = unit.double().T @ torch.linalg.pinv(unit.double().T)
    beside = torch.eye(12).double() - span
    torch.testing.assert_close(found.double() @ beside, x.double() @ beside, atol=1e-4, rtol=1e-4)
    if operation == "ablate":
        torch.testing.assert_close(found.double(), x.double() @ beside, atol=1e-4, rtol=1e-4)


def test_an_empty_slot_leaves_the_others_alone() -> None:
    table, x = DirectionTable(torch.randn(3, 12, generator=torch.Generator().manual_seed(2))), activations()
    features = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    found = after(StaticSource(table, features, 4.0, SITE, operation="overwrite", unit="absolute"), x)
    projections = found @ table.rows.T
    torch.testing.assert_close(projections[0, :2], torch.full((2,), 4.0), atol=1e-4, rtol=1e-4)
    assert float(projections[1, 2]) == pytest.approx(4.0, abs=1e-4)
    assert torch.equal(found[2], x[2])


def test_linearly_dependent_directions_are_refused_by_name() -> None:
    rows = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))
    table = DirectionTable(torch.cat([rows, rows[:1] + rows[1:2]]))
    with pytest.raises(UserError) as caught:
        after(StaticSource(table, [1, 3, 0], 1.0, SITE, operation="overwrite"), activations())
    assert caught.value.line == "features 1, 3, 0: their directions are linearly dependent; leave out one of them"
    after(StaticSource(table, [1, 3, 2], 1.0, SITE, operation="overwrite"), activations())


@pytest.mark.parametrize(("apart", "refused"), [(3e-3, True), (6e-3, False)])
def test_directions_that_are_nearly_dependent_are_refused(apart: float, refused: bool) -> None:
    """The Gram matrix of two unit vectors at an angle t has the eigenvalues 1 ± cos t: 4.5e-6 and 1.8e-5 here."""
    angle = torch.tensor(apart, dtype=torch.float64)
    first, second = torch.eye(12, dtype=torch.float64)[:2]
    table = DirectionTable(torch.stack([first, angle.cos() * first + angle.sin() * second]))
    source = StaticSource(table, [0, 1], 1.0, SITE, operation="overwrite", unit="absolute")
    if refused:
        with pytest.raises(UserError, match="features 0, 1: their directions are linearly dependent"):
            after(source, activations())
    else:
        found = after(source, activations()).double() @ table.rows.T
        torch.testing.assert_close(found, torch.ones_like(found), atol=2e-3, rtol=0)


@pytest.mark.parametrize("operation", ["clamp", "ablate", "scale", "overwrite"])
def test_a_source_of_one_s_own_may_name_a_feature_once(tiny_llama: LanguageModel, operation: str) -> None:
    """Twice the same would move its code twice."""

    class Twice(DirectionSource):
        def pick(self, request: EditRequest) -> Choice:
            feature = torch.full((len(request.row), 2), 3)
            return Choice(feature, torch.ones_like(feature, dtype=torch.float32))

    sae = make_dictionary(tiny_llama)
    with pytest.raises(UserError, match="feature 3: it is named twice for one row"):
        decode(tiny_llama, prompts_of((4,)), DecodeConfig(max_new_tokens=2), Twice(sae, operation=operation))
    assert len(decode(tiny_llama, prompts_of((4,)), DecodeConfig(max_new_tokens=2), Twice(sae)).edits)


def test_overwriting_by_a_dictionary_sets_the_projection(tiny_llama: LanguageModel) -> None:
    sae, x = make_dictionary(tiny_llama), activations(32)
    found = after(StaticSource(sae, [3, 4], [2.0, -6.0], operation="overwrite", unit="absolute"), x)
    torch.testing.assert_close(
        found @ sae.directions[[3, 4]].T, torch.tensor([2.0, -6.0]).expand(3, -1), atol=1e-3, rtol=1e-4
    )


def test_vectors_may_keep_their_length() -> None:
    vectors, x = torch.randn(2, 12, generator=torch.Generator().manual_seed(4)), activations()
    whole = after(VectorSource(vectors, SITE, keep_length=True), x)
    torch.testing.assert_close(whole, x + vectors.sum(0), atol=1e-5, rtol=1e-6)
    halves = after(VectorSource(vectors, SITE, [0.5, -2.0], keep_length=True), x)
    torch.testing.assert_close(halves, x + 0.5 * vectors[0] - 2 * vectors[1], atol=1e-5, rtol=1e-6)


def test_vectors_have_the_shape_of_their_site(any_tiny: LanguageModel) -> None:
    for name in ("attn_z.1", "attn_z.1.2", "attn_k.1", "mlp_out.2"):
        site, config = Site.parse(name), DecodeConfig(max_new_tokens=3, stop_at_eos=False)
        attention = any_tiny.layout.layers[1].attention
        assert attention is not None
        heads = attention.n_kv_heads if site.kind == "attn_k" else attention.n_heads
        own = {"attn_z.1.2": (attention.head_dim,), "mlp_out.2": (32,)}.get(name, (heads, attention.head_dim))
        vectors = torch.randn(2, *own)
        for some in (vectors, vectors[0]):
            log = decode(any_tiny, prompts_of((4, 6)), config, VectorSource(some, name, keep_length=True)).edits
            expected = (vectors.sum(0) if some is vectors else vectors[0]).norm()
            torch.testing.assert_close(log.delta_norm, expected.expand(6), rtol=1e-5, atol=1e-5)


def test_bad_vectors_and_axes_are_refused() -> None:
    cases = {
        "a steering vector: it is zero": lambda: VectorSource(torch.eye(4)[:2] * torch.tensor([[1.0], [0.0]]), SITE),
        "some values are not finite": lambda: VectorSource(torch.tensor([1.0, torch.inf]), SITE),
        "the site: the directions do not name the one they are for": lambda: VectorSource(torch.ones(4)),
        "unit relative: the vectors are to keep their own length": lambda: VectorSource(
            torch.ones(4), SITE, keep_length=True, unit="relative"
        ),
        "rows of one width are needed": lambda: VectorSource(torch.ones(2, 2, 2), SITE),
        "dimension 9: the site has dimensions 0 to 8": lambda: DirectionTable.axes(9, [3, 9]),
        "dimensions 3, 3: one is named twice": lambda: DirectionTable.axes(9, [3, 3]),
    }
    for message, make in cases.items():
        with pytest.raises(UserError) as caught:
            make()
        assert message in caught.value.line


def test_operations_have_one_name_each() -> None:
    with pytest.raises(UserError, match="operation 'add': there is already one of this name; choose another name"):

        @operation()
        def add(at: Slots) -> Tensor:
            return at.length

    assert operation()(OPERATIONS["clamp"].coefficients) is OPERATIONS["clamp"].coefficients


def test_an_operation_of_one_s_own_is_traced_and_replayed(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    @operation(has_dose=False)
    def reflect(at: Slots) -> Tensor:
        """Turn the component along each feature's direction around."""
        return at.projecting(-2 * at.projection)

    try:
        tiny_llama.hf.save_pretrained(tmp_path / "model")
        tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
        sae = make_dictionary(tiny_llama)
        sae.info = type(sae.info)(architecture="standard", site=SITE)
        save_dictionary(sae, tmp_path / "sae")
        config = SteerConfig(
            model=str(tmp_path / "model"), sae=str(tmp_path / "sae"), prompt=("the sea", "an inn"), feature=(3, 4),
            operation="reflect", max_new_tokens=5, run=tmp_path / "run",
        )  # fmt: skip
        result = run_steer(config)
        assert [arm.name for arm in result.arms] == ["unsteered", "reflected"]  # type: ignore[union-attr]
        assert run_steer(SteerConfig(replay=tmp_path / "run")).exact  # type: ignore[union-attr]
        x = activations(32)
        found = after(StaticSource(sae, [3, 4], operation="reflect"), x)
        torch.testing.assert_close(
            found @ sae.directions[[3, 4]].T, -x @ sae.directions[[3, 4]].T, atol=1e-3, rtol=1e-4
        )
    finally:
        del OPERATIONS["reflect"]
    with pytest.raises(UserError, match="operation 'reflect': allowed are add, ablate, clamp, scale, overwrite"):
        DirectionSource(make_dictionary(tiny_llama), operation="reflect")

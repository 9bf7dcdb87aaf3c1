"""The rules of steering for every kind of edit: operations, vectors, several sites, heads, replaced activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_kinds import KINDS, LATER, SITE
from steering_checks import (
    LENGTHS,
    check_batch_independence,
    check_cached_equals_cache_free,
    check_default_positions,
    check_empty_edit,
    check_fork,
    check_log,
    check_nothing_after_stop,
    check_replay,
    prompts_of,
)
from test_effects import check_effects
from tiny_dictionary import make_dictionary
from torch import Tensor

from trimtab.dictionaries import Standard
from trimtab.lm import DecodeConfig, EditRequest, LanguageModel, Site, decode
from trimtab.runs import Run
from trimtab.steering import DirectionTable, StaticSource, Trace, TracedSource, replay_trace
from trimtab.steering.replacing import ReplacingSource

ALL = pytest.mark.parametrize("kind", KINDS)
MODELS = ("tiny_llama", "tiny_gemma3", "tiny_gpt2")
IN_TURN = pytest.mark.parametrize(("kind", "layout"), [(kind, MODELS[i % 3]) for i, kind in enumerate(KINDS)])


@pytest.fixture
def model(request: pytest.FixtureRequest, layout: str) -> LanguageModel:
    return request.getfixturevalue(layout)


@ALL
def test_cached_decoding_equals_a_cache_free_forward(any_tiny: LanguageModel, sae: Standard, kind: str) -> None:
    check_cached_equals_cache_free(any_tiny, KINDS[kind](any_tiny, sae), prompts_of(LENGTHS))


@ALL
def test_replay_gives_the_same_bits(any_tiny: LanguageModel, sae: Standard, kind: str) -> None:
    check_replay(any_tiny, KINDS[kind](any_tiny, sae), prompts_of(LENGTHS))


@ALL
def test_copies_replay_too(tiny_llama: LanguageModel, kind: str) -> None:
    check_replay(tiny_llama, KINDS[kind](tiny_llama, make_dictionary(tiny_llama)), prompts_of((4, 9)), repeats=3)


@IN_TURN
def test_each_place_is_edited_once_and_logged(model: LanguageModel, kind: str) -> None:
    source = KINDS[kind](model, make_dictionary(model))
    check_log(model, source, prompts_of((3, 14)))
    if len(source.sites) == 1:
        check_default_positions(model, source, prompts_of(LENGTHS))
        check_nothing_after_stop(model, source, prompts_of(LENGTHS[:4]))


@IN_TURN
def test_rows_do_not_depend_on_their_batch(model: LanguageModel, kind: str) -> None:
    sae = make_dictionary(model)
    assert check_batch_independence(model, lambda: KINDS[kind](model, sae), prompts_of(LENGTHS[:4])) <= 1


@IN_TURN
def test_forks_equal_each_branch_alone(model: LanguageModel, kind: str) -> None:
    sae = make_dictionary(model)
    check_fork(model, sae, prompts_of((5, 18)), past_source=KINDS[kind](model, sae))


@IN_TURN
def test_effects_equal_one_pass_per_position(model: LanguageModel, kind: str) -> None:
    check_effects(model, KINDS[kind](model, make_dictionary(model)), (13, 4), n_tokens=4)


@IN_TURN
def test_traces_from_disk_replay(model: LanguageModel, kind: str, tmp_path: Path) -> None:
    sae, config = make_dictionary(model), DecodeConfig(max_new_tokens=5, temperature=0.9, seed=4)
    source = KINDS[kind](model, sae)
    decoded = decode(model, prompts_of(LENGTHS), config, source)
    with Run.open(tmp_path / "run", "steer", {}) as run:
        Trace.of(model, decoded, config, source).write(run)
    trace = Trace.read(tmp_path / "run")
    assert {row["site"] for row in trace.edits.to_pylist()} == set(map(str, source.sites))
    log = trace.edit_log(source)
    for name, column in decoded.edits.columns.items():
        assert torch.equal(column.double().nan_to_num(-7), log.columns[name].double().nan_to_num(-7)), name
    assert replay_trace(model, trace, source).exact
    tables = [table for each in getattr(source, "sources", [source]) for table in getattr(each, "tables", {}).values()]
    assert replay_trace(model, trace, TracedSource(trace, tables)).exact


class ReplacesNothing(ReplacingSource):
    def replacement(self, request: EditRequest) -> Tensor:
        return torch.full_like(request.x, torch.nan)


def test_empty_edits_change_no_bit(any_tiny: LanguageModel, sae: Standard) -> None:
    prompts = prompts_of(LENGTHS)
    tables = {SITE: sae, LATER: DirectionTable.axes(32, [3, 4])}
    check_empty_edit(any_tiny, StaticSource(tables, -1, 0.5, operation="overwrite", positions="all"), prompts)
    check_empty_edit(any_tiny, StaticSource(tables, [0, 1], 1.0, operation="scale", positions="all"), prompts)
    check_empty_edit(any_tiny, ReplacesNothing({Site.parse(SITE): 32}, "all", False), prompts)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    operation=st.sampled_from(["add", "clamp", "scale", "overwrite", "ablate"]),
    features=st.lists(st.integers(0, 47), min_size=1, max_size=3, unique=True),
    dose=st.floats(-2, 2).filter(lambda dose: abs(dose) > 0.3),
    positions=st.sampled_from(["generated", "prompt", "all", "1:4", "0,-1"]),
    raw=st.booleans(),
    sites=st.sampled_from([(SITE,), (LATER, SITE)]),
)
def test_any_edit_equals_a_cache_free_forward_and_replays(
    tiny_gemma3: LanguageModel,
    lengths: list[int],
    operation: str,
    features: list[int],
    dose: float,
    positions: str,
    raw: bool,
    sites: tuple[str, ...],
) -> None:
    sae = make_dictionary(tiny_gemma3)
    directions = DirectionTable(sae.directions) if raw else sae
    source = StaticSource(
        dict.fromkeys(sites, directions), features, dose, operation=operation, unit="relative", positions=positions
    )
    prompts, config = prompts_of(lengths), DecodeConfig(max_new_tokens=4, stop_at_eos=False)
    check_cached_equals_cache_free(tiny_gemma3, source, prompts, config, strong=False)
    check_replay(tiny_gemma3, source, prompts, config)

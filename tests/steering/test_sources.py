"""Sources beyond the shared contract: what each chooses, equal doses between them, and bad arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from steering_checks import check_cached_equals_cache_free, prompts_of, random_directions
from tiny_dictionary import make_dictionary

from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import (
    DecodeConfig,
    DecodeStart,
    DecodeStream,
    EditLog,
    EditRequest,
    InterventionSource,
    LanguageModel,
    Row,
    TokenBatch,
    capture,
    decode,
)
from trimtab.steering import (
    CombinedSource,
    DirectionTable,
    ForkSource,
    RandomFeatureSource,
    ReplaySource,
    StaticSource,
    TopActiveSource,
    UnequalDoseError,
    VectorSource,
    assert_equal_dose,
    dose_summary,
)
from trimtab.steering.controls import draw_without_replacement

CONFIG = DecodeConfig(max_new_tokens=6, stop_at_eos=False)
SITE, LATER = "resid_post.1", "resid_post.2"


@pytest.fixture
def tiny(tiny_llama: LanguageModel) -> tuple[LanguageModel, Standard]:
    return tiny_llama, make_dictionary(tiny_llama)


def run(model: LanguageModel, source: InterventionSource | None, n: int = 4) -> EditLog:
    return decode(model, prompts_of((3, 17, 11, 24)[:n]), CONFIG, source).edits


def activations(
    model: LanguageModel, source: InterventionSource, prompts: list[list[int]]
) -> dict[tuple[int, int], torch.Tensor]:
    """x before the edit, by row and position."""
    seen: dict[tuple[int, int], torch.Tensor] = {}
    original = source.choose

    def spy(request):  # type: ignore[no-untyped-def]
        for row, position, x in zip(request.row.tolist(), request.position.tolist(), request.x, strict=True):
            seen[row, position] = x.clone()
        return original(request)

    source.choose = spy  # type: ignore[method-assign]
    source.log = decode(model, prompts, CONFIG, source).edits  # type: ignore[attr-defined]
    return seen


def test_scaling_and_clamping_set_the_code(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    prompts = prompts_of((9, 14))
    for operation, dose, unit in (("scale", 2.5, "relative"), ("clamp", 0.7, "max_activation"), ("ablate", 1.0, "x")):
        source = StaticSource(sae, [3, 7], dose, operation=operation, unit=unit)
        seen = activations(model, source, prompts)
        log: EditLog = source.log  # type: ignore[attr-defined]
        assert sae.feature_stats is not None
        for i in range(len(log)):
            f = sae.encode(seen[int(log.row[i]), int(log.position[i])])
            for slot, feature in enumerate((3, 7)):
                code, norm = float(f[feature]), float(sae.W_dec[feature].norm())
                target = {
                    "scale": dose * code,
                    "clamp": dose * float(sae.feature_stats.max_activation[feature]) / norm,
                    "ablate": 0.0,
                }[operation]
                assert float(log.coefficient[i, slot]) == pytest.approx((target - code) * norm, abs=1e-3, rel=1e-4)


def test_total_dose_does_not_depend_on_the_angles(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    features = [1, 4, 9]
    total = run(model, StaticSource(sae, features, 0.3, combine="total"))
    torch.testing.assert_close(total.relative_dose, torch.full((len(total),), 0.3))
    each = run(model, StaticSource(sae, features, 0.3))
    rows = sae.directions[features]
    torch.testing.assert_close(each.relative_dose, torch.full((len(each),), 0.3 * float(rows.sum(0).norm())))
    assert (each.relative_dose - 0.3).abs().min() > 0.02
    along = torch.eye(32)[:1]
    opposed = StaticSource(DirectionTable(torch.cat([along, -along])), [0, 1], 0.3, SITE, combine="total")
    assert run(model, opposed).delta_norm.abs().max() == 0


def test_controls_have_equal_doses(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    sources: dict[str, InterventionSource] = {
        "chosen": StaticSource(sae, 3, 0.4),
        "random feature": RandomFeatureSource(sae, 0.4, exclude=[3]),
        "random per row": RandomFeatureSource(sae, 0.4, per="row"),
        "three random": RandomFeatureSource(sae, 0.4, k=3, combine="total"),
        "random direction": random_directions(SITE, 0.4),
        "vector": VectorSource(torch.randn(32), SITE, 0.4),
    }
    logs = {name: run(model, source) for name, source in sources.items()}
    summaries = assert_equal_dose(logs)
    assert summaries["chosen"].n_edits == 24
    assert summaries["chosen"].relative == pytest.approx(0.4, abs=1e-4)
    logs["stronger"] = run(model, StaticSource(sae, 3, 0.41))
    with pytest.raises(UnequalDoseError, match=r"relative is 0.4 for chosen and 0.41 for stronger"):
        assert_equal_dose(logs)
    with pytest.raises(UnequalDoseError, match="n_edits is 24 for chosen and 18 for fewer"):
        assert_equal_dose({"chosen": logs["chosen"], "fewer": run(model, StaticSource(sae, 3, 0.4), n=3)})


def test_empty_edits_do_not_count() -> None:
    assert dose_summary(EditLog.empty()).n_edits == 0


def test_random_features_are_live_and_different(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    assert sae.feature_stats is not None
    live = set(sae.feature_stats.live.nonzero()[0].tolist())
    assert 4 < len(live) < sae.n_features
    log = run(model, RandomFeatureSource(sae, 0.3, k=4, exclude=[min(live)]))
    drawn = log.feature.tolist()
    assert all(len(set(row)) == 4 for row in drawn)
    assert set(log.feature.unique().tolist()) <= live - {min(live)}
    assert len(set(map(tuple, drawn))) > 20
    per_row = run(model, RandomFeatureSource(sae, 0.3, per="row"))
    assert all(len(set(per_row.feature[per_row.row == r, 0].tolist())) == 1 for r in range(4))
    again = run(model, RandomFeatureSource(sae, 0.3, per="row", seed=9))
    assert not torch.equal(per_row.feature, again.feature)


def test_draws_without_replacement_are_uniform() -> None:
    """Every ordered pair of four is equally likely: an even grid of draws hits each exactly as often."""
    steps = torch.arange(12, dtype=torch.float64) / 12
    u = torch.cartesian_prod(steps + 1e-9, steps + 1e-9)
    pairs = draw_without_replacement(u, 4)
    found, counts = pairs.unique(dim=0, return_counts=True)
    assert len(found) == 12
    assert set(counts.tolist()) == {12}
    almost_one = torch.full((1, 4), 1 - 2**-53, dtype=torch.float64)
    assert sorted(draw_without_replacement(almost_one, 4)[0].tolist()) == [0, 1, 2, 3]


def test_the_most_active_feature_of_the_token(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    source = TopActiveSource(sae, 0.3, k=2)
    seen = activations(model, source, prompts_of((9, 14)))
    log: EditLog = source.log  # type: ignore[attr-defined]
    for i in range(len(log)):
        strength = sae.encode(seen[int(log.row[i]), int(log.position[i])]) * sae.W_dec.norm(dim=1)
        order = strength.argsort(descending=True)[:2]
        assert log.feature[i].tolist() == [int(j) if strength[j] > 0 else -1 for j in order]


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_most_active_feature_of_the_context(any_tiny: LanguageModel, sae: Standard, repeats: int) -> None:
    """The largest activity up to and with the token, also in copies that share a prefill; forced tokens count."""
    prompts = prompts_of((9, 14))
    source = TopActiveSource(sae, 0.5, over="context")
    decoded = decode(any_tiny, prompts, CONFIG, source, forced=[[20, 21], [22, 23]], repeats=repeats)
    log = decoded.edits.take((decoded.edits.feature >= 0).any(dim=1))
    for row in range(len(decoded)):
        ids = decoded.prompts[row] + decoded.forced[row] + decoded.token_ids[row]
        first = len(decoded.prompts[row]) - 1
        mine = log.take(log.row == row)
        assert mine.position.tolist() == list(range(first, len(ids) - 1))
        x = capture(any_tiny, TokenBatch.full(torch.tensor([ids[: first + 1]])), [SITE])[any_tiny.site(SITE)][0]
        strength = (sae.encode(x) * sae.W_dec.norm(dim=1)).amax(0)
        assert int(mine.feature[0, 0]) == int(strength.argmax())


def test_vectors_steer_along_themselves(tiny: tuple[LanguageModel, Standard]) -> None:
    model, _ = tiny
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    source = VectorSource(vectors, SITE, [2.0, -1.0], unit="absolute")
    check_cached_equals_cache_free(model, source, prompts_of((3, 12)))
    log = run(model, source)
    expected = float((2 * vectors[0] / vectors[0].norm() - vectors[1] / vectors[1].norm()).norm())
    torch.testing.assert_close(log.delta_norm, torch.full((len(log),), expected))
    maxima = VectorSource(vectors[0], SITE, 0.5, unit="max_activation", max_activation=torch.tensor([8.0]))
    torch.testing.assert_close(run(model, maxima).delta_norm, torch.full((24,), 4.0))


def test_combined_sources_add_up(any_tiny: LanguageModel, sae: Standard) -> None:
    later = make_dictionary(any_tiny, "resid_post.2")
    source = CombinedSource([StaticSource(sae, 3, 0.4), StaticSource(later, 5, 0.3), random_directions(SITE, 0.2)])
    decoded = check_cached_equals_cache_free(any_tiny, source, prompts_of((3, 17)))
    first = decoded.edits.take(decoded.edits.site == 0)
    assert first.feature[:, 0].eq(3).all()
    assert first.feature[:, 1].ge(sae.n_features).all()  # behind the first source's directions
    assert [block.start for block in source.blocks(source.sites[0])] == [0, sae.n_features]
    assert len(decoded.edits) == 2 * len(first)


def test_forks_take_up_another_source(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    past, future = StaticSource(sae, 3, 0.4), random_directions(SITE, 0.2)
    source = ForkSource(past, future, [5, 20])
    log = decode(model, prompts_of((4, 17)), CONFIG, source).edits
    for row, at in ((0, 5), (1, 20)):
        mine = log.take(log.row == row)
        assert mine.feature[mine.position < at, 0].eq(3).all()
        assert mine.feature[mine.position >= at, 0].ge(sae.n_features).all()
        torch.testing.assert_close(mine.relative_dose, torch.where(mine.position < at, 0.4, 0.2))


def test_a_replay_without_edits_edits_nothing(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    assert len(run(model, ReplaySource(EditLog.empty(), StaticSource(sae, 3)))) == 0


BAD: list[tuple[Callable[[Standard], object], str]] = [
    (lambda sae: StaticSource(sae, 3, math.nan), "dose nan: a dose is a finite number"),
    (lambda sae: StaticSource(sae, 48, 0.1), "feature 48: the dictionary has features 0 to 47"),
    (lambda sae: StaticSource(sae, -2, 0.1), "feature -2"),
    (lambda sae: StaticSource(sae, 2.7, 0.1), "feature 2.7"),  # type: ignore[arg-type]
    (lambda sae: StaticSource(sae, [5, 3, 5], operation="ablate"), "feature 5: it is named twice for one row"),
    (lambda sae: StaticSource(sae, [4, 4], operation="scale"), "feature 4: it is named twice for one row"),
    (
        lambda sae: StaticSource(sae, torch.tensor([[1, 2], [7, 7]]), operation="clamp"),
        "feature 7: it is named twice for one row",
    ),
    (
        lambda sae: StaticSource(
            DirectionTable(torch.eye(3) * torch.tensor([1, 0, 1])), [0, 1], 1.0, SITE, operation="overwrite"
        ),
        "feature 1: its direction is zero, so it cannot be set",
    ),
    (lambda sae: RandomFeatureSource(sae, 0.1, candidates=[-1, 2]), "feature -1: the dictionary has features 0"),
    (lambda sae: RandomFeatureSource(sae, 0.1, candidates=[1.0, 2.0]), "feature 1.0"),  # type: ignore[list-item]
    (
        lambda sae: RandomFeatureSource(sae, 0.1, candidates=[1, 2, 1], k=2, operation="ablate"),
        "feature 1: it is named twice",
    ),
    (lambda sae: RandomFeatureSource(sae, 0.1, exclude=[1.5]), "feature 1.5: features are whole numbers"),  # type: ignore[list-item]
    (lambda sae: RandomFeatureSource(sae, 0.1, exclude=[48]), "feature 48: the dictionary has features 0 to 47"),
    (lambda sae: StaticSource(sae, [1, 2], [0.1, 0.2, 0.3]), "3 doses: there are 2 features"),
    (lambda sae: StaticSource(sae, 3, unit="percent"), "unit 'percent': allowed are"),
    (lambda sae: StaticSource(sae, 3, operation="multiply"), "operation 'multiply': allowed are add, ablate"),
    (lambda sae: StaticSource(sae, 3, combine="sum"), "combine 'sum': allowed are each, total"),
    (lambda sae: StaticSource(sae, 3, operation="clamp", combine="total"), "only doses that are added"),
    (lambda sae: StaticSource(sae, 3, positions="last"), "positions 'last': allowed are generated"),
    (lambda sae: StaticSource(sae, 3, positions="5:2"), "positions '5:2'"),
    (lambda sae: StaticSource(sae, 3, site="resid_past.3"), "site 'resid_past.3'"),
    (lambda sae: StaticSource(DirectionTable(torch.ones(1, 4)), 0), "the site: the directions do not name"),
    (lambda sae: StaticSource({}, 0), "the sites: there are none"),
    (lambda sae: StaticSource({SITE: sae}, 0, 0.4, SITE), "site resid_post.1: the directions name their own"),
    (
        lambda sae: StaticSource({SITE: sae}, {LATER: 0}),
        "features for resid_post.2: the directions are for",
    ),
    (lambda sae: StaticSource({SITE: sae}, {SITE: 0, LATER: 0}), "features for resid_post.1, resid_post.2"),
    (
        lambda sae: StaticSource({SITE: sae}, 0, {LATER: 0.4}),
        "doses for resid_post.2: the directions are for",
    ),
    (lambda sae: VectorSource(torch.zeros(4), SITE), "it is zero, so it has no direction"),
    (lambda sae: VectorSource(torch.tensor([1.0, math.nan]), SITE), "directions: some values are not finite"),
    (lambda sae: VectorSource(torch.ones(4), SITE, unit="max_activation"), "without feature statistics"),
    (lambda sae: RandomFeatureSource(sae, 0.1, k=0), "k = 0"),
    (lambda sae: RandomFeatureSource(sae, 0.1, candidates=[1, 2], k=3), "k = 3: 2 features can be drawn"),
    (lambda sae: RandomFeatureSource(sae, 0.1, per="prompt"), "per 'prompt'"),  # type: ignore[arg-type]
    (lambda sae: RandomFeatureSource(sae, math.inf), "dose inf"),
    (lambda sae: TopActiveSource(sae, 0.1, k=99), "k = 99"),
    (lambda sae: TopActiveSource(sae, 0.1, over="prompt"), "over 'prompt'"),  # type: ignore[arg-type]
    (lambda sae: CombinedSource([StaticSource(sae, 1), StaticSource(sae, 2, positions="all")]), "the same positions"),
    (lambda sae: ForkSource(StaticSource(sae, 1), StaticSource(sae, 2, site="resid_post.0"), 3), "different sites"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_arguments_say_what_is_wrong(
    make: Callable[[Standard], object], message: str, tiny_llama: LanguageModel
) -> None:
    sae = make_dictionary(tiny_llama)
    with pytest.raises(UserError) as caught:
        make(sae)
    assert message in caught.value.line


def test_statistics_are_needed_for_their_unit(tiny: tuple[LanguageModel, Standard]) -> None:
    _, sae = tiny
    sae.feature_stats = None
    with pytest.raises(UserError, match="without feature statistics"):
        StaticSource(sae, 3, 1.0, unit="max_activation")


def test_adding_takes_a_feature_twice_and_a_dead_one(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    twice = run(model, StaticSource(sae, torch.tensor([[3, 3]] * 4), 0.2))
    torch.testing.assert_close(twice.relative_dose, torch.full((24,), 0.4))
    rows = torch.cat([torch.zeros(1, 32), torch.eye(32)[:1]])
    assert run(model, StaticSource(DirectionTable(rows), 0, 0.2, SITE)).delta_norm.abs().max() == 0
    run(model, StaticSource(sae, torch.tensor([[3, -1, -1], [-1, -1, 4]] * 2), operation="ablate"))


def test_listed_positions_must_be_there(tiny: tuple[LanguageModel, Standard]) -> None:
    """The last input is the last token but one; forced tokens are inputs; a row that ends early is no mistake."""
    model, sae = tiny
    (prompt,) = prompts_of((5,))
    config = DecodeConfig(max_new_tokens=4, stop_at_eos=False)

    def positions(*places: int, forced: list[int] | None = None) -> list[int]:
        source = StaticSource(sae, 3, 0.4, positions=places)
        log = decode(model, [prompt], config, source, forced=[forced or []]).edits
        return log.position.tolist()

    assert positions(-5, 7) == [0, 7]
    assert positions(8, forced=[20]) == [8]
    for place in (8, -6, 50):
        with pytest.raises(UserError, match=f"position {place} of row 0: the row has positions 0 to 7, and 5 prompt"):
            positions(place)
    with pytest.raises(UserError, match="position 8 of row 0"):
        decode(model, [prompt], config, TopActiveSource(sae, 0.4, over="context", positions=[8]))
    assert decode(model, [prompt], config, StaticSource(sae, 3, 0.4, positions="2:8")).edits.position.tolist() == [
        *range(2, 8)
    ]
    with pytest.raises(UserError, match="position 8 of row 0: the row has positions 0 to 7"):
        decode(model, [prompt], config, StaticSource(sae, 3, 0.4, positions="2:9"))
    stream = DecodeStream(model, StaticSource(sae, 3, 0.4, positions=[7]))
    stream.add(Row(prompt, config))
    next(iter(stream))
    with pytest.raises(UserError, match="position 7 of row 0: the row has positions 0 to 6, and 4 prompt"):
        stream.add(Row(prompt[:4], config))
    source = StaticSource(sae, 3, 0.4, positions=[7])
    chosen = decode(model, [prompt], config).token_ids[0]
    assert len(decode(model, [prompt], config, source, teacher=[chosen[:1]]).edits) == 0


def draws_at_two_sites(n: int) -> list[list[int]]:
    source = RandomFeatureSource(dict.fromkeys((SITE, LATER), DirectionTable(torch.eye(4))), 0.4)
    source.start(DecodeStart([[1]], torch.tensor([0]), n, torch.device("cpu")))
    same, position = torch.zeros(n).long(), torch.arange(n)
    columns = (same, position, *[same] * 5, same[:, None])
    return [source.pick(EditRequest(site, torch.zeros(n, 4), *columns)).feature[:, 0].tolist() for site in source.sites]


def test_random_features_at_two_sites_are_independent() -> None:
    """χ² of all 16 pairs against even counts stays below its 0.999 quantile at 15 degrees of freedom."""
    n = 4000
    counts = torch.zeros(4, 4)
    for pair in zip(*draws_at_two_sites(n), strict=True):
        counts[pair] += 1
    assert float(((counts - n / 16) ** 2 / (n / 16)).sum()) < 37.7


def test_the_context_at_two_sites_is_that_of_two_sources(any_tiny: LanguageModel, sae: Standard) -> None:
    later, prompts = make_dictionary(any_tiny, LATER), prompts_of((9, 14))
    both = TopActiveSource({SITE: sae, LATER: later}, 0.5, over="context", k=2)
    alone = CombinedSource([TopActiveSource(each, 0.5, over="context", k=2) for each in (sae, later)])
    ours, theirs = (decode(any_tiny, prompts, CONFIG, source) for source in (both, alone))
    assert ours.token_ids == theirs.token_ids
    assert set(ours.edits.site.tolist()) == {0, 1}
    for name in ("site", "row", "position", "coefficient"):
        assert torch.equal(ours.edits.columns[name], theirs.edits.columns[name]), name
    assert torch.equal(ours.edits.feature, theirs.edits.feature)


def test_what_only_shows_while_decoding(tiny: tuple[LanguageModel, Standard]) -> None:
    model, sae = tiny
    with pytest.raises(UserError, match=r"features for 3 rows: 4 rows are decoded"):
        run(model, StaticSource(sae, torch.tensor([[1], [2], [3]]), 0.1))
    heads = torch.ones(2, 8, 4)
    with pytest.raises(UserError, match=r"values of attn_z.1 for 8 heads of 4: tiny-llama has 4 heads of 8 there"):
        run(model, VectorSource(heads, "attn_z.1"))
    with pytest.raises(UserError, match=r"directions of width 4: site resid_post.1 has width 32"):
        run(model, VectorSource(torch.ones(4), SITE))
    with pytest.raises(UserError, match=r"site resid_post.9: tiny-llama has layers 0 to 3"):
        run(model, StaticSource(sae, 3, 0.1, "resid_post.9"))

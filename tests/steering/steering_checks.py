"""The steering contract as plain functions, used by the tests and by the mutations that must make them fail.

Each raises AssertionError (or RuntimeError out of `decode`) where the contract is broken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trimtab.dictionaries.base import Dictionary
from trimtab.lm import DecodeConfig, Decoded, EditLog, EditRequest, InterventionSource, LanguageModel, Site
from trimtab.lm import decode as run_decode
from trimtab.lm.sampling import uniform
from trimtab.lm.taps import tap
from trimtab.steering import (
    Choice,
    DirectionSource,
    DirectionTable,
    ForkSource,
    RandomFeatureSource,
    ReplaySource,
    StaticSource,
)

# `trimtab.lm.decode` is the function once the package is imported, so the module is found by name.
decode_module = __import__("sys").modules["trimtab.lm.decode"]

Logits = dict[tuple[int, int], Tensor]
"""By row and position of the input token: the logits that chose the next one."""
LENGTHS = (3, 17, 11, 24, 2)
"""Prompt lengths: mixed, so that batches are padded, and beyond tiny Gemma's window of 8."""
LOGIT_TOLERANCE = 2e-4


class ScheduledSource(DirectionSource):
    """Features and doses that a function chooses at every token."""

    def __init__(
        self, directions: Dictionary, schedule: Callable[[EditRequest], Choice | None], **options: str
    ) -> None:
        super().__init__(directions, **options)  # type: ignore[arg-type]
        self.pick = schedule  # type: ignore[method-assign]


def random_directions(site: str, dose: float, width: int = 32, n: int = 1024, **options: str) -> RandomFeatureSource:
    """Random directions, uniform on the sphere."""
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
    return RandomFeatureSource(DirectionTable(rows), dose, site, seed=0, **options)  # type: ignore[arg-type]


def prompts_of(lengths: Sequence[int], seed: int = 0, pad_id: int | None = None) -> list[list[int]]:
    """Random prompts; with `pad_id` one token in three is the pad token, as where a pad token also ends turns."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(6, 100, (n,), generator=generator).tolist() for n in lengths]
    if pad_id is not None:
        rows = [[pad_id if i % 3 == 1 else token for i, token in enumerate(row)] for row in rows]
    return rows


@contextmanager
def recorded_logits() -> Iterator[Logits]:
    """Collects the logits that every token of a decode call is chosen from."""
    seen: Logits = {}
    original = decode_module._choose

    def spy(model, rows, active, length, logits, config):  # type: ignore[no-untyped-def]
        for index, (row, n) in enumerate(zip(active.tolist(), length.tolist(), strict=True)):
            seen[row, n - 1] = logits[index].clone()
        return original(model, rows, active, length, logits, config)

    decode_module._choose = spy
    try:
        yield seen
    finally:
        decode_module._choose = original


def deltas_of(decoded: Decoded, source: InterventionSource, row: int) -> list[tuple[Site, int, Tensor]]:
    """What the log says was added for one row, computed without the code under test."""
    log = decoded.edits
    found = []
    for i in range(len(log)):
        if int(log.row[i]) != row:
            continue
        site = source.sites[int(log.site[i])]
        delta = torch.zeros(source.directions(site).shape[1], dtype=torch.float64)
        for feature, coefficient in zip(log.feature[i].tolist(), log.coefficient[i].tolist(), strict=True):
            if feature >= 0:
                delta += coefficient * source.directions(site)[feature].double()
        found.append((site, int(log.position[i]), delta))
    return found


def oracle_logits(model: LanguageModel, ids: Sequence[int], edits: Sequence[tuple[Site, int, Tensor]]) -> Tensor:
    """Logits [T, V] of one sequence: no cache, no padding, no batch; edits at `resid_post` by hooks of our own."""

    def hook_for(layer: int) -> Callable:
        def hook(_module, _args, output):  # type: ignore[no-untyped-def]
            x = (output[0] if isinstance(output, tuple) else output).clone()
            for site, position, delta in edits:
                if site.layer == layer:
                    x[0, position] += delta.to(x.dtype)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    assert all(site.kind == "resid_post" for site, _, _ in edits)
    handles = [
        model.layout.layers[layer].module.register_forward_hook(hook_for(layer))
        for layer in {site.layer for site, _, _ in edits}
    ]
    try:
        with torch.no_grad():
            return model.hf(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def compare_with_oracle(
    model: LanguageModel,
    decoded: Decoded,
    logits: Logits,
    source: InterventionSource | None,
    tolerance: float = LOGIT_TOLERANCE,
) -> None:
    """Every token's logits equal a cache-free forward pass that applies the logged edits."""
    for row in range(len(decoded)):
        ids = decoded.prompts[row] + decoded.forced[row] + decoded.token_ids[row]
        edits = [] if source is None else deltas_of(decoded, source, row)
        expected = oracle_logits(model, ids, edits)
        for position in range(decoded.first_position(row) - 1, len(ids) - 1):
            torch.testing.assert_close(logits[row, position], expected[position], atol=tolerance, rtol=tolerance)


def check_cached_equals_cache_free(
    model: LanguageModel,
    source: InterventionSource | None,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig | None = None,
    tolerance: float = LOGIT_TOLERANCE,
) -> Decoded:
    """Rule 1: an edit at t acts while t is the input, once, and stays in the cache."""
    with recorded_logits() as logits:
        decoded = run_decode(model, prompts, config or DecodeConfig(max_new_tokens=9, stop_at_eos=False), source)
    if source is not None and len(decoded.edits):
        moved = oracle_logits(model, decoded.prompts[0] + decoded.token_ids[0], [])
        assert (moved[len(decoded.prompts[0]) - 1] - logits[0, len(decoded.prompts[0]) - 1]).abs().max() > 0.01, (
            "the edits are too weak for this check"
        )
    compare_with_oracle(model, decoded, logits, source, tolerance)
    return decoded


def edited_positions(log: EditLog, row: int) -> list[int]:
    return log.position[log.row == row].tolist()


def check_default_positions(model: LanguageModel, source: InterventionSource, prompts: Sequence[Sequence[int]]) -> None:
    """Rule 2: the last prompt token and every generated token but the last, counted without padding."""
    decoded = run_decode(model, prompts, DecodeConfig(max_new_tokens=6, stop_at_eos=False), source)
    for row, prompt in enumerate(prompts):
        expected = list(range(len(prompt) - 1, len(prompt) - 1 + 6))
        assert edited_positions(decoded.edits, row) == expected


def check_nothing_after_stop(
    model: LanguageModel, source: InterventionSource, prompts: Sequence[Sequence[int]]
) -> None:
    """Rule 2: a row that ended is not edited, nor fed, while others go on."""
    eos = min(model.eos_ids)
    plan = [[30, 31, eos, 32, 33, 34, 35], [30] * 7, [eos, *[40] * 6], [41, 42, 43, eos, 44, 45, 46]]
    plan = (plan * len(prompts))[: len(prompts)]
    decoded = run_decode(model, prompts, DecodeConfig(max_new_tokens=7), source, teacher=plan)
    for row, (prompt, forced) in enumerate(zip(prompts, plan, strict=True)):
        kept = forced.index(eos) + 1 if eos in forced else len(forced)
        assert decoded.token_ids[row] == forced[:kept]
        assert decoded.finish[row] == ("eos" if eos in forced else "length")
        assert edited_positions(decoded.edits, row) == list(range(len(prompt) - 1, len(prompt) - 1 + kept))


def check_reconstruction_error_kept(
    model: LanguageModel,
    dictionary: Dictionary,
    source: InterventionSource,
    feature: int,
    prompt: Sequence[int],
    tolerance: float = 1e-4,
) -> None:
    """Rule 3: clamping and ablation move x by decode(f′) − decode(f), and only where asked."""
    site = source.sites[0]
    assert site.kind == "resid_post"
    before, after = [], []
    handles = tap(model, site, lambda x: before.append(x[0].clone()))  # registered first, so it sees x unedited
    handles += tap(model, Site("resid_pre", site.layer + 1), lambda x: after.append(x[0].clone()))
    try:
        decoded = run_decode(model, [prompt], DecodeConfig(max_new_tokens=6, stop_at_eos=False), source)
    finally:
        for handle in handles:
            handle.remove()
    x, moved = torch.cat(before), torch.cat(after)
    places = edited_positions(decoded.edits, 0)
    untouched = torch.ones(len(x), dtype=torch.bool)
    untouched[places] = False
    assert torch.equal(x[untouched], moved[untouched])
    codes = dictionary.encode(x[places]).double()
    wanted = codes.clone()
    norm = dictionary.W_dec[feature].double().norm()
    if source.operation == "ablate":
        wanted[:, feature] = 0
    else:
        wanted[:, feature] = decoded.edits.requested[:, 0].double() / norm
    assert not torch.equal(codes, wanted), "the feature is already there, so nothing is checked"
    b_dec, W_dec = dictionary.b_dec.double(), dictionary.W_dec.double()  # type: ignore[union-attr, operator]
    error = x[places].double() - (codes @ W_dec + b_dec)
    torch.testing.assert_close(moved[places].double() - (wanted @ W_dec + b_dec), error, atol=tolerance, rtol=tolerance)


def check_empty_edit(model: LanguageModel, empty: InterventionSource, prompts: Sequence[Sequence[int]]) -> None:
    """Rule 3: an empty edit gives the same bits as none."""
    config = DecodeConfig(max_new_tokens=6, temperature=0.9, stop_at_eos=False)
    with recorded_logits() as plain:
        without = run_decode(model, prompts, config)
    with recorded_logits() as hooked:
        with_empty = run_decode(model, prompts, config, empty)
    assert without.token_ids == with_empty.token_ids
    assert plain.keys() == hooked.keys()
    assert all(torch.equal(plain[key], hooked[key]) for key in plain)


def check_batch_independence(
    model: LanguageModel,
    make_source: Callable[[], InterventionSource | None],
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig | None = None,
    tolerance: float = LOGIT_TOLERANCE,
) -> int:
    """Rule 4: a row decodes alone as it does in a left-padded batch. Returns how many near-ties were broken apart."""
    config = config or DecodeConfig(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=7, stop_at_eos=False)
    with recorded_logits() as together:
        batch = run_decode(model, prompts, config, make_source())
    near_ties = 0
    for row, prompt in enumerate(prompts):
        with recorded_logits() as single:
            alone = run_decode(model, [prompt], config, make_source(), samples=[row])
        for step, (left, right) in enumerate(zip(batch.token_ids[row], alone.token_ids[0], strict=True)):
            position = len(prompt) - 1 + step
            torch.testing.assert_close(together[row, position], single[0, position], atol=tolerance, rtol=tolerance)
            if left != right:
                assert _is_near_tie(single[0, position], left, right, config, row, position), f"row {row}, step {step}"
                near_ties += 1
                break
        else:
            mine = batch.edits.take(batch.edits.row == row)
            assert torch.equal(mine.position, alone.edits.position)
            assert torch.equal(mine.feature, alone.edits.feature)
    return near_ties


def _is_near_tie(logits: Tensor, left: int, right: int, config: DecodeConfig, sample: int, position: int) -> bool:
    """Whether two choices differ by rounding: tied logits if greedy, else a draw on the border between the tokens."""
    if config.temperature == 0:
        return abs(float(logits[left] - logits[right])) < 1e-3
    probs = torch.softmax(logits.double() / config.temperature, dim=-1)
    if config.top_p < 1:
        order = probs.argsort(descending=True)
        mass = probs[order].cumsum(0)
        probs[order[int((mass < config.top_p).sum()) + 1 :]] = 0
    cdf = probs.cumsum(0) / probs.sum()
    u = float(uniform(config.seed, torch.tensor([sample]), 0, position))
    return float((cdf - u).abs().min()) < 1e-4


def check_draws_are_keyed(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
    """Rule 4: the same call twice, and the rows in another order, give the same tokens; another seed does not."""
    config = DecodeConfig(max_new_tokens=8, temperature=1.0, stop_at_eos=False)
    first = run_decode(model, prompts, config)
    again = run_decode(model, prompts, config)
    assert first.token_ids == again.token_ids
    n = len(prompts)
    backwards = run_decode(model, list(prompts)[::-1], config, samples=list(range(n))[::-1])
    differing = sum(a != b for a, b in zip(first.token_ids, backwards.token_ids[::-1], strict=True))
    assert differing <= 1, "the draws of most rows depend on their place in the batch"
    other = run_decode(model, prompts, DecodeConfig(max_new_tokens=8, temperature=1.0, stop_at_eos=False, seed=1))
    assert other.token_ids != first.token_ids
    copies = run_decode(model, [prompts[0]] * 3, config)
    assert len(set(map(tuple, copies.token_ids))) > 1, "samples of one prompt share their draws"


def check_doses_logged(
    model: LanguageModel, source: StaticSource, dose: float, prompts: Sequence[Sequence[int]]
) -> None:
    """Rule 5: the requested dose, the coefficient applied and both norms are in the log, and agree."""
    before: dict[tuple[int, int], float] = {}
    original = source.choose

    def spy(request):  # type: ignore[no-untyped-def]
        for row, position, x in zip(request.row.tolist(), request.position.tolist(), request.x, strict=True):
            before[row, position] = float(x.double().norm())
        return original(request)

    source.choose = spy  # type: ignore[method-assign]
    decoded = run_decode(model, prompts, DecodeConfig(max_new_tokens=5, stop_at_eos=False), source)
    log = decoded.edits
    assert len(log) == 5 * len(prompts)
    for i in range(len(log)):
        norm = before[int(log.row[i]), int(log.position[i])]
        assert abs(float(log.x_norm[i]) / norm - 1) < 1e-5
        assert abs(float(log.requested[i, 0]) - dose) < 1e-6
        assert abs(float(log.coefficient[i, 0]) - dose * norm) < 1e-4 * norm
        assert abs(float(log.delta_norm[i]) - abs(dose) * norm) < 1e-4 * norm
        assert abs(float(log.relative_dose[i]) - abs(dose)) < 1e-4


def check_replay(
    model: LanguageModel,
    source: InterventionSource,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig | None = None,
    repeats: int = 1,
) -> None:
    """Rule 7: the logged edits, every token re-decided given the logged past: the same bits."""
    config = config or DecodeConfig(max_new_tokens=7, temperature=0.8, seed=3, stop=("e",), stop_at_eos=True)
    first = run_decode(model, prompts, config, source, repeats=repeats)
    replay = ReplaySource(first.edits, source)
    again = run_decode(model, prompts, config, replay, repeats=repeats, teacher=first.token_ids)
    assert again.decided_ids == first.token_ids
    assert again.token_logp == first.token_logp
    assert again.entropy == first.entropy
    assert again.finish == first.finish
    for name, column in first.edits.columns.items():
        assert torch.equal(column.nan_to_num(-7), getattr(again.edits, name).nan_to_num(-7)), name


def check_fork(
    model: LanguageModel,
    dictionary: Dictionary,
    prompts: Sequence[Sequence[int]],
    tolerance: float = LOGIT_TOLERANCE,
) -> None:
    """Rule 8: a teacher-forced prefill with the logged edits, repeated, equals each branch decoded alone."""
    branches, keep = 3, 4
    config = DecodeConfig(max_new_tokens=6, temperature=1.0, seed=2, stop_at_eos=False)
    past_source = RandomFeatureSource(dictionary, 0.5)
    past = run_decode(model, prompts, config, past_source)
    forced = [tokens[:keep] for tokens in past.token_ids]
    n = len(prompts)
    features = torch.arange(n * branches)[:, None] % dictionary.n_features
    at = [len(prompt) + keep - 1 for prompt in prompts]

    def fork(rows: list[int], own: Tensor) -> ForkSource:
        replay = ReplaySource(past.edits, past_source, rows=rows)
        return ForkSource(replay, StaticSource(dictionary, own, 0.6), [at[row] for row in rows])

    copies = [row for row in range(n) for _ in range(branches)]
    together_source = fork(copies, features)
    with recorded_logits() as together:
        forks = run_decode(model, prompts, config, together_source, forced=forced, repeats=branches)
    compare_with_oracle(model, forks, together, together_source, tolerance)
    assert forks.branch == list(range(branches)) * n
    for i, row in enumerate(copies):
        inherited = past.edits.take((past.edits.row == row) & (past.edits.position < at[row]))
        mine = forks.edits.take((forks.edits.row == i) & (forks.edits.position < at[row]))
        assert torch.equal(inherited.coefficient, mine.coefficient)
        assert torch.equal(inherited.feature, mine.feature)
        if i % branches != row % branches:  # one branch of each prompt is enough
            continue
        with recorded_logits() as single:
            alone = run_decode(
                model, [prompts[row]], config, fork([row], features[i : i + 1]), forced=[forced[row]], samples=[row],
                branches=[i % branches],
            )  # fmt: skip
        assert alone.token_ids[0] == forks.token_ids[i]
        for position in range(at[row], at[row] + 6):
            torch.testing.assert_close(together[i, position], single[0, position], atol=tolerance, rtol=tolerance)
    assert max(Counter(map(tuple, forks.token_ids)).values()) < branches * n, "all branches say the same"

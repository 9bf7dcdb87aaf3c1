"""The steering contract as plain functions, used by the tests and by the mutations that must make them fail.

Each raises AssertionError (or RuntimeError out of `decode`) where the contract is broken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from trimtab.dictionaries.base import Dictionary
from trimtab.lm import (
    DecodeConfig,
    Decoded,
    DecodeStream,
    EditLog,
    EditRequest,
    InterventionSource,
    LanguageModel,
    Site,
)
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
    original = DecodeStream._choose

    def spy(self, running):  # type: ignore[no-untyped-def]
        for row, logits in zip(running.rows, running.logits, strict=True):
            seen[row.number, row.length - 1] = logits.clone()
        return original(self, running)

    DecodeStream._choose = spy  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        DecodeStream._choose = original  # type: ignore[method-assign]


class LoggedEdit(NamedTuple):
    """What the log says was done at one place."""

    site: Site
    position: int
    delta: Tensor  # [d] what was added along directions, in float64
    replacement: Tensor | None = None  # [d] what took the activation's place before

    def of(self, x: Tensor) -> Tensor:
        return ((x if self.replacement is None else self.replacement).double() + self.delta).to(x.dtype)


def edits_of(decoded: Decoded, source: InterventionSource, row: int) -> list[LoggedEdit]:
    """What the log says was done to one row, computed without the code under test."""
    log = decoded.edits
    found = []
    for i in (log.row == row).nonzero()[:, 0].tolist():
        site = source.sites[int(log.site[i])]
        delta = torch.zeros(source.directions(site).shape[1], dtype=torch.float64)
        for feature, coefficient in zip(log.feature[i].tolist(), log.coefficient[i].tolist(), strict=True):
            if feature >= 0:
                delta += coefficient * source.directions(site)[feature].double()
        found.append(LoggedEdit(site, int(log.position[i]), delta, log.kept.get(int(log.replaced[i]))))
    return found


def oracle_logits(model: LanguageModel, ids: Sequence[int], edits: Sequence[LoggedEdit]) -> Tensor:
    """Logits [T, V] of one sequence: no cache, no padding, no batch; edits by hooks of our own."""

    def changed(x: Tensor, site: Site) -> Tensor:
        x, width = x.clone(), head_width(model)
        part = slice(None) if site.head is None else slice(site.head * width, (site.head + 1) * width)
        for edit in edits:
            if edit.site == site:
                x[0, edit.position, part] = edit.of(x[0, edit.position, part])
        return x

    def after(site: Site) -> Callable:
        def hook(_module, _args, output):  # type: ignore[no-untyped-def]
            return (changed(output[0], site), *output[1:]) if isinstance(output, tuple) else changed(output, site)

        return hook

    def before(site: Site) -> Callable:
        return lambda _module, args: (changed(args[0], site), *args[1:])

    handles = []
    for site in dict.fromkeys(edit.site for edit in edits):
        layer = model.layout.layers[site.layer].module
        if site.kind == "resid_post":
            handles.append(layer.register_forward_hook(after(site)))
        else:
            assert site.kind == "attn_z"
            out = layer.attn.c_proj if hasattr(layer, "attn") else layer.self_attn.o_proj
            handles.append(out.register_forward_pre_hook(before(site)))
    try:
        with torch.no_grad():
            return model.hf(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def head_width(model: LanguageModel) -> int:
    config = model.hf.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


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
        edits = [] if source is None else edits_of(decoded, source, row)
        expected = oracle_logits(model, ids, edits)
        for position in range(decoded.first_position(row) - 1, len(ids) - 1):
            torch.testing.assert_close(logits[row, position], expected[position], atol=tolerance, rtol=tolerance)


def check_cached_equals_cache_free(
    model: LanguageModel,
    source: InterventionSource | None,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig | None = None,
    tolerance: float = LOGIT_TOLERANCE,
    *,
    strong: bool = True,
) -> Decoded:
    """Rule 1: an edit at t acts while t is the input, once, and stays in the cache."""
    with recorded_logits() as logits:
        decoded = run_decode(model, prompts, config or DecodeConfig(max_new_tokens=9, stop_at_eos=False), source)
    if strong and source is not None and len(decoded.edits):
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
    handles = tap(model.layout, site, lambda x: before.append(x[0].clone()))  # registered first, so it sees x unedited
    handles += tap(model.layout, Site("resid_pre", site.layer + 1), lambda x: after.append(x[0].clone()))
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
                assert is_near_tie(single[0, position], left, right, config, row, position), f"row {row}, step {step}"
                near_ties += 1
                break
        else:
            mine = batch.edits.take(batch.edits.row == row)
            assert torch.equal(mine.position, alone.edits.position)
            assert torch.equal(mine.feature, alone.edits.feature)
    return near_ties


def is_near_tie(
    logits: Tensor, left: int, right: int, config: DecodeConfig, sample: int, position: int, branch: int = 0
) -> bool:
    """Whether two choices differ by rounding: tied logits if greedy, else a draw on the border between the tokens."""
    if config.temperature == 0:
        return abs(float(logits[left] - logits[right])) < 1e-3
    probs = torch.softmax(logits.double() / config.temperature, dim=-1)
    if config.top_p < 1:
        order = probs.argsort(descending=True)
        mass = probs[order].cumsum(0)
        probs[order[int((mass < config.top_p).sum()) + 1 :]] = 0
    cdf = probs.cumsum(0) / probs.sum()
    u = float(uniform(config.seed, torch.tensor([sample]), branch, position))
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


class Seen(NamedTuple):
    """Activations `[T, d]` of one row at a site, by absolute position."""

    before: Tensor
    after: Tensor


def decode_and_look(
    model: LanguageModel, source: InterventionSource, prompt: Sequence[int], n_tokens: int = 5
) -> tuple[Decoded, dict[Site, Seen]]:
    """Decode one prompt; tell what stood at each of the source's sites before its edits, and behind them."""
    before: dict[Site, list[Tensor]] = {site: [] for site in source.sites}
    after: dict[Site, list[Tensor]] = {site: [] for site in source.sites}

    def seen_by(into: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda x: into.append(x[0].clone())

    handles = [handle for site in source.sites for handle in tap(model.layout, site, seen_by(before[site]))]
    late: list[RemovableHandle] = []

    def look_behind(*_: object) -> None:  # in each pass, once decoding has registered its hooks
        for handle in late:
            handle.remove()
        late[:] = [handle for site in source.sites for handle in tap(model.layout, site, seen_by(after[site]))]

    handles.append(model.hf.get_input_embeddings().register_forward_hook(look_behind))
    try:
        decoded = run_decode(model, [prompt], DecodeConfig(max_new_tokens=n_tokens, stop_at_eos=False), source)
    finally:
        for handle in [*handles, *late]:
            handle.remove()
    return decoded, {site: Seen(torch.cat(before[site]), torch.cat(after[site])) for site in source.sites}


def check_log(model: LanguageModel, source: InterventionSource, prompts: Sequence[Sequence[int]]) -> None:
    """Rules 5 and 6: one edit for each place asked for, with the norms and the sum that stand around the edits."""
    for prompt in prompts:
        decoded, seen = decode_and_look(model, source, prompt)
        log, edits = decoded.edits, edits_of(decoded, source, 0)
        assert len(log) == 5 * len(source.sites)
        assert log.position.tolist() == [len(prompt) - 1 + step for step in range(5) for _ in source.sites]
        for i, edit in enumerate(edits):
            before, after = (x[edit.position] for x in seen[edit.site])
            size = float(before.norm())
            torch.testing.assert_close(after, edit.of(before), atol=1e-4 * size, rtol=1e-4)
            assert float(log.x_norm[i]) == pytest.approx(size, rel=1e-5)
            assert float(log.delta_norm[i]) == pytest.approx(float((after - before).norm()), abs=1e-4 * size)
            assert float(log.delta_norm[i]) > 0.01 * size
        for site, (before, after) in seen.items():
            untouched = [p for p in range(len(before)) if p not in log.position.tolist()]
            assert torch.equal(before[untouched], after[untouched]), site


def check_fork(
    model: LanguageModel,
    dictionary: Dictionary,
    prompts: Sequence[Sequence[int]],
    tolerance: float = LOGIT_TOLERANCE,
    past_source: InterventionSource | None = None,
) -> None:
    """Rule 8: a teacher-forced prefill with the logged edits, repeated, equals each branch decoded alone."""
    branches, keep = 3, 4
    config = DecodeConfig(max_new_tokens=6, temperature=1.0, seed=2, stop_at_eos=False)
    past_source = past_source or RandomFeatureSource(dictionary, 0.5)
    past = run_decode(model, prompts, config, past_source)
    forced = [tokens[:keep] for tokens in past.token_ids]
    n = len(prompts)
    features = torch.arange(n * branches)[:, None] % dictionary.n_features
    at = [len(prompt) + keep - 1 for prompt in prompts]

    def fork(rows: list[int], own: Tensor) -> ForkSource:
        replay = ReplaySource(past.edits, past_source, rows=rows)
        tables = {site: table_of(site) for site in past_source.sites}
        return ForkSource(replay, StaticSource(tables, own, 0.6), [at[row] for row in rows])

    def table_of(site: Site) -> Dictionary | DirectionTable:
        width, n = past_source.directions(site).shape[1], dictionary.n_features
        if width == dictionary.d_in:
            return dictionary
        return DirectionTable(torch.randn(n, width, generator=torch.Generator().manual_seed(0)))

    copies = [row for row in range(n) for _ in range(branches)]
    together_source = fork(copies, features)
    with recorded_logits() as together:
        forks = run_decode(model, prompts, config, together_source, forced=forced, repeats=branches)
    compare_with_oracle(model, forks, together, together_source, tolerance)
    assert forks.branch == list(range(branches)) * n
    for i, row in enumerate(copies):
        inherited = past.edits.take((past.edits.row == row) & (past.edits.position < at[row]))
        mine = forks.edits.take((forks.edits.row == i) & (forks.edits.position < at[row]))
        assert torch.equal(inherited.coefficient, mine.coefficient[:, : inherited.coefficient.shape[1]])
        k = inherited.feature.shape[1]
        assert torch.equal(inherited.feature, mine.feature[:, :k])
        assert torch.equal(inherited.replaced, mine.replaced)
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

"""Replaced activations: patching against plain `transformers` with hooks, bits, logs that replay, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from source_kinds import random
from steering_checks import decode_and_look, head_width, prompts_of, recorded_logits
from tiny_dictionary import make_dictionary
from torch import Tensor

from trimtab.dictionaries import Standard
from trimtab.errors import UserError
from trimtab.lm import DecodeConfig, EditRequest, LanguageModel, Site, TokenBatch, capture, decode, edited
from trimtab.runs import Run
from trimtab.steering import (
    CombinedSource,
    PatchSource,
    ReconstructionSource,
    ReplaySource,
    StaticSource,
    Trace,
    TracedSource,
    VectorSource,
    replay,
    replay_trace,
    token_effects,
)

HEAD, SITE = "attn_z.2.1", "resid_post.1"
CONFIG = DecodeConfig(max_new_tokens=6, stop_at_eos=False)
FROM, INTO = prompts_of((9, 14), seed=1), prompts_of((9, 14), seed=2)


@contextmanager
def plain_hooks(model: LanguageModel, values: Tensor, positions: list[int], seen: list[Tensor]) -> Iterator[None]:
    """Plain `transformers`: the input of a layer's output projection, one head of it replaced at some positions."""
    site, width = Site.parse(HEAD), head_width(model)
    part = slice((site.head or 0) * width, ((site.head or 0) + 1) * width)
    layers = model.hf.transformer.h if hasattr(model.hf, "transformer") else model.hf.model.layers
    layer = layers[site.layer]
    out = layer.attn.c_proj if hasattr(layer, "attn") else layer.self_attn.o_proj

    def hook(_module, args):  # type: ignore[no-untyped-def]
        x = args[0].clone()
        seen.append(x[..., part].clone())
        for position in positions:
            x[0, position, part] = values[position]
        return (x, *args[1:])

    handle = out.register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()


def patched_by_hand(model: LanguageModel, source: list[int], into: list[int], positions: list[int]) -> Tensor:
    """Logits [T, V] of one text with a head's output at some positions taken from another."""
    seen: list[Tensor] = []
    with plain_hooks(model, torch.empty(0), [], seen):
        model.hf(torch.tensor([source]), use_cache=False)
    with plain_hooks(model, seen[0][0], positions, []):
        return model.hf(torch.tensor([into]), use_cache=False).logits[0]


def captured(model: LanguageModel, site: str = HEAD) -> tuple[Tensor, Tensor]:
    """What the other run has at a site, in one left-padded batch, and the lengths of its rows."""
    batch = TokenBatch.pad(FROM, model.pad_id, model.device)
    return capture(model, batch, [site])[model.site(site)], batch.lengths


@pytest.mark.parametrize("positions", ["prompt", [2, 5], "3:8", [-1], [[1, 4], [0, -2]]])
def test_a_head_patched_from_another_run_is_what_plain_hooks_give(
    any_tiny: LanguageModel, positions: str | list[int] | list[list[int]], tmp_path: Path
) -> None:
    values, lengths = captured(any_tiny)
    source = PatchSource({HEAD: values}, positions=positions, lengths=lengths, keep_replacements=True)
    with recorded_logits() as logits:
        decoded = decode(any_tiny, INTO, CONFIG, source)
    moved = 0.0
    for row, prompt in enumerate(INTO):
        n = len(prompt)
        asked = {"prompt": list(range(n)), "3:8": list(range(3, 8))}.get(str(positions)) or positions
        own = asked[row] if isinstance(asked[0], list) else asked  # type: ignore[index]
        own = [place % n for place in own]  # type: ignore[union-attr]
        ids = prompt + decoded.token_ids[row]
        expected = patched_by_hand(any_tiny, FROM[row], ids, own)
        for at in range(n - 1, len(ids) - 1):  # cached
            torch.testing.assert_close(logits[row, at], expected[at], atol=1e-5, rtol=1e-5)
        mine = decoded.edits.take((decoded.edits.row == row) & (decoded.edits.feature[:, 0] >= 0))
        assert mine.position.tolist() == sorted(own)
        change = mine.edit().change(source.directions(any_tiny.site(HEAD)), torch.zeros_like(mine.row), mine.position)
        with torch.no_grad(), edited(any_tiny, {any_tiny.site(HEAD): lambda _, change=change: change}):  # uncached
            whole = any_tiny.forward(TokenBatch.full(torch.tensor([ids])))[0]
        torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
        plain = any_tiny.hf(torch.tensor([ids]), use_cache=False).logits[0]
        moved = max(moved, float((plain - expected)[n - 1 :].abs().max()))
    assert moved > 0.01, "the patch changes nothing, so nothing is checked"
    with Run.open(tmp_path / "run", "patch", {"model": "tiny", "dtype": "float32", "device": "cpu"}) as run:
        run.record(hashes={"model": any_tiny.fingerprint})
        Trace.of(any_tiny, decoded, CONFIG, source).write(run)
    assert replay(tmp_path / "run", model=any_tiny, dictionary=[]).exact


@pytest.mark.parametrize("site", ["attn_z.2.1", "attn_z.2", "attn_k.1", "resid_post.1", "resid_pre.2", "mlp_out.1"])
def test_what_is_patched_is_there_bit_for_bit(any_tiny: LanguageModel, site: str) -> None:
    values, _ = captured(any_tiny, site)
    values = 1e-3 * values[1:]  # x + (y − x) would lose the last bits of small values
    _, seen = decode_and_look(any_tiny, PatchSource({site: values}, positions="prompt"), INTO[1])
    before, after = seen[any_tiny.site(site)]
    given = values[0].flatten(1)
    assert torch.equal(after[:14], given)
    assert torch.equal(before[14:], after[14:])
    assert not torch.equal(before[:14] + (given - before[:14]), given)


def test_a_run_patched_into_itself_is_that_run(any_tiny: LanguageModel) -> None:
    plain = decode(any_tiny, INTO, CONFIG)
    batch = TokenBatch.pad(INTO, any_tiny.pad_id, any_tiny.device)
    sites = ["attn_z.1", "resid_post.2", HEAD]
    values = capture(any_tiny, batch, sites)
    source = PatchSource(values, positions="prompt", lengths=batch.lengths)
    patched = decode(any_tiny, INTO, CONFIG, source)
    assert patched.token_logp == plain.token_logp
    assert patched.edits.delta_norm.max() == 0


def test_a_mean_takes_every_activation_s_place(any_tiny: LanguageModel) -> None:
    values, _ = captured(any_tiny, "attn_z.2")
    mean = values[1].mean(0)  # [heads, head_dim]
    _, seen = decode_and_look(any_tiny, PatchSource({"attn_z.2": mean}, positions="all"), INTO[1])
    _, after = seen[any_tiny.site("attn_z.2")]
    assert torch.equal(after, mean.flatten().expand(len(after), -1))


@pytest.mark.parametrize("with_error", [False, True])
def test_reconstructions_are_the_dictionary_s(any_tiny: LanguageModel, sae: Standard, with_error: bool) -> None:
    kept = list(range(0, 48, 2)) if with_error else None
    source = ReconstructionSource(sae, features=kept, with_error=with_error)
    _, seen = decode_and_look(any_tiny, source, INTO[1])
    before, after = seen[any_tiny.site(SITE)]
    codes = sae.encode(before).double()
    wanted = codes.clone()
    if with_error:
        wanted[:, 1::2] = 0
    W_dec, b_dec = sae.W_dec.double(), sae.b_dec.double()  # type: ignore[union-attr, operator]
    error = before.double() - codes @ W_dec - b_dec if with_error else 0
    torch.testing.assert_close(after.double(), wanted @ W_dec + b_dec + error, atol=1e-4, rtol=1e-4)
    assert (after - before).norm(dim=-1).min() > 0.1


def test_hashes_are_logged_and_values_only_on_request(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    values, lengths = captured(tiny_llama)
    source = PatchSource({HEAD: values}, positions="prompt", lengths=lengths)
    kept = PatchSource({HEAD: values}, positions="prompt", lengths=lengths, keep_replacements=True)
    decoded = decode(tiny_llama, INTO, CONFIG, source)
    assert decoded.edits.kept == {}
    assert torch.equal(decoded.edits.replaced, decode(tiny_llama, INTO, CONFIG, kept).edits.replaced)
    message = (
        "replaced activations: the log holds their hashes, not their values; "
        "decode again with a source that was given keep_replacements=True"
    )
    with Run.open(tmp_path / "run", "patch", {"model": "tiny", "dtype": "float32", "device": "cpu"}) as run:
        run.record(hashes={"model": tiny_llama.fingerprint})
        Trace.of(tiny_llama, decoded, CONFIG, source).write(run)
    again: list[Callable[[], object]] = [
        lambda: decode(tiny_llama, INTO, CONFIG, ReplaySource(decoded.edits, source)),
        lambda: token_effects(tiny_llama, decoded, source),
        lambda: replay_trace(tiny_llama, Trace.read(tmp_path / "run"), source),
        lambda: replay(tmp_path / "run", model=tiny_llama, dictionary=[]),
    ]
    for attempt in again:
        with pytest.raises(UserError) as caught:
            attempt()
        assert caught.value.line == message
    rows = Trace.read(tmp_path / "run").edits.to_pylist()
    assert {row["operation"] for row in rows} == {"patch"}
    assert len({row["replacement_hash"] for row in rows}) == 23
    assert all(row["applied_dose"] == pytest.approx(row["delta_norm"], rel=1e-5) for row in rows)


def test_replacements_that_were_not_kept_are_missed_beside_directions(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    source = CombinedSource([StaticSource(sae, 3, 0.4), PatchSource({SITE: random(32)}, positions="generated")])
    trace = Trace.of(tiny_llama, decode(tiny_llama, INTO, CONFIG, source), CONFIG, source)
    with pytest.raises(UserError, match="the log holds their hashes, not their values"):
        TracedSource(trace, [sae])


@pytest.mark.parametrize("first", [True, False])
def test_what_is_ablated_beside_a_patch_is_gone_from_the_patch(tiny_llama: LanguageModel, first: bool) -> None:
    vector, patch = random(32), PatchSource({SITE: random(3, 32)[2]}, positions="all", keep_replacements=True)
    ablation = VectorSource(vector, SITE, operation="ablate", positions="all")
    both = CombinedSource([ablation, patch] if first else [patch, ablation])
    _, seen = decode_and_look(tiny_llama, both, INTO[0])
    before, after = seen[tiny_llama.site(SITE)]
    unit = vector / vector.norm()
    patched = random(3, 32)[2]
    assert (before @ unit).abs().max() > 0.1
    assert abs(float(patched @ unit)) > 0.1
    torch.testing.assert_close(after, (patched - (patched @ unit) * unit).expand_as(after), atol=1e-5, rtol=1e-5)
    pushed = CombinedSource([VectorSource(vector, SITE, 0.5, positions="all"), patch])
    _, seen = decode_and_look(tiny_llama, pushed, INTO[0])
    after = seen[tiny_llama.site(SITE)][1]
    torch.testing.assert_close(after, (patched + 0.5 * patched.norm() * unit).expand_as(after), atol=1e-5, rtol=1e-5)


def test_a_damaged_file_of_activations_is_refused(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    source = PatchSource({SITE: random(32)}, positions="prompt", keep_replacements=True)
    with Run.open(tmp_path / "run", "patch", {}) as run:
        Trace.of(tiny_llama, decode(tiny_llama, INTO, CONFIG, source), CONFIG, source).write(run)
    file = tmp_path / "run" / "replacements.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"replacements.safetensors: not readable"):
        Trace.read(tmp_path / "run")


def test_bad_patches_are_refused(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    one, rows = random(32), random(2, 9, 32)

    def run(source: PatchSource | CombinedSource | ReconstructionSource, n: int = 2) -> Callable[[], object]:
        return lambda: decode(tiny_llama, INTO[:n], CONFIG, source)

    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: PatchSource({SITE: random(9, 32)}), "values of resid_post.1 of shape (9, 32): what is captured there"),
        (lambda: PatchSource({SITE: one * torch.inf}), "values of resid_post.1: some are not finite"),
        (lambda: PatchSource({SITE: rows}, lengths=[9]), "1 lengths: values of resid_post.1 are 2 rows of 9 tokens"),
        (
            lambda: PatchSource({SITE: rows}, lengths=[9, 10]),
            "2 lengths: values of resid_post.1 are 2 rows of 9 tokens",
        ),
        (lambda: PatchSource({SITE: one}, positions=[]), "positions: the list is empty"),
        (lambda: PatchSource({}), "the sites: there are none"),
        (run(PatchSource({SITE: rows}, positions="0:3"), 1), "values for 2 rows: 1 rows are decoded"),
        (run(PatchSource({SITE: one}, positions=[[1]])), "positions for 1 rows: 2 rows are decoded"),
        (
            run(PatchSource({SITE: rows}, positions=[3, 9], lengths=[9, 9])),
            "position 9 of row 1: the values of resid_post.1 end at 8",
        ),
        (
            run(PatchSource({SITE: rows}, positions=[6], lengths=[9, 4])),
            "position 6 of row 1: the values of resid_post.1 end at 3",
        ),
        (run(PatchSource({SITE: rows}, positions="0:3")), "values for 2 rows: their prompts differ in length"),
        (
            run(PatchSource({"attn_z.1": random(1, 20, 8, 4)})),
            "values of attn_z.1 for 8 heads of 4: tiny-llama has 4 heads of 8 there; give those of this site",
        ),
        (
            run(PatchSource({SITE: one}, positions=[[20], [3]])),
            "position 20 of row 0: the row has positions 0 to 13, and 9 prompt tokens to count back over",
        ),
        (
            run(PatchSource({SITE: random(1, 9, 32)}, positions=[-1])),
            "positions counted from the end of row 1: its prompt has 14 tokens, the values of resid_post.1 are of 9",
        ),
        (run(PatchSource({SITE: one}, positions=[0, -10])), "position -10 of row 0"),
        (run(PatchSource({HEAD: random(9)})), "activations of width 9: site attn_z.2.1 has width 8"),
        (
            run(CombinedSource([PatchSource({SITE: one}), ReconstructionSource(sae)])),
            "combined sources at resid_post.1: two of them set what the activation is to be there",
        ),
        (lambda: ReconstructionSource(sae, with_error=True), "all features and the error are the activation itself"),
        (lambda: ReconstructionSource(sae, features=[48]), "feature 48: the dictionary has features 0 to 47"),
    ]
    for attempt, message in cases:
        with pytest.raises(UserError) as caught:
            attempt()
        assert message in caught.value.line


def test_another_source_s_positions_need_no_values(tiny_llama: LanguageModel) -> None:
    """Beyond the listed places of a row nothing is asked of the values."""
    source = PatchSource({SITE: random(2, 4, 32)}, positions=[[1], [3]], lengths=[4, 4], keep_replacements=True)
    log = decode(tiny_llama, INTO, CONFIG, source).edits
    edits = log.take(log.feature[:, 0] >= 0)
    assert list(zip(edits.row.tolist(), edits.position.tolist(), strict=True)) == [(0, 1), (1, 3)]
    request = EditRequest(Site.parse(SITE), torch.zeros(1, 32), *torch.zeros(7, 1, dtype=torch.long), torch.zeros(1, 1))
    edit = StaticSource(make_dictionary(tiny_llama), 3).choose(request)
    assert edit is not None
    assert edit.replacement is None

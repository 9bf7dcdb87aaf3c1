"""Path patching equals whole forward passes of the plain model with hooks, for every head and kind of receiver."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from circuit_prompts import Hooks, aligned, few_names, logits
from torch import Tensor

from trimtab.errors import UserError
from trimtab.evaluation.circuits import patched_runs, path_patching
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.circuits.path_patching import logits_location, path_patch
from trimtab.evaluation.circuits.rows import PromptRows
from trimtab.evaluation.supervised.cross_sections import PatchedPrompts
from trimtab.lm import LanguageModel, RowDelta, Site


def reference(model: LanguageModel, rows: PromptRows, other: Tensor, receivers: Sequence[Location]) -> Tensor:
    """The definition: for each head one forward pass with all other heads fixed, and one with the receivers patched."""
    n_heads = model.hf.config.num_attention_heads
    clean: dict[int, Tensor] = {}
    corrupted: dict[int, Tensor] = {}
    for ids, into in ((other, corrupted), (rows.ids, clean)):
        with Hooks(model) as hooks:
            hooks.read_z(into)
            found = logits(model, ids)

    number, end = torch.arange(len(rows.ids)), rows.positions["END"]

    def difference(found: Tensor) -> Tensor:
        last = found[number, end]
        return last[number, rows.answers[:, 0]] - last[number, rows.answers[:, 1]]

    before, head_dim, effects = difference(found), clean[0].shape[-1] // n_heads, []
    for layer in range(model.n_layers):
        for head in range(n_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            fixed = {n: value.clone() for n, value in clean.items()}
            fixed[layer][..., part] = corrupted[layer][..., part]
            read: dict[Location, Tensor] = {}
            with Hooks(model) as hooks:
                hooks.write_z(fixed)
                for receiver in receivers:
                    if receiver.site.head is not None:
                        hooks.read_head(receiver, rows, head_dim, read)
                found = logits(model, rows.ids)
            if read:
                with Hooks(model) as hooks:
                    for receiver, value in read.items():
                        hooks.write_head(receiver, rows, head_dim, value)
                    found = logits(model, rows.ids)
            effects.append(difference(found) - before)
    return torch.stack(effects, 1).unflatten(1, (model.n_layers, n_heads))


def receivers_of(model: LanguageModel, kind: str) -> list[Location]:
    if kind == "logits":
        return [logits_location(model)]
    if kind == "queries":
        return [head_location(model, "attn_q", 3, head, "END") for head in (0, 2)]
    if kind == "values":
        return [head_location(model, "attn_v", layer, 3, "S2") for layer in (2, 3)]
    return [
        head_location(model, "attn_q", 3, 1, "END"), head_location(model, "attn_k", 3, 1, "IO"),
        head_location(model, "attn_k", 3, 1, "S1"), head_location(model, "attn_k", 2, 0, "S1+1"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["logits", "queries", "values", "all"])
def test_as_whole_forward_passes_with_hooks(any_tiny: LanguageModel, kind: str) -> None:
    rows, other = aligned(any_tiny)
    receivers = receivers_of(any_tiny, kind)
    found, expected = path_patch(any_tiny, rows, other, receivers), reference(any_tiny, rows, other, receivers)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    last = max(receiver.site.layer for receiver in receivers)
    assert kind == "logits" or not found[:, last:].any()


@pytest.mark.parametrize("mutation", ["attention runs", "other heads too", "wrong token", "not at the receiver"])
def test_what_would_be_another_quantity(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    rows, other = aligned(tiny_llama)
    receivers = receivers_of(tiny_llama, "all")
    expected = reference(tiny_llama, rows, other, receivers)
    edited = path_patching.edited

    def changed(model: LanguageModel, edits: dict) -> object:
        first = min((site.layer for site in edits if site.kind == "attn_z"), default=None)
        if mutation == "attention runs" and first is not None:
            edits = {site: fn for site, fn in edits.items() if site.kind != "attn_z" or site.layer == first}
        if mutation == "other heads too" and first is not None:
            delta = edits[Site("attn_z", first)](torch.empty(0))
            edits[Site("attn_z", first)] = lambda _x: RowDelta(*delta[:3], delta.base.roll(1, 0))
        if mutation == "not at the receiver" and first is None:
            edits = {s: (lambda x, f=fn: f(x)._replace(time=(f(x).time + 1) % x.shape[1])) for s, fn in edits.items()}
        return edited(model, edits)

    for module in (path_patching, patched_runs):
        monkeypatch.setattr(module, "edited", changed)
    if mutation == "wrong token":
        rows = rows._replace(positions={**rows.positions, "S1+1": rows.positions["S1"]})
    found = path_patch(tiny_llama, rows, other, receivers)
    assert (found - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["logits", "all"])
def test_some_senders(any_tiny: LanguageModel, kind: str) -> None:
    """As many in a layer as there are, in one layer none; the others' effects are left at 0."""
    rows, other = aligned(any_tiny)
    receivers, layers = receivers_of(any_tiny, kind), any_tiny.n_layers
    senders = torch.zeros(layers, 4, dtype=torch.bool)
    senders[0, 1] = senders[1, 0] = senders[1, 3] = True
    layers_done: list[int] = []
    found = path_patch(any_tiny, rows, other, receivers, layers_done.append, senders)
    expected = path_patch(any_tiny, rows, other, receivers)
    torch.testing.assert_close(found, expected * senders, atol=1e-5, rtol=1e-4)
    assert found.count_nonzero(0).bool().sum() == 3
    assert sum(layers_done) == (layers if kind == "logits" else 3)


def test_where_a_model_cannot_start_at_a_layer(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, other = aligned(tiny_llama)
    receivers = receivers_of(tiny_llama, "all")
    expected = path_patch(tiny_llama, rows, other, receivers)
    monkeypatch.setattr("trimtab.lm.upper_layers.can_run_from", lambda *_: False)
    torch.testing.assert_close(path_patch(tiny_llama, rows, other, receivers), expected, atol=1e-5, rtol=1e-5)


def test_the_same_prompt_changes_nothing(tiny_llama: LanguageModel) -> None:
    rows, _ = aligned(tiny_llama)
    assert path_patch(tiny_llama, rows, rows.ids, receivers_of(tiny_llama, "all")).abs().max() < 1e-5


def test_grouped_queries_share_keys_and_values(tiny_llama: LanguageModel, tiny_gpt2: LanguageModel) -> None:
    """Four query heads, two of keys and values; GPT-2 has one for each."""
    assert [head_location(tiny_llama, "attn_v", 1, head, "S2").site.head for head in range(4)] == [0, 0, 1, 1]
    assert [head_location(tiny_gpt2, "attn_k", 1, head, "S2").site.head for head in range(4)] == [0, 1, 2, 3]
    assert str(head_location(tiny_llama, "attn_q", 1, 3, "END")) == "attn_q.1.3 at END"


def test_what_cannot_be_patched(tiny_llama: LanguageModel) -> None:
    rows, other = aligned(tiny_llama)
    with pytest.raises(UserError, match=r"site attn_q.1.4: attn_q has heads 0 to 3"):
        head_location(tiny_llama, "attn_v", 1, 4, "END")
    with pytest.raises(UserError, match="receivers: give heads' queries, keys or values, or the logits alone"):
        path_patch(tiny_llama, rows, other, [])
    with pytest.raises(UserError, match=r"receiver attn_q.1: it is not a head's"):
        path_patch(tiny_llama, rows, other, [Location(Site("attn_q", 1), "END")])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tiny_llama: LanguageModel, value: float) -> None:
    """An edit with a NaN leaves the activation as it is, so that such a dictionary would look perfect."""
    ioi, place = few_names(), head_location(tiny_llama, "attn_z", 1, 2, "END")
    found = PatchedPrompts(tiny_llama, ioi, ioi.prompts(3), [place])
    x = found.activations[place].clone()
    assert torch.isfinite(found.answers({place: x}).difference).all()
    x[1, 0] = value
    expected = r"values for attn_z.1.2 at END: 1 of 3 rows are not finite; check the dictionary that gave them"
    with pytest.raises(UserError, match=expected):
        found.answers({place: x})

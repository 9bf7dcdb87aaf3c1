"""Heads at their means as whole forward passes of the plain model with hooks have them; completeness closed forms."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from circuit_prompts import Hooks, few_names, logits
from torch import Tensor

from trimtab.errors import UserError
from trimtab.evaluation.circuits import completeness
from trimtab.evaluation.circuits.circuit import Circuit, CircuitHead
from trimtab.evaluation.circuits.completeness import Completeness, measure_completeness
from trimtab.evaluation.circuits.faithfulness import measure_faithfulness
from trimtab.evaluation.circuits.finding import find_circuit
from trimtab.evaluation.circuits.knock_outs import KnockOuts, Positions
from trimtab.lm import LanguageModel
from trimtab.lm.cache import PlacedLayer
from trimtab.runs import json_safe, read_typed
from trimtab.tasks.ioi_prompts import IOIDistribution, IOIPrompt

KEPT = {(0, 1): frozenset({"S2", "S1+1"}), (1, 2): frozenset({"END", "S2"}), (2, 0): frozenset({"END"})}


def reference(
    model: LanguageModel, ioi: IOIDistribution, prompts: Sequence[IOIPrompt], chosen: Positions, *, keep: bool
) -> list[float]:
    """One prompt at a time; the mean of 32 sentences of its template with three names takes the heads' place."""
    found: list[float] = []
    for prompt in prompts:
        sums: dict[int, Tensor] = {}
        same = ioi.three_persons(prompt.template, 32)
        for other in same:
            z: dict[int, Tensor] = {}
            with Hooks(model) as hooks:
                hooks.read_z(z)
                logits(model, torch.tensor([ioi.tokenise(other).ids]))
            sums = {layer: sums.get(layer, 0) + value for layer, value in z.items()}
        tokens = ioi.tokenise(prompt)

        def put(layer: int, tokens: Any = tokens, sums: dict[int, Tensor] = sums, n: int = len(same)) -> Any:
            def hook(_module: Any, args: Any) -> Any:
                z = args[0].unflatten(-1, (model.hf.config.num_attention_heads, -1)).clone()
                mean = (sums[layer] / n).view_as(z)
                for time in range(z.shape[1]):
                    for head in range(z.shape[2]):
                        named = [name for name, place in tokens.positions.items() if place == time]
                        if bool(chosen.get((layer, head), frozenset()).intersection(named)) != keep:
                            z[:, time, head] = mean[:, time, head]
                return (z.flatten(2),)

            return hook

        with Hooks(model) as hooks:
            for layer in range(model.n_layers):
                hooks.handles.append(hooks.out(layer).register_forward_pre_hook(put(layer)))
            last = logits(model, torch.tensor([tokens.ids]))[0, -1]
        found.append(float(last[tokens.io_token] - last[tokens.s_token]))
    return found


def test_as_whole_forward_passes_with_hooks(any_tiny: LanguageModel) -> None:
    """Gemma's window is shorter than a prompt, so that tokens cannot run beside the others' keys there."""
    ioi = few_names()
    prompts = ioi.prompts(6)
    runs = KnockOuts(any_tiny, ioi, prompts)
    order = sorted(range(len(prompts)), key=lambda n: len(ioi.tokenise(prompts[n]).ids))
    ordered = [prompts[n] for n in order]
    for _ in range(2):  # the first is tried against whole forward passes
        assert runs.only(KEPT).tolist() == pytest.approx(reference(any_tiny, ioi, ordered, KEPT, keep=True), abs=1e-4)
    assert runs._few_tokens is ("gemma" not in any_tiny.name)
    assert runs.only({}).tolist() == pytest.approx(reference(any_tiny, ioi, ordered, {}, keep=True), abs=1e-4)
    assert runs.without(KEPT).tolist() == pytest.approx(reference(any_tiny, ioi, ordered, KEPT, keep=False), abs=1e-4)
    assert runs.without({}).tolist() == runs.full.tolist()
    assert not torch.allclose(runs.only(KEPT), runs.only({}), atol=1e-3)
    assert not torch.allclose(runs.without(KEPT), runs.full, atol=1e-3)


def test_means_do_not_depend_on_how_many_prompts_a_template_has(tiny_llama: LanguageModel) -> None:
    """One prompt's template has as good a mean as that of many; another seed has other sentences."""
    ioi = few_names()
    prompts = [prompt for prompt in ioi.prompts(40) if prompt.template == ioi.templates[1]]
    among_many, alone = KnockOuts(tiny_llama, ioi, prompts), KnockOuts(tiny_llama, ioi, prompts[:1])
    assert len(prompts) > 5
    torch.testing.assert_close(alone.none, among_many.none[:1])
    other = KnockOuts(tiny_llama, ioi, prompts[:1], seed=1)
    assert not torch.allclose(other.none, alone.none, rtol=1e-4, atol=0)


def test_the_right_name_is_named_or_not(built: LanguageModel, ioi: IOIDistribution) -> None:
    """A name whose logit is turned round is never the likeliest; where it is the subject nothing changes."""
    hf = copy.deepcopy(built.hf)
    hf.lm_head.weight.data[ioi.name_token[ioi.names[0]]] *= -1
    model, prompts = LanguageModel.from_hf(hf, built.tokenizer, name="one name less"), ioi.prompts(60, "test")
    lengths = sorted(prompts, key=lambda prompt: len(ioi.tokenise(prompt).ids))
    expected = [float(prompt.attributes["IO"] != ioi.names[0]) for prompt in lengths]
    assert 0 < sum(expected) < 60
    assert KnockOuts(model, ioi, prompts).right.tolist() == expected
    heads = (CircuitHead(layer=1, head=2, role="name mover"),)
    found = measure_faithfulness(model, ioi, Circuit(model="", fingerprint="", heads=heads), prompts, n_random=0)
    assert (found.accuracy.estimate, found.accuracy.n) == (pytest.approx(sum(expected) / 60), 60)
    assert found.accuracy.low < found.accuracy.estimate < found.accuracy.high
    shown = found.tables()["faithfulness"].to_frame()
    assert shown["measured"].tolist()[:2] == ["accuracy of the plain model", "plain model"]
    assert shown["value"].tolist()[0] == pytest.approx(sum(expected) / 60)


@pytest.mark.parametrize("fault", ["refuses", "other numbers"])
def test_a_model_that_cannot_run_single_tokens(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Whole prompts run instead."""
    ioi = few_names()
    prompts = ioi.prompts(6)
    expected = KnockOuts(tiny_llama, ioi, prompts).only(KEPT)
    runs = KnockOuts(tiny_llama, ioi, prompts)
    if fault == "refuses":
        monkeypatch.setattr(PlacedLayer, "update", None)
    else:
        monkeypatch.setattr(PlacedLayer, "update", lambda _self, keys, values, *_a, **_k: (keys, values))
    for _ in range(2):
        torch.testing.assert_close(runs.only(KEPT), expected)
    assert runs._few_tokens is False


def test_the_whole_circuit_is_complete(built: LanguageModel, ioi: IOIDistribution) -> None:
    """All other heads give nothing: circuit and model are the same, whatever is taken from both."""
    circuit, prompts = find_circuit(built, ioi, ioi.prompts(24)), ioi.prompts(24, "test")
    done: list[int] = []
    found = measure_completeness(built, ioi, circuit, prompts, n_subsets=4, progress=done.append)
    faithful = measure_faithfulness(built, ioi, circuit, prompts, n_random=0)
    nothing, *others = found.knock_outs
    assert (nothing.kind, nothing.taken) == ("nothing", "nothing")
    assert nothing.circuit == faithful.circuit
    assert nothing.model == faithful.full == found.full
    own = [one for one in others if one.kind != "random heads of a random circuit"]
    assert [one.taken for one in own[:2]] == ["name mover", "S-inhibition"]
    assert len(own) == 2 + 4
    assert {one.taken for one in own[2:]} <= {"0.1", "1.2", "0.1, 1.2"}
    for one in own:
        assert one.circuit.estimate == pytest.approx(one.model.estimate, abs=1e-4)
        assert one.difference.estimate == pytest.approx(0, abs=1e-4)
    mover = own[0]
    runs = KnockOuts(built, ioi, prompts)
    left = runs.only({(0, 1): frozenset({"END"})})
    assert mover.circuit.estimate == pytest.approx(float(left.mean()), abs=1e-6)
    factor = float((left @ runs.none) / runs.none.square().sum())  # what the other writes lengthens the residual
    assert 0.3 < factor < 1
    torch.testing.assert_close(left, factor * runs.none, atol=0.05, rtol=0)
    assert found.incompleteness.estimate == pytest.approx(0, abs=1e-5)
    # A random circuit answers nothing, and the model answers unless its heads are among those taken from it.
    assert found.beside is not None
    assert found.beside.estimate > 0.5
    assert sum(done) == 1 + 2 + 4 + 4 + 2
    shares = {share.head: share for share in found.heads}
    assert shares["1.2"].alone.estimate == pytest.approx(faithful.full.estimate - mover.circuit.estimate, abs=1e-4)
    assert shares["1.2"].last == shares["1.2"].alone  # no other head has its role
    assert shares["0.1"].alone.estimate > 0.5
    assert "it is 0.00 [0.00, 0.00] of the logit difference from the model" in found.headline()
    assert read_typed(Completeness, json_safe(found), "it") == found
    drawn = found.plot()
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("model without the heads", "circuit without them")
    dots = sum(len(kind.get_offsets()) for kind in drawn.collections)  # type: ignore[arg-type]
    assert dots == len(found.knock_outs)


def test_all_heads_are_complete_and_half_a_circuit_is_not(built: LanguageModel, ioi: IOIDistribution) -> None:
    prompts = ioi.prompts(24, "test")
    every = [(layer, head) for layer in range(2) for head in range(4)]
    roles = ("other direct", "induction", "previous token")  # at END, S2 and S1+1
    heads = [CircuitHead(layer=layer, head=head, role=role) for layer, head in every for role in roles]
    whole = measure_completeness(built, ioi, Circuit(model="built", fingerprint="", heads=tuple(heads)), prompts)
    assert whole.incompleteness.estimate == pytest.approx(0, abs=1e-5)
    assert len([one for one in whole.knock_outs if one.kind == "random heads"]) == 12
    circuit = find_circuit(built, ioi, ioi.prompts(24))
    half = dataclasses.replace(circuit, heads=circuit.of("name mover"))
    found = measure_completeness(built, ioi, half, prompts, n_subsets=3)
    (nothing, role) = found.knock_outs[:2]
    assert nothing.difference.estimate < -0.1 * found.full.estimate
    assert "nothing (worst found)" in found.tables()["completeness"].to_frame()["taken from both"].tolist()
    assert role.difference.estimate == pytest.approx(0, abs=0.2 * found.full.estimate)
    none = measure_completeness(built, ioi, half, prompts, n_subsets=0)
    assert none.beside is None
    assert none.incompleteness.estimate == pytest.approx(-nothing.difference.estimate / found.full.estimate, rel=1e-6)


def test_heads_that_stand_in_for_each_other(built: LanguageModel, ioi: IOIDistribution) -> None:
    """The last of a role counts more than one of two: here both would copy the name, one is not there."""
    circuit = find_circuit(built, ioi, ioi.prompts(24))
    idle = CircuitHead(layer=1, head=0, role="name mover")
    both = dataclasses.replace(circuit, heads=(*circuit.heads, idle))
    shares = {one.head: one for one in measure_completeness(built, ioi, both, ioi.prompts(8), n_subsets=0).heads}
    assert shares["1.0"].alone.estimate == pytest.approx(0, abs=1e-5)
    assert shares["1.0"].last.estimate == pytest.approx(0, abs=1e-5)
    assert shares["1.2"].last.estimate == pytest.approx(shares["1.2"].alone.estimate, rel=1e-5)
    assert shares["1.2"].roles == "name mover"


def test_mean_of_distances_not_of_differences() -> None:
    """Sets that are too high and too low by as much do not make a circuit complete."""
    apart = [torch.full((5,), 1.0, dtype=torch.float64), torch.full((5,), -1.0, dtype=torch.float64)]
    found = completeness._share(apart, torch.full((5,), 4.0, dtype=torch.float64))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    values = torch.tensor(np.random.default_rng(0).normal(1, 0.1, 50))
    assert completeness._share([values], torch.ones(50, dtype=torch.float64)).estimate == pytest.approx(
        float(values.mean())
    )


def test_a_circuit_of_another_model(built: LanguageModel, tiny_llama: LanguageModel, ioi: IOIDistribution) -> None:
    circuit = find_circuit(built, ioi, ioi.prompts(8))
    with pytest.raises(UserError, match="the circuit of built: tiny-llama has other weights"):
        measure_completeness(tiny_llama, ioi, circuit, ioi.prompts(8))

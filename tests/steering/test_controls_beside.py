"""Random features beside an arm at equal dose, and which texts are still ordinary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_dictionary import make_dictionary

from trimtab import cli
from trimtab.dictionaries import Standard, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import Capabilities, DecodeConfig, LanguageModel, TokenBatch
from trimtab.report import write_report
from trimtab.runs import read_record, read_typed
from trimtab.stats import wilson_interval
from trimtab.steering import (
    DirectionTable,
    StaticSource,
    SteerConfig,
    Steering,
    SteerResult,
    TopActiveSource,
    ordinary_texts,
    planning,
    random_arms,
    run_steer,
    steer,
)
from trimtab.steering import steered as steered_module
from trimtab.steering.fluency import repetition
from trimtab.steering.ordinary_texts import OrdinaryText, fluency

PROMPTS = ("the sea and the ship", "an inn", "in the end, the trim tab turned the rudder")
CONFIG = DecodeConfig(max_new_tokens=12, temperature=1.0, seed=4)


def directions(model: LanguageModel, sae: Standard) -> dict[str, tuple[Any, dict[str, Any]]]:
    v = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(3))
    saved = Steering.of(model, StaticSource(sae, [3, 5], [0.5, -0.3], positions="all"))
    return {
        "a feature": (sae, {"features": 3, "sweep": (0.3, 0.9)}),
        "several, in their own units": (sae, {"features": [3, 5], "dose": 1.5, "unit": "max_activation"}),
        "clamped everywhere": (
            sae, {"features": 3, "dose": 5.0, "unit": "absolute", "operation": "clamp", "positions": "all"},
        ),
        "no dose at all": (sae, {"features": 3, "dose": 0.0}),
        "vectors at two sites": ({"resid_post.1": v, "mlp_out.2": v[0]}, {"dose": 0.6, "positions": "prompt"}),
        "a saved steering": (saved, {"dose": 0.8}),
        "what decides by itself": (TopActiveSource(sae, 0.7, over="context"), {}),
    }  # fmt: skip


def per_text(result: SteerResult, column: str) -> dict[tuple[int, int], dict[tuple[int, str], float]]:
    """By sample and arm, what the trace says of each edited place."""
    assert result.trace is not None
    found: dict[tuple[int, int], dict[tuple[int, str], float]] = {}
    for edit in result.trace.edits.to_pylist():
        if edit["feature"] >= 0:
            place = found.setdefault((edit["sample"], edit["branch"]), {})
            place[edit["position"], edit["site"]] = edit[column] / edit["x_norm"]
    return found


def check_equal_dose(model: LanguageModel, given: Any, options: dict[str, Any]) -> SteerResult:
    """Edit for edit: at the same places of texts of equal length, as large relative to ‖x‖; and other directions."""
    result = steer(model, given, PROMPTS, decoding=CONFIG, samples=2, controls=True, **options)
    controls = [arm for arm in result.arms if arm.control_of]
    assert [arm.control_of for arm in controls] == [arm.name for arm in result.steered]
    edits, first = per_text(result, "delta_norm"), 1 + len(result.steered)
    kind = "random" if isinstance(given, Standard) else "random directions"  # no file holds the saved one's SAE
    for number, (arm, control) in enumerate(zip(result.steered, controls, strict=True)):
        assert control.name == f"{kind}, {arm.name}"
        assert [one.n_tokens for one in control.continuations] == [one.n_tokens for one in arm.continuations]
        assert control.realised.n_edits == arm.realised.n_edits
        assert control.realised.relative == pytest.approx(arm.realised.relative, rel=0.01, abs=1e-6)
        for sample in range(6):
            of_arm, of_control = edits[sample, 1 + number], edits[sample, first + number]
            assert of_arm.keys() == of_control.keys()
            for place, relative in of_arm.items():
                assert of_control[place] == pytest.approx(relative, rel=1e-4, abs=1e-6)
    return result


KINDS = (
    "a feature", "several, in their own units", "clamped everywhere", "no dose at all", "vectors at two sites",
    "a saved steering", "what decides by itself",
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_doses_and_edits_are_equal(any_tiny: LanguageModel, sae: Standard, name: str) -> None:
    check_equal_dose(any_tiny, *directions(any_tiny, sae)[name])


def test_random_features_are_live_ones_and_not_those_under_test(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    live = set(torch.as_tensor(sae.feature_stats.live).nonzero()[:, 0].tolist())  # type: ignore[union-attr]
    result = check_equal_dose(tiny_llama, sae, {"features": 3, "sweep": (0.3, 0.9)})
    assert result.trace is not None
    rows = [row for row in result.trace.edits.to_pylist() if row["feature"] >= 0]
    drawn: dict[int, set[tuple[int, int]]] = {}
    for row in rows:
        drawn.setdefault(row["branch"], set()).add((row["sample"], row["feature"]))
    assert drawn[1] == drawn[2] == {(sample, 3) for sample in range(6)}
    assert drawn[3] == drawn[4]  # every dose has the same ones
    assert len({feature for _, feature in drawn[3]}) == 6  # each text its own
    assert {feature for _, feature in drawn[3]} <= live - {3}
    assert {row["dictionary_hash"] for row in rows} == {sae.fingerprint}
    other = steer(
        tiny_llama, sae, PROMPTS, 3, 0.3, decoding=DecodeConfig(max_new_tokens=4, temperature=1.0, seed=5),
        samples=2, controls=True,
    )  # fmt: skip
    assert other.trace is not None
    again = {(r["sample"], r["feature"]) for r in other.trace.edits.to_pylist() if r["branch"] == 2}
    assert again != drawn[3]


def test_the_arms_themselves_do_not_change(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    alone = steer(tiny_llama, sae, PROMPTS, 3, sweep=(0.3, 0.9), decoding=CONFIG, samples=2)
    beside = steer(tiny_llama, sae, PROMPTS, 3, sweep=(0.3, 0.9), decoding=CONFIG, samples=2, controls=True)
    for one, other in zip(alone.arms, beside.arms[:3], strict=True):
        assert one.continuations == other.continuations
        assert one.realised == other.realised
        assert one.kl_total == pytest.approx(other.kl_total, abs=1e-5)
    assert "fluency" not in json.dumps(alone.to_json())
    assert "control" not in json.dumps(alone.to_json())


def check_fluency(model: LanguageModel) -> SteerResult:
    """Shares and means against what texts say, by hand."""
    sae = make_dictionary(model)
    config = DecodeConfig(max_new_tokens=24, temperature=0.2, seed=4, stop_at_eos=False)
    result = steer(model, sae, PROMPTS, 3, sweep=(0.1, 3.0), decoding=config, samples=8, controls=True)
    known, trace = result.ordinary, result.trace
    assert known is not None
    assert trace is not None
    assert (known.n_own, known.n_neutral) == (24, 0)
    nll = [-np.mean(row) for row in trace.per_row("unsteered_logp")]
    repeated = [repetition(row) for row in trace.per_row("token_id")]
    assert max(repeated) > 0
    branch = np.array([row["branch"] for row in trace.facts["rows"]])
    own = [value for value, number in zip(nll, branch, strict=True) if number == 0]
    assert (known.low, known.high) == pytest.approx(tuple(np.quantile(own, [0.05, 0.95])))
    for number, arm in enumerate(result.arms):
        mine = [i for i in range(len(nll)) if branch[i] == number]
        inside = [known.low <= nll[i] <= known.high and repeated[i] <= known.repetition for i in mine]
        assert arm.fluency is not None
        assert arm.fluency.ordinary.estimate == pytest.approx(np.mean(inside))
        assert arm.fluency.nll.estimate == pytest.approx(np.mean([nll[i] for i in mine]))
        assert arm.fluency.repetition.estimate == pytest.approx(np.mean([repeated[i] for i in mine]))
        assert arm.fluency.ordinary.n == 3  # prompts, not texts
        assert arm.fluency.broken == (np.mean(inside) < 0.5)
    one = result.arms[2].continuations[5]
    place = [i for i in range(len(nll)) if branch[i] == 2][5]
    ids = trace.per_row("token_id")[place]
    prompt = model.encode_text(PROMPTS[one.prompt])
    logits = model.forward(TokenBatch.pad([prompt + ids], model.pad_id, model.device))[0].double().log_softmax(-1)
    expected = -float(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).mean())
    assert nll[place] == pytest.approx(expected, abs=1e-3)
    return result


def test_fluency_is_what_the_texts_say(tiny_llama: LanguageModel) -> None:
    check_fluency(tiny_llama)


def test_shares_of_a_few_texts_stay_shares() -> None:
    """Of one text for each of two prompts: one is ordinary, then both are."""
    ordinary = OrdinaryText(low=1.0, high=2.0, repetition=0.1, n_own=20, n_neutral=0)
    some = fluency(ordinary, [1.5, 9.0], [[1, 2, 3, 4, 5], [7] * 9], 2, seed=0)
    assert some.ordinary == wilson_interval(1, 2)
    assert (some.repetition.low, some.repetition.high, some.nll.low) == (0, 1, 0)
    every = fluency(ordinary, [1.5, 1.6], [[1, 2, 3, 4, 5], [6, 7, 8, 9]], 2, seed=0)
    assert every.ordinary.low < 0.5 < every.ordinary.high == 1


def test_the_dose_where_fluency_breaks_is_the_smallest(tiny_llama: LanguageModel) -> None:
    """Planted: a dose that leaves texts as they are, and ones that make all of them the same token."""
    token = tiny_llama.encode_text("x")[-1]
    row = tiny_llama.hf.lm_head.weight[token].detach()
    table = DirectionTable(row[None])
    config = DecodeConfig(max_new_tokens=16, temperature=1.0, seed=1, stop_at_eos=False)
    result = steer(
        tiny_llama, {"resid_post.3": table}, PROMPTS, sweep=(60.0, 0.0, 30.0), samples=8, decoding=config,
        controls=True, unit="relative",
    )  # fmt: skip
    assert [arm.fluency.broken for arm in result.steered if arm.fluency] == [True, False, True]
    assert result.breaks is not None
    assert result.breaks.name == "dose 30"
    table_text = str(result.tables()["doses"].caption)
    assert "fluency breaks at dose 30, over 3 prompts" in table_text
    back = read_typed(SteerResult, json.loads(json.dumps(result.to_json())))
    assert back == result
    assert back.breaks == result.breaks


def test_few_texts_are_put_beside_neutral_ones(tiny_llama: LanguageModel) -> None:
    sae = make_dictionary(tiny_llama)
    result = steer(tiny_llama, sae, "an inn", 3, 0.2, decoding=DecodeConfig(max_new_tokens=6), controls=True)
    assert result.ordinary is not None
    assert (result.ordinary.n_own, result.ordinary.n_neutral) == (1, 24)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.render())
    text = console.export_text()
    assert "random, dose 0.2" in text
    assert "ordinary texts" in text
    assert re.search(
        "as 25 unsteered texts are; fluency (holds|breaks at dose 0.2), over 1 prompt", " ".join(text.split())
    )


@pytest.mark.parametrize("kind", ["features", "saved features", "a saved vector"])
def test_a_run_replays(tiny_llama: LanguageModel, tmp_path: Path, kind: str) -> None:
    """Two calls, each of other batches than one call would have: bit for bit all the same."""
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    sae = make_dictionary(tiny_llama)
    sae.info = type(sae.info)(architecture="standard", site="resid_post.1")
    save_dictionary(sae, tmp_path / "sae")
    sae.name = str(tmp_path / "sae")
    what: dict[str, Any] = {"sae": str(tmp_path / "sae"), "feature": (3,), "sweep": (0.3, 0.9)}
    if kind != "features":
        source = StaticSource(sae, 3, 0.5)
        if kind == "a saved vector":
            source = StaticSource(DirectionTable(torch.ones(1, 32)), 0, 0.5, "resid_post.2")
        Steering.of(tiny_llama, source, about="three").save(tmp_path / "three")
        what = {"steering": (tmp_path / "three",), "sweep": (0.5, 1.5)}
    config = SteerConfig(
        model=str(tmp_path / "model"), prompt=PROMPTS, samples=2, temperature=0.8, max_new_tokens=9, batch_size=4,
        controls=True, run=tmp_path / "run", **what,
    )  # fmt: skip
    result = run_steer(config)
    assert isinstance(result, SteerResult)
    report = run_steer(SteerConfig(replay=tmp_path / "run"))
    assert report.exact  # type: ignore[union-attr]
    assert report.n_rows == 6 * 5  # type: ignore[union-attr]
    assert run_steer(config) == result
    page = write_report(tmp_path / "run").read_text("utf-8")
    assert ("random directions, " if kind == "a saved vector" else "random, ") in page
    assert "Ordinary texts" in page
    words = {"features": "<li>3 (", "saved features": "<li>resid_post.1:3: promotes ", "a saved vector": ""}[kind]
    assert words in page
    if kind == "saved features":
        (tmp_path / "sae").rename(tmp_path / "elsewhere")
        moved = run_steer(replace(config, run=None))
        assert isinstance(moved, SteerResult)
        assert [arm.name for arm in moved.arms[3:]] == [f"random directions, {arm.name}" for arm in moved.steered]


def test_without_kl_it_is_refused(tiny_llama: LanguageModel) -> None:
    with pytest.raises(UserError, match="controls without KL: whether texts are ordinary is read in the pass"):
        steer(tiny_llama, make_dictionary(tiny_llama), "in", 3, controls=True, kl=False)


Patch = pytest.MonkeyPatch


def dose_ignored(patch: Patch) -> None:
    real = random_arms.EqualDoseSource.__init__

    def init(self: Any, *given: Any) -> None:
        real(self, *given)
        self.relative = {site: 0.5 * each for site, each in self.relative.items()}

    patch.setattr(random_arms.EqualDoseSource, "__init__", init)
    patch.setattr(random_arms, "assert_equal_dose", lambda logs: None)


def one_place_late(patch: Patch) -> None:
    real = random_arms.EqualDoseSource.pick
    patch.setattr(
        random_arms.EqualDoseSource,
        "pick",
        lambda self, request: real(self, request._replace(position=request.position - 1)),
    )
    patch.setattr(random_arms, "assert_equal_dose", lambda logs: None)


def other_rows_doses(patch: Patch) -> None:
    real = random_arms.EqualDoseSource.__init__
    patch.setattr(
        random_arms.EqualDoseSource, "__init__",
        lambda self, pool, drawn, log, rows, positions: real(self, pool, drawn, log, rows[::-1], positions),
    )  # fmt: skip
    patch.setattr(random_arms, "assert_equal_dose", lambda logs: None)


def ends_by_itself(patch: Patch) -> None:
    real = random_arms.decode
    patch.setattr(random_arms, "decode", lambda *given, lengths, **more: real(*given, **more))
    patch.setattr(random_arms, "assert_equal_dose", lambda logs: None)


def one_sided(patch: Patch) -> None:
    real = ordinary_texts.Band.holds
    patch.setattr(ordinary_texts.Band, "holds", lambda self, nll: real(self._replace(low=-1e9), nll))


def repetition_left_out(patch: Patch) -> None:
    patch.setattr(ordinary_texts, "repetition", lambda tokens: 0.0)


def band_of_the_steered(patch: Patch) -> None:
    real = steered_module.ordinary_text
    patch.setattr(
        steered_module, "ordinary_text", lambda model, config, nll, tokens, **more: real(
            model, config, [2 * value for value in nll], tokens, **more
        )
    )  # fmt: skip


def called_features(patch: Patch) -> None:
    real = planning.pool_of

    def pool(*given: Any) -> Any:
        found = real(*given)
        for table in found.values():
            table.dictionary = table.dictionary or SimpleNamespace(W_dec=table.rows)
        return found

    patch.setattr(planning, "pool_of", pool)


def beside_vectors(model: LanguageModel) -> None:
    check_equal_dose(model, *directions(model, make_dictionary(model))["vectors at two sites"])


def of_three_doses(model: LanguageModel) -> None:
    check_equal_dose(model, make_dictionary(model), {"features": 3, "sweep": (0.3, 0.9)})


def clamped(model: LanguageModel) -> None:
    check_equal_dose(model, *directions(model, make_dictionary(model))["clamped everywhere"])


MUTATIONS: dict[str, tuple[Callable[[Patch], None], Callable[[LanguageModel], object]]] = {
    "random directions called features": (called_features, beside_vectors),
    "half the dose": (dose_ignored, of_three_doses),
    "one place late": (one_place_late, clamped),
    "another text's doses": (other_rows_doses, of_three_doses),
    "controls end by themselves": (ends_by_itself, of_three_doses),
    "a band of one side": (one_sided, check_fluency),
    "repetition left out": (repetition_left_out, check_fluency),
    "a band of other texts": (band_of_the_steered, check_fluency),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name: str, tiny_llama: LanguageModel, monkeypatch: Patch) -> None:
    mutate, check = MUTATIONS[name]
    mutate(monkeypatch)
    with pytest.raises((AssertionError, KeyError, UserError)):
        check(tiny_llama)


def test_what_is_used_although_it_is_off_is_recorded_and_replays(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutations: the run does not say so; a replay loads the model without it."""
    found = Capabilities(off={"decode": "it is tired"}, differs={"decode": 0.25})
    monkeypatch.setattr(LanguageModel, "check", staticmethod(lambda _model: found))
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    Steering.of(tiny_llama, StaticSource(DirectionTable(torch.ones(1, 32)), 0, 0.5, "resid_post.2")).save(
        tmp_path / "ones"
    )
    words = ["steer", "Once", "--model", str(tmp_path / "model"), "--with", str(tmp_path / "ones")]
    words += ["--run", str(tmp_path / "run")]
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "it is tired (by 25 %); use another model, or allow decode (--allow decode" in capsys.readouterr().err
    assert cli.main([*words, "--allow", "decode"]) == 0
    assert "note: decode is used with" in capsys.readouterr().err
    assert read_record(tmp_path / "run")["config"]["allow"] == ["decode"]
    assert cli.main(["steer", "--replay", str(tmp_path / "run")]) == 0

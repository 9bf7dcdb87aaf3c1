"""The demo on a tiny model into which one feature that really controls the text is planted."""

from __future__ import annotations

import copy
import html
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.dictionaries import DictionaryInfo, FeatureStatsAccumulator, Standard, save_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.report import write_report
from trimtab.studies import DemoConfig, DemoResult, demo, run_demo, texts

SITE = "resid_post.1"
PLANTED = 7
TOKEN = "Z"

PROMPTS = {
    "validation": ["the cat and", "in the end", "once there", "a small dog"],
    "held_out": ["when they came", "the other one", "it was late", "on the hill", "and then she", "nobody knew"],
}


def planted_model(tiny: LanguageModel) -> tuple[LanguageModel, torch.Tensor]:
    """A model whose residual, moved along a direction, makes it write one token, which in turn shows the direction."""
    hf = copy.deepcopy(tiny.hf)
    draw = torch.Generator().manual_seed(5)
    u = torch.randn(32, generator=draw)
    u /= u.norm()
    token = tiny.tokenizer(TOKEN)["input_ids"][0]
    with torch.no_grad():
        typical = hf.model.embed_tokens.weight.norm(dim=1).median()
        hf.model.embed_tokens.weight[token] = 6 * typical * u
        head = hf.lm_head.weight
        head -= (head @ u)[:, None] * u
        head[token] = 3 * u
    return LanguageModel.from_hf(hf, tiny.tokenizer, "planted"), u


def planted_sae(model: LanguageModel, u: torch.Tensor) -> Standard:
    """24 features that fire on about a tenth of random text; one of them is the planted direction."""
    draw = torch.Generator().manual_seed(6)
    W_dec = torch.randn(24, 32, generator=draw)
    W_dec -= (W_dec @ u)[:, None] * u
    W_dec[PLANTED] = u
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    ids = torch.randint(6, 110, (16, 40), generator=draw)
    ids[:, ::10] = model.tokenizer(TOKEN)["input_ids"][0]
    x = model.hf(ids, output_hidden_states=True).hidden_states[2][:, 1:].flatten(0, 1)
    codes = x @ W_dec.T
    sae = Standard(
        W_enc=W_dec.T.clone(),
        b_enc=-codes.quantile(0.9, dim=0),
        W_dec=W_dec,
        b_dec=torch.zeros(32),
        info=DictionaryInfo(architecture="standard", site=SITE),
    )
    stats = FeatureStatsAccumulator(sae.decoder_norms)
    stats.update(sae.encode(x))
    sae.feature_stats = stats.result()
    return sae


@pytest.fixture(scope="module")
def files(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the planted model, its SAE and prompts."""
    folder = tmp_path_factory.mktemp("demo")
    model, u = planted_model(tiny_llama)
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    save_dictionary(planted_sae(model, u), folder / "sae")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return folder


def config_of(files: Path, run: Path) -> DemoConfig:
    return DemoConfig(
        model=str(files / "model"),
        sae=str(files / "sae"),
        prompts=files / "prompts.json",
        run=run,
        dose=(0.8,),
        n_candidates=3,
        size=(2, 1),
        prompts_per_feature=4,
        random_draws=2,
        max_new_tokens=8,
        batch_size=32,
        temperature=1.0,
        top_p=1.0,
    )


@pytest.fixture(scope="module")
def done(files: Path) -> DemoResult:
    """One whole run."""
    return run_demo(config_of(files, files / "run"))


def test_planted_feature_is_found_chosen_and_beats_random(done: DemoResult):
    results = done.results
    assert results["chosen"]["delta-confidence"]["size"] == 1
    assert [f["feature"] for f in results["features"]["delta-confidence"]] == [PLANTED]
    assert done.passed
    assert done.verdict.startswith("Yes")
    difference = next(d for d in results["differences"] if d["arm"] == "random")
    assert difference["interval"]["low"] > 0.2
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert arms["delta-confidence"]["score"]["estimate"] > 0.5
    assert abs(arms["random"]["score"]["estimate"]) < 0.15


def test_arms_have_equal_doses_and_edits(done: DemoResult):
    steered = [arm for arm in done.results["arms"] if arm["name"] != "unsteered"]
    assert {arm["name"] for arm in steered} == {
        "delta-confidence",
        "output-score",
        "chosen-random",
        "random",
        "most-active",
    }
    for arm in steered:
        assert arm["relative_dose"] == pytest.approx(0.8, rel=1e-3)
        assert arm["n_edits"] == 6 * 2 * 8  # prompts, samples, tokens
        assert arm["score"]["n"] == 6  # prompts are the unit
    unsteered = done.results["arms"][0]
    assert (unsteered["name"], unsteered["n_edits"], unsteered["relative_dose"]) == ("unsteered", 0, 0)


def test_score_is_what_a_plain_reading_of_the_texts_gives(done: DemoResult, files: Path, tiny_llama: LanguageModel):
    """Recomputed from the written texts with Hugging Face alone."""
    model, u = planted_model(tiny_llama)
    sae = planted_sae(model, u)

    def rate(ids: list[int], prompt: str, feature: int) -> float:
        prompt_ids = model.tokenizer(prompt)["input_ids"]
        whole = torch.tensor([[*prompt_ids, *ids]])
        x = model.hf(whole, output_hidden_states=True).hidden_states[2][0, len(prompt_ids) :]
        code = x @ sae.W_enc[:, feature] + sae.b_enc[feature]
        return float((code > 0).double().mean())

    steered = texts.read_texts(done.run / "held_out-delta-confidence.parquet")
    unsteered = texts.read_texts(done.run / "held_out-unsteered.parquet")
    by_prompt = []
    for p, prompt in enumerate(PROMPTS["held_out"]):
        base = np.mean([rate(ids, prompt, PLANTED) for ids in unsteered.token_ids[unsteered.prompt == p]])
        found = [rate(ids, prompt, PLANTED) for ids in steered.token_ids[steered.prompt == p]]
        by_prompt.append(np.mean(found) - base)
    arm = next(a for a in done.results["arms"] if a["name"] == "delta-confidence")
    assert arm["score"]["estimate"] == pytest.approx(np.mean(by_prompt), abs=1e-9)


def test_nothing_steered_means_no(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Mutation: edits are logged as usual, but never reach the residual stream while text is written."""
    real = texts.decode

    def forgetful(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr("trimtab.lm.taps.apply_rows", lambda x, change: x)
            return real(*args, **kwargs)

    monkeypatch.setattr(texts, "decode", forgetful)
    result = run_demo(config_of(files, tmp_path / "run"))
    assert not result.passed
    assert result.verdict.startswith("No")
    assert all(arm["score"]["estimate"] == 0 for arm in result.results["arms"] if arm["score"])


def test_being_pushed_along_a_direction_is_not_a_score(done: DemoResult):
    """Random features fire while they are added; the unedited model must not find them for that."""
    unsteered = texts.read_texts(done.run / "held_out-unsteered.parquet")
    assert not np.stack(unsteered.fired).any()
    assert (unsteered.n_edits == 0).all()
    random = texts.read_texts(done.run / "held_out-random-1.parquet")
    assert random.rate.mean() < 0.5


def test_wrong_dose_is_no_result(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = texts.StaticSource
    monkeypatch.setattr(texts, "StaticSource", lambda d, f, dose, *a, **k: real(d, f, dose * (f % 3 + 1), *a, **k))
    with pytest.raises(RuntimeError, match=r"the ‖Δ‖/‖x‖ of .* not 0.8"):
        run_demo(config_of(files, tmp_path / "run"))


def test_its_page_shows_what_it_found(done: DemoResult) -> None:
    page = write_report(done.run).read_text(encoding="utf-8")
    assert f">{html.escape(done.verdict)}<" in page
    assert f'class="verdict {"yes" if done.passed else "no"}"' in page
    for arm in done.results["arms"]:
        for name, form in (("score", "+.1f"), ("in_band", ".0f"), ("repetition", ".1f")):
            if arm[name] is not None:
                estimate, low, high = (format(100 * arm[name][key], form) for key in ("estimate", "low", "high"))
                assert f'<b>{estimate}</b> <span class="interval">[{low}, {high}]'.replace("-", "−") in page.replace(
                    "&#43;", "+"
                )
    for example in done.results["examples"]["rows"]:
        text = example["delta-confidence"]
        fired = [token for token, fired in zip(text["tokens"], text["fired"], strict=True) if fired]
        assert all(f"<mark>{html.escape(token)}</mark>" in page or token == text["tokens"][0] for token in fired)
        assert page.count(html.escape(example["prompt"])) >= 1
    assert page.count("<mark>") == sum(
        sum(example[name]["fired"])
        for example in done.results["examples"]["rows"]
        for name in ("delta-confidence", "output-score", "random-1")
    )
    for features in done.results["features"].values():
        for feature in features:
            assert f'<th scope="row" class="words">{feature["feature"]}</th>' in page


def test_the_first_sentence_names_the_best_control(done: DemoResult) -> None:
    others = [d for d in done.results["differences"] if d["arm"] != "random"]
    best = min(others, key=lambda d: d["interval"]["estimate"])
    label = next(arm["label"] for arm in done.results["arms"] if arm["name"] == best["arm"])
    first = done.verdict.partition(". ")[0]
    assert f"“{label}” ({100 * best['interval']['estimate']:+.1f} points), the best control".replace("-", "−") in first


def test_second_time_it_says_that_it_is_done(done: DemoResult, files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DemoConfig, "load", None)
    again = run_demo(config_of(files, files / "run"))
    assert again.resumed
    assert again.results == done.results
    assert "done before" in again.render()
    assert str(files / "run") in again.render()


def test_killed_run_goes_on_at_its_stage(
    done: DemoResult, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, calls = demo.write_texts, []

    def dies_at_the_fourth(*args, **kwargs):
        calls.append(args[4][0].arm)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(demo, "write_texts", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_demo(config_of(files, tmp_path / "run"))
    assert calls == ["unsteered", "up", "unsteered", "delta-confidence"]
    monkeypatch.setattr(demo, "rank_by", None)
    calls += ["killed"]
    result = run_demo(config_of(files, tmp_path / "run"))
    assert calls[4:] == [
        "killed",
        "delta-confidence",
        "output-score",
        "chosen-random",
        "random-1",
        "random-2",
        "most-active",
    ]
    assert result.results == done.results


def test_changed_config_says_which_field(done: DemoResult, files: Path):
    with pytest.raises(UserError, match=r"max_new_tokens was 8 and is now 9"):
        run_demo(replace(config_of(files, files / "run"), max_new_tokens=9))


def test_opening_of_the_held_out_prompts_is_recorded(done: DemoResult):
    record = json.loads((done.run / "run.json").read_text())
    assert [opening["split"] for opening in record["test_split_openings"]] == ["held_out"]
    assert len(record["splits"]["held_out"]) == 6
    assert record["status"] == "done"


def test_shipped_prompts_are_apart():
    prompts = demo.read_neutral_prompts(None)
    assert (len(prompts["validation"]), len(prompts["held_out"])) == (24, 48)
    assert not set(prompts["validation"]) & set(prompts["held_out"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as two lists of prompts"),
        ('{"validation": ["a"]}', "not readable as two lists of prompts"),
        ('{"validation": ["a"], "held_out": []}', "held_out must be a list of texts"),
        ('{"validation": ["a", "b"], "held_out": ["b"]}', "prompt 'b': it occurs twice"),
        ('{"validation": ["a", "b"], "held_out": ["c"]}', "held_out has one text"),
    ],
)
def test_bad_prompts_say_so(tmp_path: Path, content: str, message: str):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(UserError, match=message):
        demo.read_neutral_prompts(tmp_path / "prompts.json")


@pytest.mark.parametrize(
    "change", [{"dose": ()}, {"dose": (-0.1,)}, {"size": (0,)}, {"samples": 0}, {"n_candidates": 2}]
)
def test_bad_sizes_say_so(change: dict):
    with pytest.raises(UserError, match=next(iter(change))):
        DemoConfig(**change)


def test_random_features_differ_from_text_to_text(done: DemoResult):
    texts_of_draw = texts.read_texts(done.run / "held_out-random-1.parquet")
    assert len(np.unique(texts_of_draw.feature)) == len(texts_of_draw)
    chosen = {f["feature"] for features in done.results["features"].values() for f in features}
    assert not chosen & set(texts_of_draw.feature.tolist())

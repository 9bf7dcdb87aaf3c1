"""Supervised codes as dictionaries: what reads their values, what they rebuild, and every command that takes them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from circuit_prompts import few_names
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from trimtab import cli, steer
from trimtab.dictionaries import FeatureStats, Standard, Supervised, load_dictionary, save_dictionary
from trimtab.errors import UserError
from trimtab.evaluation.circuits.patched_runs import Location, head_location
from trimtab.evaluation.supervised import FITS, Factors, activations_of, build_codes, save_codes
from trimtab.evaluation.supervised.dictionary_files import load_dictionaries
from trimtab.evaluation.supervised.reading import discriminant_scores, read_accuracy
from trimtab.evaluation.supervised.saved_codes import dictionary_of
from trimtab.evaluation.supervised.task_saes import train_task_saes
from trimtab.lm import LanguageModel, Site

IOI = few_names()
TRAIN, TEST = IOI.prompts(150), IOI.prompts(40, "test")
KINDS = ("resid_post", "attn_z", "attn_q", "attn_k", "attn_v")


def places_of(model: LanguageModel) -> dict[str, Location]:
    heads = {kind: head_location(model, kind, 2, 1, "END") for kind in KINDS[1:]}
    return {"resid_post": Location(Site("resid_post", 2), "END"), **heads}


def built_codes(model: LanguageModel, places: list[Location], **how: Any) -> dict[Location, Supervised]:
    x, held = (activations_of(model, IOI, prompts, places) for prompts in (TRAIN, TEST))
    return build_codes(model, x, TRAIN, held, TEST, **how)


def additive(factors: Factors, rows: torch.Tensor, noise: float, seed: int = 0) -> torch.Tensor:
    """Sums of a vector for each value, far apart, with noise that is correlated between dimensions."""
    vectors = 3 * torch.randn(len(factors.names), 24, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(8)) / 5
    return vectors[rows].sum(1) + noise * torch.randn(len(rows), 24, generator=generator) @ mix


def test_scores_are_those_of_linear_discriminant_analysis() -> None:
    """Factor by factor as scikit-learn, given the same shrinkage of the same covariance."""
    factors = Factors.of(TRAIN)
    rows = factors.rows(TRAIN)
    x = additive(factors, rows, noise=1.5)
    mean = x.mean(0)
    found = discriminant_scores(x, mean, factors, rows)
    new = additive(factors, rows, noise=4.0, seed=1)
    scores = (new - mean).double() @ found.W + found.b
    start = 0
    for factor, values in enumerate(factors.values):
        own = rows[:, factor].numpy()
        left = np.concatenate([x.numpy()[own == value] - x.numpy()[own == value].mean(0) for value in np.unique(own)])
        shrinkage = ledoit_wolf(left.astype(np.float64), assume_centered=True)[1]
        oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.double().numpy(), own)
        mine = scores[:, start : start + len(values)]
        read = mine.argmax(1).numpy() + start
        assert (read == oracle.predict(new.double().numpy())).all()
        assert 0.2 < (read == own).mean() < 1  # otherwise the agreement would say little
        if len(values) > 2:  # for two values it gives their difference
            theirs = oracle.decision_function(new.double().numpy())
            difference = mine.numpy() - theirs  # the same for all values of a row
            least = 1e-4 * np.ptp(theirs)  # the least variance that is added
            np.testing.assert_allclose(difference, difference[:, :1].repeat(len(values), 1), atol=least)
        start += len(values)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("parametrisation", ["independent", "coupled", "names"])
def test_where_values_are_read_right_it_rebuilds_what_the_codes_do(fit: str, parametrisation: Any) -> None:
    factors = Factors.of(TRAIN, parametrisation)
    rows = factors.rows(TRAIN)
    x = additive(factors, rows, noise=0.3)
    codes = FITS[fit](x, factors, rows)
    sae = dictionary_of(x, factors, rows, codes)
    right = (sae.read(x) == rows).all(1)
    assert right.double().mean() > 0.9
    torch.testing.assert_close(sae(x)[right], codes.reconstruct(rows)[right], atol=1e-4, rtol=1e-4)
    assert sae.feature_names == tuple(factors.names)
    torch.testing.assert_close(sae.decoder_norms, torch.ones(len(factors.names)))
    torch.testing.assert_close(sae.size, codes.vectors.norm(dim=1))
    assert sae.feature_stats is not None
    assert sae.feature_stats.n_tokens == len(TRAIN)
    accuracy = read_accuracy(sae.read(x), rows, factors)
    for factor, (name, value) in enumerate(accuracy.items()):
        assert name == ",".join(factors.factors[factor])
        assert value.estimate == pytest.approx(float((sae.read(x)[:, factor] == rows[:, factor]).double().mean()))
        assert (value.n, value.method) == (len(TRAIN), "wilson")


def test_a_factor_that_varies_much_does_not_hide_the_others() -> None:
    """More values than dimensions; mostly the likeliest values of all factors together, which trying all finds, too."""
    factors = Factors.of(TRAIN)
    rows = factors.rows(TRAIN)
    vectors = torch.randn(len(factors.names), 6, generator=torch.Generator().manual_seed(7))
    vectors[: len(factors.values[0])] *= 10
    x = vectors[rows].sum(1) + 0.1 * torch.randn(len(rows), 6, generator=torch.Generator().manual_seed(8))
    codes = FITS["mse"](x, factors, rows)
    sae = dictionary_of(x, factors, rows, codes)
    alone = (x - codes.mean) @ sae.W_enc + sae.b_enc
    n = len(factors.values[0])
    S = slice(n, n + len(factors.values[1]))
    assert float((alone[:, S].argmax(1) + n == rows[:, 1]).double().mean()) < 0.5
    assert (sae.read(x) == rows).double().mean(0).min() > 0.8
    left = (x - codes.mean).double() - codes.vectors[rows].sum(1)
    inverse = torch.linalg.inv(torch.from_numpy(ledoit_wolf(left.double().numpy(), assume_centered=True)[0]))
    sizes = [len(values) for values in factors.values]
    every = torch.cartesian_prod(*(torch.arange(s) + sum(sizes[:i]) for i, s in enumerate(sizes)))
    rest = (x - codes.mean).double()[:, None] - codes.vectors.double()[every].sum(1)
    likeliest = every[torch.einsum("pcd,de,pce->pc", rest, inverse, rest).argmin(1)]
    assert float((sae.read(x) == likeliest).all(1).double().mean()) > 0.8


def test_activations_of_few_dimensions_are_read() -> None:
    """No noise at all, as in a model that was built by hand: the covariance has directions of no variance."""
    factors = Factors.of(TRAIN)
    rows = factors.rows(TRAIN)[:, :1]
    only = Factors(factors.factors[:1], factors.values[:1])
    x = torch.eye(len(only.names), 32)[rows[:, 0]]
    sae = dictionary_of(x, only, rows, FITS["mean"](x, only, rows))
    assert torch.equal(sae.read(x), rows)
    torch.testing.assert_close(sae(x), x, atol=1e-5, rtol=1e-5)


def test_built_saved_and_loaded(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    places = list(places_of(tiny_llama).values())
    done: list[int] = []
    built = built_codes(tiny_llama, places, fit="mean", parametrisation="coupled", progress=done.append)
    assert sum(done) == len(places)
    for place, path in save_codes(built, tmp_path / "codes").items():
        made, loaded = built[place], load_dictionary(path, model=tiny_llama)
        assert path.name == f"{place.site}-END"
        assert isinstance(loaded, Supervised)
        assert all(torch.equal(getattr(loaded, name), getattr(made, name)) for name in made.shapes)
        assert (loaded.info.model, loaded.info.site) == ("tiny-llama", str(place.site))
        told = loaded.info.metadata
        assert (told["position"], told["fit"], told["parametrisation"]) == ("END", "mean", "coupled")
        assert told["model_fingerprint"] == tiny_llama.fingerprint
        assert told["read_accuracy"].keys() == {"IO,Pos", "S,Pos"}
        assert all(value["n"] == len(TEST) for value in told["read_accuracy"].values())
        assert loaded.feature_names[0].startswith("IO,Pos=")
        assert loaded.feature_stats is not None
        assert made.feature_stats is not None
        assert loaded.feature_stats.to_table().equals(made.feature_stats.to_table(), check_metadata=True)
    with pytest.raises(UserError, match=r"fit 'least': allowed are mean, mse"):
        built_codes(tiny_llama, places, fit="least")
    with pytest.raises(UserError, match=r"parametrisation 'own': allowed are independent, coupled, names"):
        built_codes(tiny_llama, places, parametrisation="own")
    x = activations_of(tiny_llama, IOI, TRAIN[:4], places)
    with pytest.raises(UserError, match=r"value .*=.*: it has no code; fit the codes on prompts that have it"):
        build_codes(tiny_llama, x, TRAIN[:4], activations_of(tiny_llama, IOI, TEST, places), TEST)


@pytest.fixture(scope="module")
def on_disk(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, codes at a site of each kind, and a text."""
    folder = tmp_path_factory.mktemp("codes")
    tiny_llama.hf.save_pretrained(folder / "tiny-llama")
    tiny_llama.tokenizer.save_pretrained(folder / "tiny-llama")
    save_codes(built_codes(tiny_llama, list(places_of(tiny_llama).values())), folder / "codes")
    (folder / "text.txt").write_text("the cat and the dog ran into the inn.\n\n" * 40)
    return folder


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_them(
    tiny_llama: LanguageModel, on_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """With features by their names, at a residual site and at what an attention head reads or gives."""
    place = places_of(tiny_llama)[kind]
    sae, model = on_disk / "codes" / f"{place.site}-END", on_disk / "tiny-llama"
    names = load_dictionary(sae).feature_names
    feature = names.index("IO=Mary") if "IO=Mary" in names else 2

    assert run("sae", "info", sae) == 0
    said = capsys.readouterr().out
    assert f"0 {names[0]}, 1 {names[1]}" in said
    assert f"of {len(TEST)} held-out prompts" in said

    ranked = ("rank", "--model", model, "--sae", sae, "--run", tmp_path / "rank", "--limit", 3)
    assert run(*ranked) == 0
    said = capsys.readouterr().out
    assert "meaning" in said
    assert run(*ranked, "--json") == 0  # from the table on disk
    top = json.loads(capsys.readouterr().out)["criteria"]["delta-confidence"]["top"]
    assert [row["meaning"] for row in top] == [names[row["feature"]] for row in top]
    assert all(bool(row["top_tokens"]) == (kind == "resid_post") for row in top)
    table = pq.read_table(tmp_path / "rank" / "features.parquet").to_pylist()
    assert all(row["meaning"] == names[row["feature"]] for row in table)
    assert run("report", tmp_path / "rank") == 0
    assert top[0]["meaning"] in (tmp_path / "rank" / "report.html").read_text()
    capsys.readouterr()

    steered = ("steer", "the cat", "--model", model, "--sae", sae, "--max-new-tokens", 4, "--dose", 2)
    assert run(*steered, "--feature-name", names[feature], "--json", "--run", tmp_path / "steer") == 0
    by_name = json.loads(capsys.readouterr().out)
    assert by_name["features"] == [feature]
    assert by_name["steered_with"] == f"feature {feature} ({names[feature]})"
    assert run(*steered, "--feature", feature, "--json") == 0
    assert json.loads(capsys.readouterr().out)["arms"] == by_name["arms"]
    assert by_name["arms"][1]["realised"]["n_edits"] == 4
    assert json.loads((tmp_path / "steer" / "run.json").read_text())["features"] == {str(feature): [names[feature]]}
    assert run("steer", "--replay", tmp_path / "steer", "--json") == 0
    capsys.readouterr()

    text = ("--model", model, "--sae", sae, "--text", on_disk / "text.txt", "--context", 32)
    assert run("evaluate", "core", *text, "--json") == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["l0"]["estimate"] == pytest.approx(3)
    assert run("sae", "stats", sae, *text[:2], *text[4:], "--into", tmp_path) == 0
    stats = FeatureStats.read(tmp_path / "feature_stats.parquet", n_features=len(names))
    assert stats.firing_rate.sum() == pytest.approx(3)
    capsys.readouterr()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["accumulated", "top-confidence"])
def test_a_policy_steers_with_them(
    tiny_llama: LanguageModel,
    on_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    mask: str,
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "policies"), *sys.path])
    sae = on_disk / "codes" / f"{places_of(tiny_llama)[kind].site}-END"
    words = [
        "policy", "train", "--model", on_disk / "tiny-llama", "--sae", sae, "--task", "first_letter:FirstLetter",
        "--run", tmp_path / "run", "--options-only", "--iterations", 1, "--items-per-iteration", 4, "--hidden", 8,
        "--validate-every", 1, "--mask", mask, "--mask-features", 5, "--headroom-items", 0,
    ]  # fmt: skip
    assert run(*words) == 0
    assert "validation reward" in capsys.readouterr().out


def test_names_in_python_and_what_is_refused(
    tiny_llama: LanguageModel, on_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = load_dictionary(on_disk / "codes" / "attn_z.2.1-END")
    name = codes.feature_names[1]
    by_name = steer(tiny_llama, codes, "the cat", [name, 3], dose=2.0, max_new_tokens=3)
    assert by_name.features == [1, 3]
    assert by_name.arms == steer(tiny_llama, codes, "the cat", [1, 3], dose=2.0, max_new_tokens=3).arms
    assert f"add feature 1 ({name}), 3 ({codes.feature_names[3]}) at attn_z.2.1" in by_name.headline()
    with pytest.raises(UserError, match=r"feature 'IO=Mari': no feature means that; did you mean IO="):
        steer(tiny_llama, codes, "the cat", "IO=Mari")
    words = ("--model", on_disk / "tiny-llama", "--sae", on_disk / "codes" / "attn_z.2.1-END")
    assert run("steer", "the cat", *words, "--feature-name", "Pos=ABBA") == 2
    assert "feature 'Pos=ABBA': no feature means that; did you mean Pos=ABB?" in capsys.readouterr().err
    assert run("rank", *words, "--criterion", "output-score") == 2
    said = "features of width 8: the logit lens reads rows of the residual stream, of width 32; rank them by delta-conf"
    assert said in capsys.readouterr().err
    assert run("rank", *words, "--site", "attn_z.2") == 2
    assert "dictionary of width 8" in capsys.readouterr().err
    wide = Standard(torch.ones(32, 3), torch.zeros(3), torch.ones(3, 32), torch.zeros(32))
    with pytest.raises(UserError, match="the dictionary does not say what its features mean; give its number"):
        steer(tiny_llama, wide, "the cat", "IO=Mary", site="resid_post.1")


def test_contenders_of_saved_codes_and_of_a_bank(tiny_llama: LanguageModel, on_disk: Path, tmp_path: Path) -> None:
    places = (
        head_location(tiny_llama, "attn_z", 2, 1, "END"), head_location(tiny_llama, "attn_k", 3, 0, "IO"),
        head_location(tiny_llama, "attn_k", 3, 0, "S1+1"),
    )  # fmt: skip
    rows = activations_of(tiny_llama, IOI, TRAIN, places)
    bank = tmp_path / "bank"
    trained = train_task_saes(tiny_llama, rows, rows, bank, l0=(1.0, 2.0), n_features=(16,), epochs=1)
    found = load_dictionaries([bank, on_disk / "codes"], tiny_llama, places)
    assert sorted(found.dictionaries) == ["codes", "topk-n16-l0_1-seed0", "topk-n16-l0_2-seed0"]
    for name, of in trained.items():
        assert {place: sae.fingerprint for place, sae in of.items()} == {
            place: sae.fingerprint for place, sae in found.dictionaries[name].items()
        }
        assert found.missing(name, places) == ()
    assert [*found.dictionaries["codes"]] == [places[0]]
    assert found.missing("codes", places) == places[1:]
    assert sorted(Path(path).name for path in found.unused) == [
        "attn_k.2.0-END", "attn_q.2.1-END", "attn_v.2.0-END", "resid_post.2-END",
    ]  # fmt: skip
    members = sorted((bank / "members").glob("*l0_1*"))
    one_by_one = load_dictionaries([path / "sae" for path in members], tiny_llama, places)
    assert [*one_by_one.dictionaries] == ["topk-n16-l0_1-seed0"]
    assert one_by_one.missing("topk-n16-l0_1-seed0", places) == ()
    other = tmp_path / "other"
    train_task_saes(tiny_llama, rows, rows, other, l0=(1.0,), n_features=(16,), epochs=2)
    both = load_dictionaries([bank, other], tiny_llama, places).dictionaries
    assert sorted(both) == ["bank/topk-n16-l0_1-seed0", "other/topk-n16-l0_1-seed0", "topk-n16-l0_2-seed0"]
    with pytest.raises(UserError, match=r"dictionary .*attn_k.3.0-IO-.*: .* is for attn_k.3.0 at IO of .*, too; give"):
        load_dictionaries([bank, bank], tiny_llama, places)


def test_a_dictionary_without_a_position_serves_every_location_of_its_site(
    tiny_llama: LanguageModel, on_disk: Path, tmp_path: Path
) -> None:
    places = tuple(head_location(tiny_llama, "attn_k", 2, 1, position) for position in ("IO", "S1"))
    other = head_location(tiny_llama, "attn_z", 2, 1, "END")
    codes = load_dictionary(on_disk / "codes" / "attn_k.2.0-END")
    with pytest.raises(UserError, match=r"attn_k.2.0-END: it reads attn_k.2.0 at END; give one for attn_k.2.0 at IO, "):
        load_dictionaries([on_disk / "codes" / "attn_k.2.0-END"], tiny_llama, places)
    anywhere = {name: value for name, value in codes.info.metadata.items() if name != "position"}
    codes.info = replace(codes.info, metadata=anywhere)
    save_dictionary(codes, tmp_path / "general")
    found = load_dictionaries([tmp_path / "general"], tiny_llama, (*places, other))
    assert {name: [*of] for name, of in found.dictionaries.items()} == {"general": [*places]}
    assert found.missing("general", (*places, other)) == (other,)


def test_dictionaries_that_fit_no_location_are_refused_by_name(
    tiny_llama: LanguageModel, tiny_gemma3: LanguageModel, on_disk: Path, tmp_path: Path
) -> None:
    place = places_of(tiny_llama)["attn_z"]
    codes = on_disk / "codes" / "attn_z.2.1-END"
    elsewhere = (place._replace(site=Site("attn_z", 3, 1)),)
    with pytest.raises(UserError, match=r"attn_z.2.1-END: it reads attn_z.2.1 at END; give one for attn_z.3.1 at END"):
        load_dictionaries([codes], tiny_llama, elsewhere)
    message = r"dictionaries in .*codes: it reads .* at END \(and 4 others\); give one for attn_z.3.1 at END"
    with pytest.raises(UserError, match=message):
        load_dictionaries([on_disk / "codes"], tiny_llama, elsewhere)
    with pytest.raises(UserError, match=r"^dictionary .*2.1-END: dictionary of width 8: tiny-gemma3 has width 16"):
        load_dictionaries([codes], tiny_gemma3, (place,))
    made = load_dictionary(codes)
    made.info = replace(made.info, model="another", metadata={**made.info.metadata, "model_fingerprint": "0"})
    path = save_dictionary(made, tmp_path / "another")
    with pytest.raises(UserError, match=r"^dictionary .*another: dictionary trained on another: the model is"):
        load_dictionaries([path], tiny_llama, (place,))
    assert [*load_dictionaries([path], tiny_llama, (place,), any_model=True).dictionaries] == ["another"]
    made.info = replace(made.info, model="tiny-llama", site="")
    path = save_dictionary(made, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere: .*"):
        load_dictionaries([path], tiny_llama, (place,))
    with pytest.raises(UserError, match=r"dictionary '.*none': there is no such directory"):
        load_dictionaries([tmp_path / "none"], tiny_llama, (place,))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty"):
        load_dictionaries([tmp_path / "empty"], tiny_llama, (place,))

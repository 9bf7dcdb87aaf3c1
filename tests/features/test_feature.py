"""All about a feature against final norm, head, cosines and steering by hand; the page and the links to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_dictionary import make_dictionary

import trimtab
from trimtab import cli
from trimtab.activations import Document
from trimtab.dictionaries import Standard, load_dictionary, save_dictionary
from trimtab.dictionaries.meanings import describe_features
from trimtab.errors import UserError
from trimtab.features import FeatureConfig, FeatureProfile, FeatureProfiles, examples, feature, run_feature
from trimtab.features import profile as profile_module
from trimtab.features.command import features_by_site
from trimtab.features.examples_command import examples_file
from trimtab.lm import LanguageModel
from trimtab.report import write_report
from trimtab.runs import json_safe, read_typed

READ = {"top": 3, "weighted": 2, "random": 2, "window": 6, "context": 16, "batch_size": 4}
SHORT = {"max_new_tokens": 4, "prompt": ("the sea", "an inn"), "dose": (0.3, -0.3)}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: LanguageModel, sae: Standard, documents: list[Document]
) -> Path:
    """The SAE on disk, with statistics and examples."""
    path = save_dictionary(sae, tmp_path_factory.mktemp("saes") / "sae")
    examples(tiny_llama, load_dictionary(path), documents, **READ).write(path / "feature_examples.parquet")
    return path


@pytest.fixture
def loaded(place: Path) -> Any:
    return load_dictionary(place)


def live(sae: Standard) -> int:
    assert sae.feature_examples is not None
    return int(sae.feature_examples.live[3])


def by_hand(model: LanguageModel, row: torch.Tensor, count: int) -> list[tuple[str, float]]:
    """Likeliest tokens of final norm and head, from the transformers model itself."""
    logits = model.hf.lm_head(model.hf.model.norm(row[None]))[0]
    values, ids = logits.softmax(-1).sort(descending=True)
    size = len(model.tokenizer)  # the model has rows for more
    texts = [model.tokenizer.decode([i]) if i < size else f"<no token {i}>" for i in ids[:count].tolist()]
    return list(zip(texts, values.tolist(), strict=False))


def check_profile(model: LanguageModel, sae: Any) -> None:
    """A profile is what its parts say by themselves."""
    one = live(sae)
    found = feature(model, sae, one, tokens=5, neighbours=4, **SHORT)
    for mine, row in ((found.promoted, sae.W_dec[one]), (found.suppressed, -sae.W_dec[one])):
        theirs = by_hand(model, row, 5)
        assert [token.token for token in mine] == [text for text, _ in theirs]
        assert [token.probability for token in mine] == pytest.approx([p for _, p in theirs], rel=1e-4)
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    cosine = (rows @ rows[one]).tolist()
    order = sorted((i for i in range(sae.n_features) if i != one), key=lambda i: -cosine[i])[:4]
    assert [other.feature for other in found.neighbours] == order
    assert [other.cosine for other in found.neighbours] == pytest.approx([cosine[i] for i in order], abs=1e-5)
    assert found.windows == sae.feature_examples[one].windows
    assert found.firing_rate == sae.feature_stats.firing_rate[one]
    for effect in found.effects:
        alone = trimtab.steer(model, sae, effect.prompt, one, effect.dose, max_new_tokens=4)
        assert effect.unsteered == alone.unsteered.continuations[0].text
        assert effect.steered == alone.steered[0].continuations[0].text
        assert effect.kl == pytest.approx(alone.steered[0].kl_total, abs=1e-5)
        assert effect.kl != 0
    assert [(effect.prompt, effect.dose) for effect in found.effects] == [
        ("the sea", 0.3), ("the sea", -0.3), ("an inn", 0.3), ("an inn", -0.3),
    ]  # fmt: skip


def test_a_profile_is_what_its_parts_say(tiny_llama: LanguageModel, loaded: Any) -> None:
    check_profile(tiny_llama, loaded)


@pytest.mark.parametrize("wrong", ["own neighbour", "suppressed as promoted", "doses in another order"])
def test_mistakes_are_seen(wrong: str, tiny_llama: LanguageModel, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "own neighbour":
        monkeypatch.setattr(Standard, "directions", property(lambda sae: sae.W_dec.detach()))
    elif wrong == "suppressed as promoted":
        real = profile_module._lens
        monkeypatch.setattr(profile_module, "_lens", lambda m, s, row, n: real(m, s, row * row.sum().sign(), n))
    else:
        steer = profile_module.steer
        monkeypatch.setattr(
            profile_module, "steer", lambda *given, sweep, **how: steer(*given, sweep=sweep[::-1], **how)
        )
    with pytest.raises(AssertionError):
        check_profile(tiny_llama, loaded)


def test_words_say_what_it_reads_and_what_it_writes(tiny_llama: LanguageModel, loaded: Any) -> None:
    one = live(loaded)
    (words,) = describe_features(tiny_llama, loaded, [one], 2)
    assert words.fires_on == loaded.feature_examples.fires_on(one, 2)
    assert words.promotes == tuple(text for text, _ in by_hand(tiny_llama, loaded.W_dec[one], 2))
    assert (
        str(words)
        == f"fires on {', '.join(words.fires_on)}; promotes {', '.join(t.strip() or repr(t) for t in words.promotes)}"
    )
    loaded.examples_file = None
    loaded.__dict__.pop("feature_examples")
    assert describe_features(tiny_llama, loaded, [one], 2)[0].fires_on == ()
    with pytest.raises(UserError, match="feature 48: the dictionary has features 0 to 47"):
        describe_features(tiny_llama, loaded, [48])


def test_a_feature_that_never_fires_is_said_to(tiny_llama: LanguageModel, loaded: Any) -> None:
    found = feature(tiny_llama, loaded, 7, **SHORT)
    tokens = loaded.feature_examples.n_tokens
    assert found.headline().endswith(
        f"never fired on the 192 tokens of the statistics; never fired on the {tokens:,} tokens of the examples"
    )
    assert "windows" not in found.tables()
    assert found.words.fires_on == ()
    loaded.feature_stats = None
    loaded.__dict__["feature_examples"] = None
    bare = feature(tiny_llama, loaded, 7, **SHORT)
    assert "no statistics (trimtab sae stats makes them); no examples (trimtab examples makes them)" in bare.headline()


def test_several_and_json(tiny_llama: LanguageModel, loaded: Any) -> None:
    found = feature(tiny_llama, loaded, [live(loaded), 7], **SHORT)
    assert isinstance(found, FeatureProfiles)
    assert read_typed(FeatureProfiles, json.loads(json.dumps(json_safe(found)))) == found
    assert isinstance(found[1], FeatureProfile)
    assert found.to_frame().feature.tolist() == [live(loaded), 7]
    assert isinstance(feature(tiny_llama, loaded, torch.tensor(7), **SHORT), FeatureProfile)


def test_what_cannot_be_shown_is_refused(tiny_llama: LanguageModel, tiny_gpt2: LanguageModel, loaded: Any) -> None:
    with pytest.raises(UserError, match="feature 48: the dictionary has features 0 to 47; choose one of them"):
        feature(tiny_llama, loaded, 48)
    with pytest.raises(UserError, match="tokens 0: it must be at least 1"):
        feature(tiny_llama, loaded, 3, tokens=0)
    with pytest.raises(UserError, match=r"feature\(count=…\): it has no such argument"):
        feature(tiny_llama, loaded, 3, count=0)
    with pytest.raises(UserError, match="the features: there is none; give some ids"):
        FeatureConfig()
    with pytest.raises(UserError, match="--of and --run: the page goes into the run that --of names"):
        FeatureConfig(of=Path("a"), run=Path("b"))


def test_ids_are_named_by_site(loaded: Any, tiny_llama: LanguageModel) -> None:
    other = make_dictionary(tiny_llama, "resid_post.2")
    assert features_by_site(["resid_post.2:5", "resid_post.1:3", "resid_post.2:5"], [loaded, other]) == {
        "resid_post.1": [3],
        "resid_post.2": [5],
    }
    for names, message in {
        ("3",): r"feature 3: there are 2 SAEs; write resid_post\.1:3",
        ("resid_post.9:3",): r"feature resid_post\.9:3: the SAEs read resid_post\.1, resid_post\.2",
        ("sea",): "feature 'sea': features are whole numbers from 0; give 2112",
    }.items():
        with pytest.raises(UserError, match=message):
            features_by_site(names, [loaded, other])


def test_the_page_and_the_links_to_it(
    tmp_path: Path, place: Path, loaded: Any, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("trimtab.lm.config.load_model", lambda *_, **__: tiny_llama)
    run = tmp_path / "rank"
    shared = ["--model", "tiny-llama", "--sae", str(place)]
    assert cli.main(["rank", *shared, "--criterion", "max-activation", "--limit", "3", "--run", str(run)]) == 0
    before = write_report(run).read_text()
    assert "<a href" not in before
    assert f"made by trimtab feature --of {run}" in before
    short = ["--max-new-tokens", "3", "--prompt", "the sea", "--json"]
    assert cli.main(["feature", "--of", str(run), *short]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = printed["profiles"][0]
    page = (run / "features" / "report.html").read_text()
    for one in printed["profiles"]:
        assert f'id="resid_post.1-{one["feature"]}"' in page
        assert (
            f'<a href="features/report.html#resid_post.1-{one["feature"]}">{one["feature"]}</a>'
            in (run / "report.html").read_text()
        )
    assert "made by trimtab feature" not in (run / "report.html").read_text()
    strongest = max(best["windows"], key=lambda window: window["activation"])
    assert f"top {strongest['activation']:.3g}, {strongest['document']}" in page
    assert page.count('class="k k4"') >= 1
    assert best["effects"][0]["steered"] in page
    again = run_feature(FeatureConfig(of=run, max_new_tokens=3, prompt=("the sea",)))
    assert [one.feature for one in again.profiles] == [one["feature"] for one in printed["profiles"]]


def test_a_run_that_names_no_sae_is_refused(tmp_path: Path) -> None:
    from trimtab.runs import Run

    with Run.open(tmp_path / "run", "harvest", {"text": ["a"]}) as run:
        run.finish({})
    with pytest.raises(UserError, match="it belongs to `harvest`, which names no model and SAE"):
        run_feature(FeatureConfig(of=tmp_path / "run"))


def test_two_saes_on_one_page(
    tmp_path: Path, place: Path, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.lm.config.load_model", lambda *_, **__: tiny_llama)
    other = save_dictionary(make_dictionary(tiny_llama, "resid_post.2", 20), tmp_path / "other")
    saes = (str(place), str(other))
    config = FeatureConfig(
        model="tiny-llama", sae=saes, feature=("resid_post.2:4", "resid_post.1:4"), max_new_tokens=2, run=tmp_path / "r"
    )
    found = run_feature(config)
    assert [(one.site, one.feature) for one in found.profiles] == [("resid_post.1", 4), ("resid_post.2", 4)]
    page = write_report(tmp_path / "r").read_text()
    assert page.index("Feature 4 at resid_post.1") < page.index("Feature 4 at resid_post.2")
    with pytest.raises(UserError, match="each must be of a site of its own; name one SAE for each site"):
        run_feature(FeatureConfig(model="tiny-llama", sae=(str(place), str(place)), feature=("1",)))


def test_the_table_of_examples_by_what_names_it(tmp_path: Path, sae: Standard) -> None:
    """Mutations: a run's own folder before that of the site; of several SAEs the table that lies in the run."""
    site = sae.info.site
    table, of_site = tmp_path / "feature_examples.parquet", tmp_path / site / "feature_examples.parquet"
    assert examples_file(None, sae) is None
    with pytest.raises(UserError, match=f"there are none for {site}; name a run of `trimtab examples`"):
        examples_file(tmp_path, sae)
    table.touch()
    assert examples_file(tmp_path, sae) == examples_file(table, sae) == table
    with pytest.raises(UserError, match=f"there are none for {site}"):
        examples_file(tmp_path, sae, saes=2)
    of_site.parent.mkdir()
    of_site.touch()
    assert examples_file(tmp_path, sae) == examples_file(tmp_path, sae, saes=2) == of_site

"""How well a judge tells where features fire: on tables whose features are words, with judges that are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_passages import FILLER
from tiny_dictionary import make_dictionary

from trimtab import cli
from trimtab.activations import Document
from trimtab.dictionaries import Standard, load_dictionary, save_dictionary
from trimtab.dictionaries.feature_examples import FeatureExamples, Window
from trimtab.errors import UserError
from trimtab.features import examples
from trimtab.interpreting import (
    Exemplars,
    Meaning,
    Passage,
    Rating,
    ToRate,
    autointerp,
    make_feature_judge,
    scoring_windows,
)
from trimtab.interpreting.autointerp import read_scores
from trimtab.interpreting.scoring_windows import SilentWindows, WindowOptions, make_trial, passage_of
from trimtab.judges import Unjudged
from trimtab.lm import LanguageModel, TokenBatch, capture

WORDS = ("anchor", "kettle", "verdict", "zebra", "violin", "meadow")
WIDTH = 21


def table(
    words: Sequence[str] = WORDS,
    *,
    top: int = 12,
    weighted: int = 9,
    random: int = 4,
    width: int = WIDTH,
    seed: int = 0,
) -> FeatureExamples:
    """Examples of features that fire on one word each, every window in a document of its own."""
    rng = np.random.default_rng(seed)
    vocabulary = [*dict.fromkeys(FILLER), *words]
    number = {word: i for i, word in enumerate(vocabulary)}
    columns: dict[str, list[Any]] = {name: [] for name in ("feature", "kind", "tokens", "activations")}
    for feature, word in enumerate(words):
        for kind, count in enumerate((top, weighted, random)):
            for place in range(count):
                tokens = [number[w] for w in rng.choice(FILLER, width)]
                tokens[width // 2] = number[word]
                activations = np.zeros(width, np.float32)
                activations[width // 2] = 5.0 - 0.1 * place
                for name, value in zip(columns, (feature, kind, tokens, activations), strict=True):
                    columns[name].append(value)
    rows = len(columns["feature"])
    return FeatureExamples(
        feature=np.array(columns["feature"], np.int32),
        kind=np.array(columns["kind"], np.int8),
        document=np.arange(rows, dtype=np.int32),
        position=np.full(rows, 100, np.int32),
        place=np.full(rows, width // 2, np.int32),
        tokens=np.array(columns["tokens"], np.int32),
        activations=np.stack(columns["activations"]),
        documents=tuple(f"doc-{i}" for i in range(rows)),
        vocabulary=tuple(f" {word}" for word in vocabulary),
        n_features=len(words),
        n_tokens=10_000,
        model="m",
        site="resid_post.1",
    )


class Reader:
    """Explains a feature by the token that it fires on, and looks for it."""

    name, version = "reader", "1"

    def __init__(self) -> None:
        self.asked: list[Passage] = []

    def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning | Unjudged]:
        return [
            Meaning(name=one.name, text=one.has[0].tokens[int(np.argmax(one.has[0].activations))]) for one in exemplars
        ]

    def fires(self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]) -> list[np.ndarray | Unjudged]:
        self.asked += [one for several in passages for one in several]
        return [
            np.array([0.9 if m.text in p.text else 0.1 for p in ps]) for m, ps in zip(meanings, passages, strict=True)
        ]

    def rate(self, texts: Sequence[ToRate]) -> list[Rating | Unjudged]:
        return [Unjudged("not asked")] * len(texts)


class NoneOf(Reader):
    """Says that no feature fires anywhere."""

    def fires(self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]) -> list[np.ndarray | Unjudged]:
        return [np.zeros(len(ps)) for ps in passages]


SMALL: dict[str, Any] = {"silent": 12, "test_silent": 10, "top": 10, "weighted": 5}


def test_a_reader_is_right_and_another_features_explanation_is_worth_chance() -> None:
    """Mutations: the shuffled judge keeps its own explanation; a firing window counts as silent."""
    judge = Reader()
    found = autointerp(table(), judge, **SMALL)
    assert [one.explanation for one in found.scores] == [f" {word}" for word in WORDS]
    assert all((one.score, one.balanced, one.auc) == (1, 1, 1) for one in found.scores)
    assert found.accuracy.own.estimate == 1
    assert found.accuracy.shuffled.estimate < found.chance  # other features' words stand in silent windows
    assert found.measures[1].shuffled.estimate < 0.5
    assert not any(passage.activations for passage in judge.asked)
    assert len(judge.asked) == 2 * 14 * len(WORDS)


def test_saying_none_scores_ten_of_fourteen() -> None:
    found = autointerp(table(), NoneOf(), **SMALL)
    accuracy, even, area = (measure.own.estimate for measure in found.measures)
    assert found.chance == accuracy == pytest.approx(10 / 14)
    assert (even, area) == (0.5, 0.5)
    assert f"{10 / 14:.3f} by saying none" in found.headline()


def test_windows_that_explain_are_none_of_those_that_test() -> None:
    """Mutation: windows to test on are drawn among all that fire."""
    known, options = table(), WindowOptions(**SMALL)
    silent = SilentWindows(known, range(len(WORDS)), options)
    for feature, word in enumerate(WORDS):
        trial = make_trial(known, feature, silent, options)
        assert not isinstance(trial, Unjudged)
        assert len(trial.passages) == 14
        assert trial.fires.sum() == 4
        for passage, fires in zip(trial.passages, trial.fires, strict=True):
            assert (f" {word}" in passage.tokens) == fires
        assert all(max(one.activations) > 0 for one in trial.exemplars.has)
        assert all(f" {word}" not in one.tokens for one in trial.exemplars.lacks)
        shown = {one.text for one in (*trial.exemplars.has, *trial.exemplars.lacks)}
        assert len(shown) == 15 + 12
        assert not shown & {one.text for one in trial.passages}
        tops = [passage_of(w, WIDTH).text for w in known[feature].windows if w.kind == "top"]
        assert [one.text for one in trial.exemplars.has[:10]] == tops[:10]  # the strongest explain, the next two test
        assert sum(one.text in tops[10:] for one in trial.passages) == 2


def test_a_window_near_a_place_where_the_feature_fires_is_not_silent() -> None:
    """Mutation: only windows of the feature itself are left out."""
    known = table()
    moved = known.document.copy()
    moved[known.feature == 1] = moved[0]  # all of feature 1's windows stand in a document where feature 0 fires
    near = FeatureExamples(**{**vars(known), "document": moved})
    silent = SilentWindows(near, [0, 2], WindowOptions(**SMALL))
    assert any(" kettle" in one.tokens for one in silent.of(2))
    assert not any(" kettle" in one.tokens for one in silent.of(0))


def test_windows_that_stand_in_one_place_count_once() -> None:
    """A window drawn by activation is often one of the strongest. Mutation: it may explain and be tested on."""
    known = table()
    moved = known.document.copy()
    of_first = np.flatnonzero(known.feature == 0)
    moved[of_first[12:16]] = moved[of_first[:4]]
    same = FeatureExamples(**{**vars(known), "document": moved})
    options = WindowOptions(**SMALL)
    gap = make_trial(same, 0, SilentWindows(same, [0], options), options)
    assert gap == Unjudged("5 windows that are drawn by activation, where 7 are needed")
    found = autointerp(same, Reader(), **SMALL)
    assert found.gaps == {"5 windows that are drawn by activation, where 7 are needed": 1}
    assert [one.feature for one in found.scores] == [1, 2, 3, 4, 5]


def test_wide_windows_are_cut_around_the_token() -> None:
    known = table(width=32)
    trial = make_trial(known, 0, SilentWindows(known, [0], WindowOptions(**SMALL)), WindowOptions(**SMALL))
    assert not isinstance(trial, Unjudged)
    assert {len(one.tokens) for one in (*trial.passages, *trial.exemplars.has)} == {21}
    assert all(one.tokens[10] == " anchor" for one in trial.exemplars.has)
    with pytest.raises(UserError, match="windows of 21 tokens: those of the examples have 16"):
        autointerp(table(width=16), Reader(), **SMALL)


def test_the_rules_find_features_that_are_words() -> None:
    found = autointerp(table(), make_feature_judge("rules"), **SMALL)
    assert found.measures[2].own.low > 0.9
    assert found.measures[2].difference.low > 0


def test_gaps_of_the_judge_count_nowhere() -> None:
    class Silent(Reader):
        def fires(
            self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]
        ) -> list[np.ndarray | Unjudged]:
            known = super().fires(meanings, passages)
            return [
                Unjudged("cut short") if "kettle" in m.text else one for m, one in zip(meanings, known, strict=True)
            ]

    found = autointerp(table(), Silent(), **SMALL)
    assert found.gaps == {"cut short": 2}  # itself, and the one that its explanation would be shuffled to
    assert len(found.scores) == 4
    assert found.accuracy.own.estimate == 1


def test_draws_follow_from_the_seed() -> None:
    first, again, other = (
        autointerp(table(), Reader(), features=4, seed=seed, **SMALL).to_table().to_pylist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"features": [0, 9]}, "feature 9: there are features 0 to 5"),
        ({"features": 1}, "features 1"),
        ({"top": 30}, "no feature has enough windows"),
        ({"silent": 500}, "windows that are silent, where 510 are needed"),
        ({"widow": 3}, "did you mean"),
        ({"test_top": 0, "test_weighted": 0}, "none in which a feature fires"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        autointerp(table(), Reader(), **{**SMALL, **given})


@pytest.fixture
def sae(tiny_llama: LanguageModel) -> Standard:
    return make_dictionary(tiny_llama)


@pytest.fixture
def documents() -> list[Document]:
    rng = np.random.default_rng(7)
    return [Document(f"doc-{i}", " ".join(rng.choice(FILLER[:14], size=rng.integers(10, 60))), "t") for i in range(80)]


FEW: dict[str, Any] = {
    "top": 4,
    "weighted": 4,
    "silent": 8,
    "test_top": 2,
    "test_weighted": 1,
    "test_silent": 4,
    "window": 6,
}
READ: dict[str, Any] = {"top": 6, "weighted": 8, "random": 2, "window": 6, "context": 32, "batch_size": 8}


def test_windows_in_which_the_model_says_that_it_fires_are_not_silent(
    tiny_llama: LanguageModel, sae: Standard, documents: list[Document]
) -> None:
    """Against the model and the SAE by hand, window by window. Mutations: the last position is left out instead of the
    first; rows of a batch are read from the wrong end."""
    found = examples(tiny_llama, sae, documents, **READ)
    ids = found.live.tolist()
    options = WindowOptions(**FEW)
    silent = SilentWindows(found, ids, options, tiny_llama, sae)
    told, lost, fires = 0, 0, list[torch.Tensor]()
    for passage in silent.passages:
        tokens = tiny_llama.encode_text(passage.text)
        x = capture(tiny_llama, TokenBatch.full(torch.tensor([tokens])), [sae.info.site])
        fires.append((sae.encode(next(iter(x.values()))[0, 1:]) > 1e-4).any(0))
    for feature in ids:
        quiet = {passage.text for passage in silent.of(feature)}
        for passage, loud in zip(silent.passages, fires, strict=True):
            if loud[feature]:
                assert passage.text not in quiet
                lost += 1
            told += passage.text in quiet
    assert told > 50
    assert lost > 50


def test_the_command_writes_a_run_with_a_page(
    tmp_path: Path, tiny_llama: LanguageModel, sae: Standard, documents: list[Document],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], axbench: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr("trimtab.lm.config.load_model", lambda *_, **__: tiny_llama)
    place = save_dictionary(sae, tmp_path / "sae")
    made = examples(tiny_llama, load_dictionary(place), documents, **READ)
    (tmp_path / "examples").mkdir()
    made.write(tmp_path / "examples" / "feature_examples.parquet")
    judged, run = tmp_path / "judge", tmp_path / "run"
    assert cli.main(["evaluate", "judge", "--labelled", str(axbench), "--judge", "rules", "--run", str(judged)]) == 0
    few = [word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = ["autointerp", "--model", "tiny-llama", "--sae", str(place), "--judge", "rules", "--run", str(run), *few]
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "there are no examples of its features" in capsys.readouterr().err
    words += ["--examples", str(tmp_path / "examples"), "--calibration", str(judged), "--features", "5", "--json"]
    assert cli.main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["checked"]
    assert printed["judge_accuracy"]["n"] == 3
    scores = read_scores(run / "autointerp.parquet")
    assert [one.feature for one in scores] == sorted(one["feature"] for one in printed["scores"])
    mean = printed["measures"][0]["own"]["estimate"]
    assert mean == pytest.approx(np.mean([one.score for one in scores]))
    assert "explanations of others" in (run / "report.html").read_text("utf-8")
    with pytest.raises(UserError, match="run autointerp again"):
        read_scores(run / "run.json")
    # Other windows of the same text are other examples. Mutation: hash the text alone.
    other = examples(tiny_llama, load_dictionary(place), documents, **(READ | {"weighted": 7}))
    assert other.corpus_hash == made.corpus_hash
    other.write(tmp_path / "examples" / "feature_examples.parquet")
    assert cli.main(words) == 2
    assert "its examples had hash" in capsys.readouterr().err


def test_windows_that_are_cut_off_at_a_documents_start_do_not_overlap() -> None:
    """Places 3 and 24 are 21 apart, but the first window of 21 tokens reaches to place 20, the second one from 14."""

    def window(place: int, position: int) -> Window:
        tokens = tuple(f"{position - place + i} " for i in range(32))
        return Window(
            feature=0, kind="top", activation=1.0, tokens=tokens, activations=(0.0,) * 32, place=place, document="a",
            position=position,
        )  # fmt: skip

    early, near, far = window(3, 3), window(21, 24), window(21, 60)
    kept, _ = scoring_windows._apart([early, near, far], 21)
    read = [set(passage_of(one, 21).tokens) for one in kept]
    assert len(kept) == 2
    assert not read[0] & read[1]

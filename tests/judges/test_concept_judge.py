"""A judge of concepts: planted words are found, its quality is what plain references say, gibberish has no concept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from trimtab.errors import UserError
from trimtab.judges import ConceptJudge
from trimtab.judges import concepts as judge_module
from trimtab.judges.concepts import _best_threshold

CONCEPTS = ("sea", "war")
PLANTED = {
    "sea": ["harbour", "tide", "sailor", "anchor", "reef"],
    "war": ["soldier", "trench", "cannon", "siege", "battle"],
}
COMMON = [
    "the",
    "of",
    "and",
    "in",
    "was",
    "a",
    "they",
    "had",
    "window",
    "morning",
    "paper",
    "table",
    "garden",
    "street",
    "often",
    "small",
    "house",
    "letter",
]


def text(rng: np.random.Generator, *having: str) -> str:
    words = list(rng.choice(COMMON, 24))
    for name in having:
        words += list(rng.choice(PLANTED[name], 3))
    return " ".join(rng.permutation(words)) + "."


def corpus(n: int, seed: int = 0, noise: float = 0.1) -> tuple[list[str], list[list[str]]]:
    """Texts of one concept, of both and of none; some labels are wrong."""
    rng = np.random.default_rng(seed)
    kinds = (["sea"], ["war"], ["sea", "war"], [])
    labels = [list(kinds[i % 4]) for i in range(n)]
    texts = [text(rng, *names) for names in labels]
    for i in np.flatnonzero(rng.random(n) < noise):
        labels[i] = list(kinds[int(rng.integers(4))])
    return texts, labels


@pytest.fixture(scope="module")
def judge() -> ConceptJudge:
    return ConceptJudge.fit(*corpus(240), CONCEPTS, seed=0)


def test_planted_concepts_are_found(judge: ConceptJudge) -> None:
    texts, labels = corpus(120, seed=9, noise=0)
    wanted = np.array([[name in names for name in CONCEPTS] for names in labels])
    found = judge.has(texts)
    assert found.shape == (120, 2)
    assert (found == wanted).mean() > 0.95
    probabilities = judge.probabilities(texts)
    assert probabilities[wanted].mean() > 0.75 > 0.3 > probabilities[~wanted].mean()


def test_quality_is_of_texts_that_were_not_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth text of each set of labels is held out, and numbers are scikit-learn's on just those."""
    seen: dict[str, list[str]] = {}
    real_fit, real = judge_module.Classifier.of, judge_module.Classifier.probabilities

    def fit(texts: list[str], *given: object) -> judge_module.Classifier:
        seen["fitted"] = texts
        return real_fit(texts, *given)

    def probabilities(self: judge_module.Classifier, texts: list[str]) -> np.ndarray:
        seen["measured"] = texts
        return real(self, texts)

    monkeypatch.setattr(judge_module.Classifier, "of", fit)
    monkeypatch.setattr(judge_module.Classifier, "probabilities", probabilities)
    texts, labels = corpus(240)
    judge = ConceptJudge.fit(texts, labels, CONCEPTS, seed=0)
    measured = seen["measured"]
    assert not set(measured) & set(seen["fitted"])
    assert len(measured) + len(seen["fitted"]) == 240
    assert abs(len(measured) - 60) <= 2
    assert judge.quality.heldout == len(measured)
    table = np.array([[name in labels[texts.index(one)] for name in CONCEPTS] for one in measured])
    found, scores = judge.has(measured), judge.probabilities(measured)
    for c, one in enumerate(judge.quality.concepts):
        assert one.having == table[:, c].sum()
        assert one.auc.estimate == pytest.approx(roc_auc_score(table[:, c], scores[:, c]))
        assert one.accuracy.estimate == pytest.approx(balanced_accuracy_score(table[:, c], found[:, c]))
        assert one.accuracy.low < one.accuracy.estimate < one.accuracy.high
        assert one.recall.estimate == found[table[:, c], c].mean()
        assert one.false_positives.estimate == found[~table[:, c], c].mean()
        assert one.on_none is not None
        assert one.on_none.n == (~table.any(axis=1)).sum()
    whole = np.mean([one.accuracy.estimate for one in judge.quality.concepts])
    assert judge.quality.accuracy.estimate == pytest.approx(whole)
    assert judge.quality.accuracy.low < whole < judge.quality.accuracy.high
    assert "judge of 2 concepts: accuracy" in judge.quality.headline()


def documents(n: int, seed: int = 0) -> tuple[list[str], list[list[str]], list[str]]:
    """Six passages of each document, which share a word of their own and else say nothing of their label."""
    rng = np.random.default_rng(seed)
    own = ["".join(rng.choice(list("lmnorstae"), 9)) for _ in range(n)]
    units = [f"document {i}" for i in range(n) for _ in range(6)]
    texts = [f"{text(rng)[:-1]} {own[i // 6]} {own[i // 6]}." for i in range(6 * n)]
    return texts, [["sea"] if (i // 6) % 2 else [] for i in range(6 * n)], units


def test_passages_of_a_document_are_never_both_fitted_and_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that knows documents alone is told from one that knows the concept only so."""
    seen: dict[str, list[str]] = {}
    real = judge_module.Classifier.probabilities

    def probabilities(self: judge_module.Classifier, texts: list[str]) -> np.ndarray:
        seen["measured"] = texts
        return real(self, texts)

    monkeypatch.setattr(judge_module.Classifier, "probabilities", probabilities)
    texts, labels, units = documents(40)
    apart = ConceptJudge.fit(texts, labels, ["sea"], units=units)
    held = {units[texts.index(one)] for one in seen["measured"]}
    assert len(held) == 10
    assert len(seen["measured"]) == 60 == apart.quality.heldout
    assert apart.quality.documents == 10
    assert apart.quality.concepts[0].recall.n == 5
    assert "on 60 texts of 10 documents, fitted on 180 of others" in apart.quality.headline()
    mixed = ConceptJudge.fit(texts, labels, ["sea"])
    assert mixed.quality.accuracy.estimate > 0.9 > 0.7 > apart.quality.accuracy.estimate
    assert mixed.quality.documents == 0
    with pytest.raises(UserError, match="texts that have it are of 5 documents, and a judge needs 8; add texts of"):
        ConceptJudge.fit(*documents(10)[:2], ["sea"], units=documents(10)[2])


def test_probabilities_are_calibrated() -> None:
    """Of planted texts with many wrong labels, a share of about p has the concept where p is said."""
    judge = ConceptJudge.fit(*corpus(600, noise=0.4), CONCEPTS, seed=0)
    texts, labels = corpus(600, seed=5, noise=0.4)
    p = judge.probabilities(texts)[:, 0]
    yes = np.array(["sea" in names for names in labels])
    assert abs(p.mean() - yes.mean()) < 0.06
    for part in (p < 0.4, p > 0.6):
        assert part.sum() > 100
        assert abs(p[part].mean() - yes[part].mean()) < 0.12


def test_gibberish_has_no_concept(judge: ConceptJudge) -> None:
    texts = ["the sea harbour " * 20, "", "hrbr tdslr xkcdqz mnbvcx lkjhgf qwrtpsd zxcvbn"]
    assert not judge.has(texts).any()
    assert not judge.probabilities(texts).any()


def test_a_saved_judge_is_the_same_to_the_bit(judge: ConceptJudge, tmp_path: Path) -> None:
    texts, _ = corpus(40, seed=3)
    loaded = ConceptJudge.load(judge.save(tmp_path / "judge.npz"))
    assert np.array_equal(loaded.probabilities(texts), judge.probabilities(texts))
    assert np.array_equal(loaded.has(texts), judge.has(texts))
    assert loaded.concepts == judge.concepts
    assert loaded.quality == judge.quality
    assert loaded.seen == judge.seen


def test_quality_on_texts_of_another_kind(judge: ConceptJudge) -> None:
    texts, labels = corpus(80, seed=9, noise=0)
    found = judge.measure([*texts, "go on. " * 30], [*labels, []])
    table = np.array([[name in names for name in CONCEPTS] for names in labels])
    assert (found.heldout, found.fitted, found.gibberish) == (80, judge.quality.fitted, 1)
    for c, one in enumerate(found.concepts):
        assert one.recall.estimate == judge.has(texts)[table[:, c], c].mean()
    fitted_on, theirs = corpus(240)
    assert judge.has_seen([texts[0], fitted_on[0]]) == [False, True]
    with pytest.raises(UserError, match="1 of the 2 are among those that it was fitted or measured on already; give o"):
        judge.measure([texts[0], fitted_on[0]], [labels[0], theirs[0]])
    with pytest.raises(
        UserError, match="concept 'war': 0 of 2 texts have it; give labelled texts that have it and some"
    ):
        judge.measure(["the sea in the morning.", "the garden in the morning."], [["sea"], []])


def test_the_same_seed_gives_the_same_judge() -> None:
    texts, labels = corpus(120)
    a, b = (ConceptJudge.fit(texts, labels, CONCEPTS, seed=4) for _ in range(2))
    assert np.array_equal(a.probabilities(texts), b.probabilities(texts))


def test_the_threshold_is_the_best_by_trying_all() -> None:
    rng = np.random.default_rng(1)
    yes = rng.random(80) < 0.2
    scores = 1 / (1 + np.exp(-rng.normal(size=80) - 2 * yes))
    tried = np.linspace(0, 1, 2001)
    best = max(((scores >= t)[yes].mean() + (scores < t)[~yes].mean()) for t in tried)
    found = _best_threshold(scores, yes)
    assert (scores >= found)[yes].mean() + (scores < found)[~yes].mean() == pytest.approx(best)


TEXTS, LABELS = corpus(100)
REFUSED = {
    "lengths": ((TEXTS, LABELS[:3], CONCEPTS), "the judge's texts: there are 100, and 3 labels; give one for each"),
    "units": ((TEXTS, LABELS, CONCEPTS, 0, ["a"]), "the judge's texts: there are 100, and 1 units; give one for each"),
    "typo": (
        (TEXTS, [["see"], *LABELS[1:]], CONCEPTS),
        r"label 'see': the judge's concepts are sea, war; did you mean sea\?",
    ),
    "too few": (
        (TEXTS, [[]] * 95 + [["sea"]] * 5, ["sea"]),
        "concept 'sea': 5 of 100 texts have it, and a judge needs",
    ),
    "too few lack": ((TEXTS, [["sea"]] * 95 + [[]] * 5, ["sea"]), "concept 'sea': 5 of 100 texts lack it"),
    "two labels": (
        ([TEXTS[0], *TEXTS], [["war"], *LABELS], CONCEPTS),
        "it is labelled sea, and otherwise elsewhere; correct one of the labels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        ConceptJudge.fit(*given[:4], units=given[4] if len(given) > 4 else None)


def test_files_that_are_no_judge(judge: ConceptJudge, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge .*none\.npz: it cannot be read; check the path"):
        ConceptJudge.load(tmp_path / "none.npz")
    for name, data in (("a.npz", b"no judge"), ("b.npz", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="it is no file of a judge"):
            ConceptJudge.load(tmp_path / name)
    np.savez(tmp_path / "c.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="it is no file of a judge"):
        ConceptJudge.load(tmp_path / "c.npz")
    with pytest.raises(UserError, match="they are one text; give a list of texts"):
        judge.has("the sea")


DATA = Path(os.environ.get("TRIMTAB_DATA", "nowhere")) / "labels" / "ag_news_test.csv"


@pytest.mark.skipif(not DATA.exists(), reason="TRIMTAB_DATA names no directory with AG News")
def test_topics_of_real_news() -> None:
    from trimtab.flags import import_examples

    news = ["1=world", "2=sports", "3=business", "4=technology"]
    names = [name.partition("=")[2] for name in news]
    columns = ["label", "title", "text"]
    found = import_examples([DATA], names, columns=columns, rename=news, cleaning="html", per_concept=200, none_share=0)
    judge = ConceptJudge.fit([e.response for e in found.examples], [e.concepts for e in found.examples], names)
    assert judge.quality.accuracy.low > 0.8
    assert all(one.auc.estimate > 0.9 for one in judge.quality.concepts)

"""A judge of what texts are about: a linear classifier on words and letters, fitted on labelled text.

TF-IDF of words and of letter sequences, and one logistic regression per concept. It never sees the model that it
judges, and says with intervals how often it is right on labelled texts that it was not fitted on. Gibberish has no
concept.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import UserError, did_you_mean
from trimtab.judges.concept_quality import JudgeQuality, measure_quality, unit_numbers
from trimtab.judges.gibberish import find_gibberish
from trimtab.runs import json_safe, read_typed, text_id, write_bytes

LEAST = 20
"""Texts that must have a concept, and as many that must lack it."""
LEAST_DOCUMENTS = 8
"""Documents that these must be of."""
HELD_OUT = 0.25
"""Share of the documents, or of texts that are of none, that the quality is measured on."""
FOLDS = 5
C = 10.0
"""Inverse weight of the penalty."""
KNOWN = 0.4
"""Least share of a text's words that the judge has seen; below, nothing can be said of it."""
FORMAT = 2
"""Of the file."""

_WORD = re.compile(r"\b\w\w+\b")
"""As scikit-learn finds words."""


class TfidfTerms(NamedTuple):
    """Words, or sequences of letters, by which a text is described."""

    analyzer: str
    """`word` or `char_wb`, as scikit-learn calls them."""
    shortest: int
    longest: int
    terms: list[str]
    idf: NDArray[np.float64]

    @classmethod
    def of(cls, texts: Sequence[str], analyzer: str, shortest: int, longest: int, most: int, least: int) -> TfidfTerms:
        """The terms that at least `least` texts have, the `most` frequent of them."""
        made = _vectoriser(analyzer, shortest, longest, max_features=most, min_df=least)
        try:
            made.fit(texts)
        except ValueError:  # no term is in so many texts
            made = _vectoriser(analyzer, shortest, longest).fit(texts)
        return cls(analyzer, shortest, longest, made.get_feature_names_out().tolist(), made.idf_)

    def vectoriser(self) -> Any:
        """What describes texts by these terms."""
        made = _vectoriser(self.analyzer, self.shortest, self.longest, vocabulary=self.terms)
        made.idf_ = self.idf
        return made


def _share_known(text: str, known: frozenset[str]) -> float:
    """Share of a text's words of two letters or more that are known; 0 without any."""
    words = _WORD.findall(text.lower())
    return sum(word in known for word in words) / len(words) if words else 0.0


def _vectoriser(analyzer: str, shortest: int, longest: int, **options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=analyzer, ngram_range=(shortest, longest), sublinear_tf=True, **options)


@dataclass(frozen=True, eq=False, repr=False)
class Classifier:
    """A logistic regression per concept on words and letters."""

    words: TfidfTerms
    letters: TfidfTerms
    weights: NDArray[np.float32]
    """`[C, T]`, one for each concept and term."""
    intercepts: NDArray[np.float64]
    slopes: NDArray[np.float64]
    """`[C]`; with `offsets` they make a score a probability (Platt), learned on texts that the score had not seen."""
    offsets: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    """`[C]`, the probability from which a text has a concept: where recall and specificity together are highest."""

    @classmethod
    def of(cls, texts: Sequence[str], table: NDArray[np.bool_], units: NDArray[np.int64], seed: int) -> Classifier:
        """Fit it on N texts, `[N, C]` what they have and `[N]` what they are of."""
        terms = TfidfTerms.of(texts, "word", 1, 2, 30_000, 2), TfidfTerms.of(texts, "char_wb", 3, 5, 50_000, 3)
        x = _described(texts, terms)
        parts = [_fit_one(x, table[:, c], units, seed) for c in range(table.shape[1])]
        return cls(*terms, *(np.array([getattr(part, name) for part in parts]) for name in _OneFit._fields))

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """`[N, C]`, how likely texts have each concept; 0 for gibberish, and where most words are unknown."""
        if isinstance(texts, str):
            raise UserError("the texts to judge", "they are one text", "give a list of texts")
        found = np.zeros((len(texts), len(self.weights)))
        known = frozenset(term for term in self.words.terms if " " not in term)
        language = [
            i for i, text in enumerate(texts) if not find_gibberish(text) and _share_known(text, known) >= KNOWN
        ]
        if language:
            found[language] = _sigmoid(self.log_odds([texts[i] for i in language]))
        return found

    def log_odds(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """`[N, C]`, log-odds of each concept, whether or not texts are language."""
        x = _described(texts, (self.words, self.letters))
        return (x @ self.weights.T.astype(np.float64) + self.intercepts) * self.slopes + self.offsets

    def has(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """`[N, C]`, whether texts have each concept: from a probability on that was chosen on texts to fit on."""
        return self.probabilities(texts) >= self.thresholds


@dataclass(frozen=True, eq=False, repr=False)
class ConceptJudge(Classifier):
    """Says which concepts texts have. Made by `fit` or `load`."""

    concepts: tuple[str, ...]
    quality: JudgeQuality
    """On texts that it was not fitted on."""
    seen: frozenset[str]
    """Hashes of the texts that it was fitted and measured on."""

    def __repr__(self) -> str:
        return f"<ConceptJudge: {self.quality.headline()}>"

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[Sequence[str]],
        concepts: Sequence[str],
        seed: int = 0,
        *,
        units: Sequence[str | None] | None = None,
    ) -> ConceptJudge:
        """Fit a judge on three quarters of labelled texts, and measure it on the others.

        Args:
            texts: N texts. One that is there several times counts once.
            labels: the concepts that each has.
            concepts: C names.
            seed: of the division and the folds.
            units: the document of each text, where it is a passage of one; passages of a document stay together.

        Raises:
            UserError: texts, labels and units are not of one length, a label is no concept, a text has two labellings,
                or too few texts have a concept or lack it, or of too few documents.
        """
        language = _labelled(texts, labels, concepts, units)
        table, numbers = language.table, unit_numbers(language.units)
        for c, name in enumerate(concepts):
            for yes, verb in ((table[:, c], "have"), (~table[:, c], "lack")):
                documents = len(np.unique(numbers[yes]))
                if yes.sum() < LEAST:
                    why = f"{int(yes.sum())} of {len(table)} texts {verb} it, and a judge needs {LEAST}"
                    raise UserError(f"concept {name!r}", why, f"add labelled texts that {verb} it")
                if documents < LEAST_DOCUMENTS:
                    why = f"texts that {verb} it are of {documents} documents, and a judge needs {LEAST_DOCUMENTS}"
                    raise UserError(f"concept {name!r}", why, f"add texts of other documents that {verb} it")
        held = _held_out(table, numbers, seed)
        fitted, measured = (np.flatnonzero(held == wanted).tolist() for wanted in (False, True))
        classifier = Classifier.of([language.texts[i] for i in fitted], table[fitted], numbers[fitted], seed)
        probabilities = classifier.probabilities([language.texts[i] for i in measured])
        quality = measure_quality(
            concepts, probabilities >= classifier.thresholds, table[measured], probabilities=probabilities,
            units=[language.units[i] for i in measured], fitted=len(fitted), gibberish=language.gibberish, seed=seed,
        )  # fmt: skip
        seen = frozenset(map(text_id, language.texts))
        return cls(**vars(classifier), concepts=tuple(concepts), quality=quality, seen=seen)

    def has_seen(self, texts: Sequence[str]) -> list[bool]:
        """Whether it was fitted or measured on each of some texts, whose decisions say little of others then."""
        return [text_id(text) in self.seen for text in texts]

    def measure(
        self,
        texts: Sequence[str],
        labels: Sequence[Sequence[str]],
        units: Sequence[str | None] | None = None,
    ) -> JudgeQuality:
        """Its quality on labelled texts of another kind, none of which it was fitted on.

        Args:
            texts: N texts. Gibberish by the rules is left out.
            labels: the concepts that each has.
            units: the document of each, where it is a passage of one.

        Raises:
            UserError: a label is no concept, some concept has no text or all of them, or it was fitted on a text.
        """
        language = _labelled(texts, labels, self.concepts, units)
        if n := sum(self.has_seen(language.texts)):
            why = f"{n} of the {len(language.texts)} are among those that it was fitted or measured on already"
            raise UserError("the judge's texts", why, "give others")
        table = language.table
        for c, name in enumerate(self.concepts):
            if not 0 < table[:, c].sum() < len(table):
                why = f"{int(table[:, c].sum())} of {len(table)} texts have it"
                raise UserError(f"concept {name!r}", why, "give labelled texts that have it and some that lack it")
        old, probabilities = self.quality, self.probabilities(language.texts)
        return measure_quality(
            self.concepts, probabilities >= self.thresholds, table, probabilities=probabilities,
            units=language.units, fitted=old.fitted, gibberish=language.gibberish, seed=old.seed,
        )  # fmt: skip

    def save(self, path: Path | str) -> Path:
        """Write it into one file. Raises a `UserError` if that cannot be written."""
        parts = {"words": self.words, "letters": self.letters}
        about = {
            "format": FORMAT,
            "concepts": self.concepts,
            "quality": self.quality,
            **{name: {**terms._asdict(), "idf": None} for name, terms in parts.items()},
        }
        arrays: dict[str, Any] = {f"{name}_idf": terms.idf for name, terms in parts.items()}
        arrays |= {name: getattr(self, name) for name in _OneFit._fields}
        arrays["seen"] = np.array(sorted(self.seen))
        arrays["about"] = np.frombuffer(json.dumps(json_safe(about)).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_bytes(path, buffer.getvalue())
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> ConceptJudge:
        """Read what `save` wrote.

        Raises:
            UserError: the file cannot be read, or is no judge's.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            about = json.loads(arrays.pop("about").tobytes())
        except OSError as error:
            raise UserError(f"judge {path}", "it cannot be read", "check the path") from error
        except (ValueError, KeyError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"judge {path}", "it is no file of a judge", "give one that ConceptJudge.save wrote"
            ) from error
        if about.get("format") != FORMAT:
            raise UserError(f"judge {path}", f"it is of format {about.get('format')}", "fit it again")
        terms = {n: TfidfTerms(**{**about[n], "idf": arrays[f"{n}_idf"]}) for n in ("words", "letters")}
        quality = read_typed(JudgeQuality, about["quality"], f"judge {path}")
        fitted = {name: arrays[name] for name in _OneFit._fields}
        seen = frozenset(arrays["seen"].tolist())
        return cls(**terms, **fitted, concepts=tuple(about["concepts"]), quality=quality, seen=seen)


def _described(texts: Sequence[str], terms: Sequence[TfidfTerms]) -> Any:
    """`[N, T]`, texts by their terms, sparse."""
    from scipy.sparse import hstack

    return hstack([one.vectoriser().transform(texts) for one in terms]).tocsr()


class _OneFit(NamedTuple):
    """What is learned for one concept."""

    weights: NDArray[np.float32]
    intercepts: float
    slopes: float
    offsets: float
    thresholds: float


def _fit_one(x: Any, yes: NDArray[np.bool_], units: NDArray[np.int64], seed: int) -> _OneFit:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict

    model: Any = LogisticRegression(C=C, class_weight="balanced", solver="liblinear", random_state=seed)
    apart = len(np.unique(units)) < len(units)
    folds = (StratifiedGroupKFold if apart else StratifiedKFold)(FOLDS, shuffle=True, random_state=seed)
    groups = units if apart else None
    unseen = np.asarray(cross_val_predict(model, x, yes, groups=groups, cv=folds, method="decision_function"))
    platt: Any = LogisticRegression(C=100.0).fit(unseen[:, None], yes)
    slope, offset = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    model.fit(x, yes)
    return _OneFit(
        model.coef_[0].astype(np.float32),
        float(model.intercept_[0]),
        slope,
        offset,
        _best_threshold(_sigmoid(unseen * slope + offset), yes),
    )


def _best_threshold(scores: NDArray[np.float64], yes: NDArray[np.bool_]) -> float:
    """Where the shares of right decisions among those that have it and those that lack it are highest together; of
    several such places the one nearest to a half."""
    values = np.unique(scores)
    cuts = (values[1:] + values[:-1]) / 2 if len(values) > 1 else np.array([0.5])
    recall = 1 - np.searchsorted(np.sort(scores[yes]), cuts) / yes.sum()
    specificity = np.searchsorted(np.sort(scores[~yes]), cuts) / (~yes).sum()
    right = recall + specificity
    best = cuts[right >= right.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def _held_out(table: NDArray[np.bool_], units: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which rows are held out: whole units, the same share of those of each set of concepts."""
    rng = np.random.default_rng(seed)
    _, first = np.unique(units, return_index=True)
    _, group = np.unique(table[first], axis=0, return_inverse=True)
    held: list[int] = []
    for number in range(int(group.max()) + 1):
        members = rng.permutation(first[group.reshape(-1) == number])
        held += units[members[: round(HELD_OUT * len(members))]].tolist()
    return np.isin(units, held)


class _Language(NamedTuple):
    """Labelled texts that are no gibberish, each once."""

    texts: list[str]
    table: NDArray[np.bool_]
    """`[N, C]`, which concepts they have."""
    units: list[str | None]
    gibberish: int
    """Those that were left out."""


def _labelled(
    texts: Sequence[str],
    labels: Sequence[Sequence[str]],
    concepts: Sequence[str],
    units: Sequence[str | None] | None,
) -> _Language:
    """Raises a `UserError` where there are not as many labels, a label is no concept, or a text has two labellings."""
    units = [None] * len(texts) if units is None else units
    for given, what in ((labels, "labels"), (units, "units")):
        if isinstance(texts, str) or len(given) != len(texts):
            why = f"there are {len(texts)}, and {len(given)} {what}"
            raise UserError("the judge's texts", why, "give one for each")
    known: dict[str, tuple[tuple[str, ...], str | None]] = {}
    for text, names, unit in zip(texts, labels, units, strict=True):
        if set(known.setdefault(text, (tuple(names), unit))[0]) != set(names):
            why = f"it is labelled {', '.join(names) or 'none'}, and otherwise elsewhere"
            raise UserError(f"text {text[:40]!r}", why, "correct one of the labels")
    language = [text for text in known if not find_gibberish(text)]
    held = [known[text][0] for text in language]
    for name in (name for names in held for name in names):
        if name not in concepts:
            hint = did_you_mean(str(name), concepts, "name one of them")
            raise UserError(f"label {name!r}", f"the judge's concepts are {', '.join(concepts)}", hint)
    table = np.array([[name in names for name in concepts] for names in held], bool).reshape(-1, len(concepts))
    return _Language(language, table, [known[text][1] for text in language], len(known) - len(language))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))

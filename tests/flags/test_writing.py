"""What a model writes is taken only where it has the concepts that it was asked for, and no other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trimtab.errors import UserError
from trimtab.flags import NEUTRAL_PROMPTS, read_examples, read_judge, write_examples
from trimtab.flags.data import JudgeConfig, run_judge, writing
from trimtab.flags.data.checking import JudgeCheck, WordCheck
from trimtab.flags.data.prompts import everyday_topics, stems, topics
from trimtab.flags.data.requests import Requests
from trimtab.judges import ConceptJudge
from trimtab.lm import LanguageModel
from trimtab.runs import read_record

CONCEPTS = {"sea": "the sea, ships and sailors", "war": "war, soldiers and battles"}
SMALL = {"per_concept": 12, "batch_size": 8, "chat": False}


POOL = ["".join(rng.choice(list("lmnorstae"), 7)) for rng in [np.random.default_rng(0)] for _ in range(400)]


class Author:
    """Stands in for the decode loop: writes of what it is asked for, but of the other concept for every fifth text, of
    nothing for another fifth, and gibberish for a tenth."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.stop_after = 10**6

    def __call__(
        self, model: LanguageModel, prompts: Sequence[list[int]], config: Any, samples: Sequence[int]
    ) -> SimpleNamespace:
        if len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        asked = [model.decode_ids(ids) for ids in prompts]
        self.batches.append(asked)
        return SimpleNamespace(
            texts=[self.text(prompt, sample) for prompt, sample in zip(asked, samples, strict=True)],
            finish=["length"] * len(prompts),
        )

    def text(self, prompt: str, sample: int) -> str:
        rng = np.random.default_rng(sample)
        if sample % 10 == 3:
            return "go on. " * 30
        having = [name for name, said in CONCEPTS.items() if set(stems(said)) & set(stems(prompt))]
        if sample % 5 == 1:
            having = ["war" if having == ["sea"] else "sea"]
        if sample % 5 == 2:
            having = []
        words = list(rng.choice(POOL, 12))
        words += [word for name in having for word in {"sea": ["ship", "sailors"], "war": ["battle", "soldier"]}[name]]
        return f"It is said that the {' '.join(rng.permutation(words))} was in it. And then it brea"


@pytest.fixture
def author(monkeypatch: pytest.MonkeyPatch) -> Author:
    author = Author()
    monkeypatch.setattr(writing, "decode", author)
    return author


def test_only_what_has_its_concepts_is_taken(tiny_llama: LanguageModel, author: Author) -> None:
    found = write_examples(tiny_llama, CONCEPTS, several_share=0.25, none_share=0.2, **SMALL)
    kept = Counter(example.concepts for example in found.examples)
    assert kept == {("sea",): 12, ("war",): 12, ("sea", "war"): 6, (): 8}
    for example in found.examples:
        words = set(stems(example.response))
        assert ("sea" in example.concepts) == bool({"ship", "sailor"} & words)
        assert ("war" in example.concepts) == bool({"battl", "soldier"} & words)
        assert example.response.endswith("was in it.")
    by_group = {one.group: one for one in found.result.groups}
    assert list(by_group) == ["sea", "war", "several", "none"]
    for name in ("sea", "war"):
        one = by_group[name]
        assert set(one.reasons) == {"lacks it", "gibberish", *(["has another"] if name == "war" else [])}
        assert one.written == one.accepted + one.surplus + sum(one.reasons.values())
        assert one.rejected is not None
        assert 0.2 < one.rejected.estimate < 0.8
    assert "lacks it" in by_group["several"].reasons
    assert set(by_group["none"].reasons) <= {"has another", "gibberish"}
    assert found.result.check == "words"
    assert found.headline().startswith("38 examples by tiny-llama")
    assert "checked by the concepts' words" in found.headline()


def test_half_are_kept_under_neutral_prompts(tiny_llama: LanguageModel, author: Author) -> None:
    found = write_examples(tiny_llama, CONCEPTS, per_concept=40, batch_size=32, chat=False)
    concepts = [e for e in found.examples if e.concepts]
    neutral = [e for e in concepts if e.prompt in NEUTRAL_PROMPTS]
    assert 0.35 < len(neutral) / len(concepts) < 0.65
    assert found.result.neutral >= len(neutral)
    for example in concepts:
        named = set(stems(example.prompt)) & set(stems(" ".join(CONCEPTS.values())))
        assert bool(named) == (example.prompt not in NEUTRAL_PROMPTS)
    always = write_examples(tiny_llama, CONCEPTS, neutral_share=1.0, none_share=0, **SMALL)
    assert {e.prompt for e in always.examples} <= set(NEUTRAL_PROMPTS)
    never = write_examples(tiny_llama, CONCEPTS, neutral_share=0.0, none_share=0, **SMALL)
    assert never.result.neutral == 0


def test_a_run_goes_on_where_it_was_stopped(
    tiny_llama: LanguageModel, author: Author, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_examples(tiny_llama, CONCEPTS, run=tmp_path / "whole", **SMALL)
    batches = list(author.batches)
    author.batches, author.stop_after = [], 3
    with pytest.raises(KeyboardInterrupt):
        write_examples(tiny_llama, CONCEPTS, run=tmp_path / "run", **SMALL)
    assert author.batches == batches[:3]
    author.batches, author.stop_after = [], 10**6
    resumed = write_examples(tiny_llama, CONCEPTS, run=tmp_path / "run", **SMALL)
    assert author.batches == batches[3:]
    assert resumed.examples == whole.examples
    assert resumed.result == whole.result
    for name in ("examples.jsonl", "rejected.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    author.batches = []
    again = write_examples(tiny_llama, CONCEPTS, run=tmp_path / "run", **SMALL)
    assert not author.batches
    assert again.examples == read_examples(tmp_path / "run" / "examples.jsonl", list(CONCEPTS)) == whole.examples
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == sum(sum(one.reasons.values()) for one in whole.result.groups)


def test_nothing_is_kept_twice(tiny_llama: LanguageModel, author: Author, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "It is said that the ship and her sailors were in the harbour at nightfall. And then"
    monkeypatch.setattr(author, "text", lambda prompt, sample: said)
    found = write_examples(tiny_llama, {"sea": CONCEPTS["sea"]}, none_share=0, attempts=2, **SMALL)
    (one,) = found.result.groups
    assert (one.accepted, one.written, one.reasons) == (1, 24, {"nearly a copy": 23})
    assert "too few of sea 1 of 12" in found.headline()


def test_a_text_of_two_concepts_does_not_repeat_one_of_one(
    tiny_llama: LanguageModel, author: Author, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "It is said that the ship and her sailors were in the battle beside the soldiers. And then"
    monkeypatch.setattr(author, "text", lambda prompt, sample: said)
    monkeypatch.setattr(writing._Writing, "_reason", lambda *given: "")
    found = write_examples(tiny_llama, CONCEPTS, none_share=0, attempts=1, **SMALL)
    assert len(found.examples) == 1


def test_a_real_decode_of_a_model_that_writes_nonsense(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    """All is rejected, after as many attempts as are allowed, with and without the chat template."""
    for chat in (True, False):
        found = write_examples(
            tiny_llama, {"sea": "the sea"}, per_concept=3, attempts=2, none_share=0, max_new_tokens=24, chat=chat,
            run=tmp_path / f"chat-{chat}",
        )  # fmt: skip
        assert found.examples == []
        (one,) = found.result.groups
        assert one.written == 6
        assert one.rejected is not None
        assert one.rejected.estimate == 1
    asked = [json.loads((tmp_path / f"chat-{c}" / "written" / "00000.json").read_text()) for c in (True, False)]
    assert asked[0]["prompts"] == asked[1]["prompts"]
    assert asked[0]["texts"] != asked[1]["texts"]


def test_a_judge_of_labelled_texts_checks(tiny_llama: LanguageModel, author: Author, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = {
        "sea": ["ship", "sailors", "ships", "sea", "sailor"],
        "war": ["battle", "soldier", "war", "soldiers"],
        "": ["it"],
    }
    lines = []
    for i in range(150):
        name = tuple(words)[i % 3]
        said = [
            *rng.choice(words[name], 3),
            *rng.choice(POOL, 12),
            *["it", "is", "said", "that", "the", "was", "in", "it"],
        ]
        text = " ".join(rng.permutation(said))
        lines.append({"prompt": "Go", "response": f"{text} {i}.", "concepts": [name] if name else []})
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = read_judge(path, list(CONCEPTS))
    judge.save(tmp_path / "judge.npz")
    assert read_judge(tmp_path / "judge.npz", ["war"]).concepts == ("sea", "war")
    found = write_examples(tiny_llama, CONCEPTS, judge=judge, several_share=0, run=tmp_path / "run", **SMALL)
    assert Counter(e.concepts for e in found.examples if e.concepts) == {("sea",): 12, ("war",): 12}
    assert found.result.judge == judge.quality
    assert "checked by a judge of labelled texts" in found.headline()
    assert list(found.tables()) == ["yield", "judge"]
    assert "about those that it selected, such as these, is not known" in found.tables()["judge"].caption
    assert read_record(tmp_path / "run")["config"]["check"] == found.result.check == JudgeCheck(judge, ["sea"]).name
    concepts = tmp_path / "concepts.txt"
    concepts.write_text("sea\nwar\n")
    kept = run_judge(JudgeConfig(judge_data=path, concepts=concepts, save=tmp_path / "again.npz"))
    assert kept == judge.quality == read_judge(tmp_path / "again.npz", list(CONCEPTS)).quality
    others = [{**line, "response": f"and {line['response']}"} for line in lines[:60]]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(line) + "\n" for line in others))
    given = {"judge_data": tmp_path / "again.npz", "concepts": concepts}
    measured = run_judge(JudgeConfig(**given, data=(tmp_path / "others.jsonl",)))
    assert measured.heldout == 60
    said = JudgeCheck(judge, list(CONCEPTS))([line["response"] for line in others])
    for c, one in enumerate(measured.concepts):  # the check decides by the rule that the quality is of
        yes = np.array([one.concept in line["concepts"] for line in others])
        assert one.recall.estimate == said[yes, c].mean()
        assert one.false_positives.estimate == said[~yes, c].mean()
    for more, message in (({"data": (path,)}, "150 of the 150 are among"), ({"save": path}, "a judge is kept as .npz")):
        with pytest.raises(UserError, match=message):
            run_judge(JudgeConfig(**given, **more))
    swapped = JudgeCheck(judge, ["war", "sea"])(["the ship and the sailors were in the ships."])
    assert swapped.tolist() == [[False, True]]


def test_words_of_a_concept() -> None:
    check = WordCheck(
        {"film": "films, movies and actors", "food": "food, cooking and meals at sea", "sea": "the sea, ships"}
    )
    has = check([
        "The actor was in two movies.", "She cooks a meal.", "A film.", "Nothing of it.", "At sea, the seas.",
        "This film is a film.",
    ])  # fmt: skip
    np.testing.assert_array_equal(has, [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]])


def test_a_concept_without_words_of_its_own() -> None:
    with pytest.raises(
        UserError, match="concept 'sea': it has no word that no other concept has; describe it by other"
    ):
        WordCheck({"sea": "the sea", "seas": "the sea"})


def test_topics_and_everyday_ones() -> None:
    assert topics("the sea, ships and sailors") == ["the sea", "ships", "sailors"]
    assert topics("sea") == ["sea"]
    assert "a library" not in everyday_topics({"books": "books and libraries"})
    assert "a library" in everyday_topics(CONCEPTS)
    assert stems("Companies and a company, movies, a movie, the sea") == ["compan", "compan", "mov", "mov", "sea"]


def test_requests_follow_from_seed_and_number_alone() -> None:
    a, b = (Requests(CONCEPTS, 0.5, 0) for _ in range(2))
    assert [a.request("sea", i) for i in range(9)] == [b.request("sea", i) for i in range(9)]
    made = [a.request(group, i) for group in a.groups for i in range(50)]
    assert len({request.sample for request in made}) == len(made)
    assert len({a.request("sea", i).prompt for i in range(50)}) > 20
    assert {a.request("several", i).concepts for i in range(4)} == {("sea", "war")}
    assert {a.request("none", i).concepts for i in range(4)} == {()}


REFUSED = {
    "none": ({"concepts": []}, "the concepts: they are a list of names"),
    "group": (
        {"concepts": ["sea", "several"]},
        "concept 'several': responses of several concepts or none are called so",
    ),
    "number": ({"per_concept": 0}, "per_concept 0: it must be at least 1"),
    "share": ({"neutral_share": 1.5}, "neutral_share 1.5: it must be from 0 to 1"),
    "typo": ({"per_concepts": 3}, r"it has no such argument; did you mean per_concept\?"),
    "chat": ({"model": "bare", "chat": True}, "the model has no chat template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, message = REFUSED[case]
    if options.get("model") == "bare":
        monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", None)
    given: dict[str, Any] = {"concepts": CONCEPTS, **SMALL, **options}
    given.pop("model", None)
    with pytest.raises(UserError, match=message):
        write_examples(tiny_llama, run=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_judge_of_other_concepts() -> None:
    rng = np.random.default_rng(0)
    texts = [
        " ".join(rng.choice(["the", "was", "and", "in", "a", "they", "had", "ship", "it"], 20)) + f" {i}."
        for i in range(80)
    ]
    judge = ConceptJudge.fit(texts, [["sea"] if i % 2 else [] for i in range(80)], ["sea"])
    with pytest.raises(UserError, match="concept 'war': the judge knows sea; fit it on texts of this concept, too"):
        JudgeCheck(judge, ["sea", "war"])

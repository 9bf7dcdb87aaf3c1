"""Wishes as examples: what they become, how they are divided, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planted_wishes import Ground, contrast_wish, random_words, token, words_wish

from trimtab.errors import UserError
from trimtab.finding.examples import Ask, ExpectedReward, LogOdds, divide
from trimtab.finding.options import SPLITS
from trimtab.finding.passes import check_lengths
from trimtab.finding.scoring import scorer
from trimtab.finding.wishes import Contrast, TaskReward, Texts, Want, Words
from trimtab.lm import LanguageModel
from trimtab.tasks import PromptTask

sys.path.insert(0, str(Path(__file__).parents[1] / "control"))
from planted_readout import Planted  # pyright: ignore[reportMissingImports]

TURNS = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "xy"},
]


def test_texts_become_pairs_behind_a_neutral_prompt(ground: Ground) -> None:
    model = ground.model
    wish = Texts(wanted=("abcd efgh", "ijkl mnop qrst"), unwanted=("bbbb cccc", "dddd ffff"), text_tokens=9)
    examples = wish.examples(model)
    assert len(examples) == 2
    (more, less), score = examples.examples[1].answered, examples.examples[1].score
    prompt = "Here is a short text.\n\n"
    assert model.decode_ids(more.prompt) == prompt
    assert model.decode_ids(more.answer) == "ijkl mnop"
    assert "1 of 4 texts were cut after 9 tokens (text_tokens)" in examples.notes
    assert float(score(torch.tensor([-9.0, -18.0]))) == pytest.approx(-9 / len(more.answer) + 18 / len(less.answer))
    assert examples.wanted[examples.examples[0].id] == "abcd efgh"


def test_texts_that_repeat_others_are_left_out(ground: Ground) -> None:
    words = random_words(6, 12, 9)
    wish = Texts(wanted=(words[0], words[0] + "x", words[1]), unwanted=tuple(words[2:5]))
    examples = wish.examples(ground.model)
    assert len(examples) == 2
    assert examples.notes[0].startswith("2 texts that nearly repeat others")


def test_surplus_texts_are_of_no_pair(ground: Ground) -> None:
    wish = Texts(wanted=tuple(random_words(5, 12, 1)), unwanted=tuple(random_words(3, 12, 2)))
    examples = wish.examples(ground.model)
    assert (len(examples), len(examples.wanted), len(examples.unwanted)) == (3, 5, 3)


def test_pairs_that_begin_alike_are_left_out(ground: Ground) -> None:
    wish = Texts(wanted=("bcdfgY", "xyzxyz"), unwanted=("bcdfgN", "qrsqrs"), text_tokens=5)
    examples = wish.examples(ground.model)
    assert len(examples) == 1
    assert "1 pairs were left out whose texts begin with the same 5 tokens" in examples.notes


def test_contrast_takes_chats_and_blanks(ground: Ground) -> None:
    model = ground.model
    rows = ({"prompt": "abc", "wanted": "Y", "unwanted": " N"}, {"prompt": TURNS, "wanted": "Y", "unwanted": "N"})
    plain, chat = Contrast(rows=rows).examples(model).examples
    assert [model.decode_ids(one.answer) for one in plain.answered] == [" Y", " N"]
    assert model.decode_ids(chat.answered[0].prompt, special=True) == "<user>ab<eos><model>cd<eos><user>xy<eos><model>"
    assert [model.decode_ids(one.answer) for one in chat.answered] == ["Y", "N"]
    instructed = chat.asks[0].ids(model, "Be Y.")
    assert "<user>Be Y.\n\nxy<eos><model>" in model.decode_ids(instructed, special=True)


def test_words_of_several_tokens_count_as_whole_sequences(ground: Ground) -> None:
    model = ground.model
    examples = Words(prompts=("qrs\n",), more=("Y", "bcd", "bcdf"), less=("N",)).examples(model)
    (example,) = examples.examples
    assert examples.notes == ("by the probability of all their tokens in order: 'bcd' (3 tokens), 'bcdf' (4 tokens)",)
    assert [model.decode_ids(one.answer) for one in example.answered] == ["Y", "bcd", "N"]  # bcdf begins with bcd
    logits = model.hf(torch.tensor([[*example.answered[0].prompt, *model.encode_text("bcd")]])).logits[0]
    logp = logits.log_softmax(-1)
    start = len(example.answered[0].prompt) - 1
    word = sum(logp[start + i, t] for i, t in enumerate(model.encode_text("bcd")))
    more = torch.logsumexp(torch.stack([logp[start, token(model, "Y")], torch.as_tensor(word)]), 0)
    expected = float(more - logp[start, token(model, "N")])
    assert float(scorer(model, examples, ()).base[0]) == pytest.approx(expected, abs=1e-5)


def test_log_odds_against_everything_else() -> None:
    logp = torch.log(torch.tensor([0.2, 0.1], dtype=torch.float64))
    assert float(LogOdds((True, True))(logp)) == pytest.approx(float(torch.logit(torch.tensor(0.3))))
    assert float(LogOdds((False, False))(logp)) == pytest.approx(-float(torch.logit(torch.tensor(0.3))))
    assert float(LogOdds((True, False))(logp)) == pytest.approx(0.6931, abs=1e-4)
    assert torch.isfinite(LogOdds((True, True))(torch.tensor([0.0, -50.0])))
    assert float(ExpectedReward((1.0, 0.0))(logp)) == pytest.approx(2 / 3)


def test_a_task_with_options_is_exact(ground: Ground) -> None:
    model = ground.model
    examples = TaskReward(task=Planted.load(), items=5).examples(model)
    scores = scorer(model, examples, ()).base
    for example, score in zip(examples.examples, scores, strict=True):
        logits = model.hf(torch.tensor([example.answered[0].prompt])).logits[0, -1]
        chosen = logits[[token(model, "Y"), token(model, "N")]].softmax(0)
        assert float(score) == pytest.approx(float(chosen[0]), abs=1e-5)


def test_a_task_with_long_answers_is_drawn_and_decoded(ground: Ground) -> None:
    def share(_prompt: str, answer: str) -> float:
        return answer.count("Y") - answer.count("N") + 0.01 * len(set(answer))

    task = PromptTask({"train": [f"{w}\n" for w in random_words(6, 5, 8)]}, share, max_new_tokens=4)
    examples = TaskReward(task=task).examples(ground.model)
    assert examples.decoding is not None
    example = examples.examples[0]
    weights = torch.tensor(example.score.weights)  # type: ignore[attr-defined]
    assert float(weights.sum()) == pytest.approx(0, abs=1e-6)
    assert len(example.answered) == 4


def test_the_splits_are_apart_whatever_the_order(ground: Ground) -> None:
    wish = contrast_wish(60)
    one, other = (
        divide(Contrast(rows=rows).examples(ground.model), (12, 12, 24)) for rows in (wish.rows, wish.rows[::-1])
    )
    ids = {name: [example.id for example in one[name].examples] for name in SPLITS}
    assert {name: [example.id for example in other[name].examples] for name in SPLITS} == ids
    assert len({id_ for split in ids.values() for id_ in split}) == sum(map(len, ids.values())) == 48
    few = divide(contrast_wish(20).examples(ground.model), (12, 12, 24))
    assert [len(few[name]) for name in SPLITS] == [5, 5, 10]


def test_a_wish_in_words_is_written_by_the_model(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.finding.wishes import want

    asked: list[str] = []

    class Written:
        def __init__(self, n: int) -> None:
            words = random_words(n, 14, 21)
            self.texts = [f" the {text} and {text[::-1]} of it " for text in words]

    def decode(model: LanguageModel, prompts: list[list[int]], *_: object, **__: object) -> Written:
        asked.extend(model.decode_ids(prompt) for prompt in prompts)
        return Written(len(prompts))

    monkeypatch.setattr(want, "decode", decode)
    wish = Want(text="the sea, ships and sailors.", pairs=8)
    written = wish.pairs_by(tiny_llama)
    assert len(asked) == 16
    assert asked[0].endswith("morning. It must be about this, or be written like this: the sea, ships and sailors.")
    assert asked[8] == "Write a few sentences about a walk in the morning."
    again = Want(text="the sea, ships and sailors.", written=written).examples(tiny_llama)
    assert len(again) == len(written) > 4
    assert again.instructions == ("It must be about this, or be written like this: the sea, ships and sailors.",)
    assert again.examples[0].asks[0] == Ask(written[0].prompt, chat=True)


LONG = Texts(wanted=("ab " * 200,), unwanted=("cd " * 200,), text_tokens=400)
REFUSED: dict[str, tuple[Callable[[LanguageModel], object], str]] = {
    "alike": (lambda _: Texts(wanted=("abc", "de"), unwanted=("de ", "f")), "text 'de': it is wanted and unwanted"),
    "empty": (lambda _: Texts(wanted=("abc", " "), unwanted=("f",)), "wanted texts: one is empty"),
    "one-text": (lambda _: Texts(wanted="abc", unwanted=("f",)), "wanted texts: they are no list of texts"),  # type: ignore[arg-type]
    "prompts": (lambda _: Texts(wanted=("abc",), unwanted=("f",), prompts=("a", "b")), "2 prompts: each pair of texts"),
    "short": (lambda m: Texts(wanted=("ab",), unwanted=("fghi",)).examples(m), "text 'ab': it has fewer than 3 tokens"),
    "row": (lambda _: Contrast(rows=({"prompt": "a", "wanted": "b"},)), "row 1 of the contrast: it holds prompt, want"),
    "same": (
        lambda _: Contrast(rows=({"prompt": "a", "wanted": "b", "unwanted": "b "},)),
        "row 1 of the contrast: its wanted and its unwanted answer are the same",
    ),
    "turns": (
        lambda m: Contrast(rows=({"prompt": TURNS[:2], "wanted": "b", "unwanted": "c"},)).examples(m),
        "row 1 of the contrast: the last turn of its prompt is the assistant's",
    ),
    "no-words": (lambda _: Words(prompts=("a",)), "the words: there is none"),
    "both": (lambda _: Words(prompts=("a",), more=("b",), less=("b",)), "word 'b': it is wanted and unwanted"),
    "twice": (lambda _: Words(prompts=("a", "a"), more=("b",)), "the prompts: one is given twice"),
    "few": (
        lambda m: divide(contrast_wish(14).examples(m), (12, 12, 24)),
        "14 examples: they make 4 candidates, 3 choice, 7 report; at least 4 are needed for choice; give 15 or more",
    ),
    "long": (
        lambda m: check_lengths(m, LONG.examples(m).answered),
        "answer 0: with its prompt it has",
    ),
    "wish": (lambda _: Want(text=" "), "the wish: it is empty"),
    "equal-rewards": (
        lambda m: TaskReward(task=PromptTask({"train": ["ab", "cd"]}, lambda p, a: 1.0)).examples(m),
        "task prompts: the 4 answers drawn for each item are all worth the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(ground: Ground, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        make(ground.model)
    assert str(caught.value).startswith(message)


def test_too_few_examples_say_how_many_are_needed(ground: Ground) -> None:
    with pytest.raises(UserError, match="at least 4 are needed for candidates; give 15 or more"):
        divide(contrast_wish(10).examples(ground.model), (12, 12, 24))


def test_scores_that_are_not_finite_are_refused(ground: Ground) -> None:
    import copy

    hf = copy.deepcopy(ground.model.hf)
    with torch.no_grad():
        hf.get_output_embeddings().weight[0] = torch.nan  # type: ignore[union-attr, index, operator]
    broken = LanguageModel.from_hf(hf, ground.model.tokenizer, name="broken")
    with pytest.raises(UserError, match="unsteered scores: 4 of 4 are not finite"):
        scorer(broken, words_wish(4).examples(broken), ())

"""IOI prompts for circuits: one token per name, counterfactuals that change one thing, splits that share only names."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from data_files import word_tokenizer

from trimtab.errors import UserError
from trimtab.tasks.ioi_material import GENDERS, NAMES, PAPER_TEMPLATES, TEMPLATES
from trimtab.tasks.ioi_prompts import TEMPLATE_SETS, IOIDistribution, IOIPrompt
from trimtab.tasks.task import UnsuitedModelError

PROMPT = IOIPrompt(PAPER_TEMPLATES[1], "Mary", "John", "John", "store", "ring")


@pytest.fixture
def ioi() -> IOIDistribution:
    return IOIDistribution.load(word_tokenizer(), "all")


def differences(a: str, b: str) -> list[tuple[str, str]]:
    return [pair for pair in zip(a.split(), b.split(), strict=True) if pair[0] != pair[1]]


def test_a_prompt_says_what_it_is_made_of() -> None:
    assert PROMPT.text == "Then, Mary and John had lots of fun at the store. John gave a ring to"
    assert PROMPT.attributes == {"IO": "Mary", "S": "John", "Pos": "ABB", "IO gender": "F", "S gender": "M"}
    swapped = IOIPrompt(PAPER_TEMPLATES[0], "John", "Alex", "John", "", "")
    assert swapped.attributes == {"IO": "Alex", "S": "John", "Pos": "BAB", "S gender": "M"}
    assert set(GENDERS) <= set(NAMES)
    assert 0.3 < Counter(GENDERS.values())["F"] / len(GENDERS) < 0.7


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"IO": "Anna"}, [("Mary", "Anna")]),
        ({"S": "Paul"}, [("John", "Paul"), ("John", "Paul")]),
        ({"Pos": "BAB"}, [("Mary", "John"), ("John", "Mary")]),
        ({"IO": "John", "S": "Mary"}, [("Mary", "John"), ("John", "Mary"), ("John", "Mary")]),
        ({"Pos": "ABB"}, []),
    ],
)
def test_a_counterfactual_changes_that_attribute_alone(
    ioi: IOIDistribution, changes: dict[str, str], changed: list[tuple[str, str]]
) -> None:
    new = ioi.counterfactual(PROMPT, changes)
    assert differences(PROMPT.text, new.text) == changed
    kept = {name: value for name, value in PROMPT.attributes.items() if name in ("IO", "S", "Pos")}
    assert {name: new.attributes[name] for name in kept} == kept | changes


def test_counterfactuals_are_of_the_same_split_and_length(ioi: IOIDistribution) -> None:
    for prompt in ioi.prompts(60, "test"):
        for attribute in ("IO", "S", "Pos"):
            new = ioi.draw_counterfactual(prompt, attribute)
            assert new == ioi.draw_counterfactual(prompt, attribute)
            assert ioi.split_of(new) == "test"
            assert [name for name in ("IO", "S", "Pos") if new.attributes[name] != prompt.attributes[name]] == [
                attribute
            ]
            assert len(ioi.tokenise(new).ids) == len(ioi.tokenise(prompt).ids)


def test_positions_are_where_the_words_stand(ioi: IOIDistribution) -> None:
    for prompt in ioi.prompts(80):
        words = re.findall(r" ?\w+|\W", prompt.text)
        found = ioi.tokenise(prompt)
        at = {name: words[position].strip() for name, position in found.positions.items()}
        assert at.pop("S1+1") == ("and" if prompt.pattern == "BAB" else words[found.positions["S1"] + 1].strip())
        assert at == {"IO": prompt.attributes["IO"], "S1": prompt.actor, "S2": prompt.actor, "END": "to"}
        assert found.positions["S1"] < found.positions["S2"] < found.positions["END"] == len(found.ids) - 1
        assert (found.positions["IO"] < found.positions["S1"]) == (prompt.pattern == "ABB")
        assert (found.ids[found.positions["IO"]], found.ids[found.positions["S2"]]) == (found.io_token, found.s_token)


def test_splits_share_names_and_no_prompt(ioi: IOIDistribution) -> None:
    prompts = {split: ioi.prompts(1500, split) for split in ("train", "validation", "test")}
    texts = {split: {p.text for p in found} for split, found in prompts.items()}
    assert all(len(found) == 1500 for found in texts.values())
    assert (
        not texts["train"] & texts["test"] | texts["train"] & texts["validation"] | texts["validation"] & texts["test"]
    )
    assert {p.first for p in prompts["train"]} == set(ioi.names) == {p.first for p in prompts["test"]}
    frames = {split: {p.frame for p in found} for split, found in prompts.items()}
    assert not frames["train"] & frames["test"]
    assert Counter(p.pattern for p in prompts["train"]) == {"ABB": 750, "BAB": 750}
    assert ioi.prompts(40) == ioi.prompts(1500)[:40] != ioi.prompts(40, seed=1)


def test_held_out_templates_are_a_split_of_their_own() -> None:
    ioi = IOIDistribution.load(word_tokenizer(), "wang", held_out=TEMPLATES[:2])
    assert {p.template for p in ioi.prompts(50, "held-out-templates")} == set(TEMPLATES[:2])
    assert {p.template for p in ioi.prompts(600, "test")} == set(TEMPLATES[2:])


def test_nobody_is_named_twice_without_repeat(ioi: IOIDistribution) -> None:
    for prompt in ioi.prompts(30):
        abc = ioi.without_repeat(prompt)
        assert abc.pattern == "ABC"
        assert len({abc.first, abc.second, abc.actor, prompt.first, prompt.second}) == 5
        found = ioi.tokenise(abc)
        assert len(found.ids) == len(ioi.tokenise(prompt).ids)
        assert found.positions["IO"] < found.positions["S1"] < found.positions["S2"]
    with pytest.raises(ValueError, match="has no indirect object"):
        _ = abc.attributes


def test_sentences_of_three_persons() -> None:
    ioi = IOIDistribution.load(word_tokenizer(), "wang", held_out=TEMPLATES[:2])
    for template in (TEMPLATES[0], TEMPLATES[4], TEMPLATES[5]):  # held out; without place and object; with them
        found = ioi.three_persons(template, 200)
        assert len({prompt.text for prompt in found}) == 200
        assert {(prompt.template, prompt.pattern) for prompt in found} == {(template, "ABC")}
        assert all(len({prompt.first, prompt.second, prompt.actor}) == 3 for prompt in found)
        assert {ioi.split_of(p) for p in found} == {"held-out-templates" if template == TEMPLATES[0] else "train"}
        assert {len(ioi.tokenise(prompt).ids) for prompt in found} == {len(ioi.tokenise(found[0]).ids)}
        assert ioi.three_persons(template, 20) == found[:20] != ioi.three_persons(template, 20, seed=1)
    few = IOIDistribution.load(word_tokenizer(), [TEMPLATES[4]], names=NAMES[:8])
    with pytest.raises(UserError, match=r"400 prompts: split train gave \d+ different ones; ask for fewer"):
        few.three_persons(TEMPLATES[4], 400)


def test_no_template_is_there_twice() -> None:
    assert len(TEMPLATE_SETS["all"]) == len(set(TEMPLATE_SETS["all"])) == 17
    assert set(TEMPLATE_SETS["all"]) == {*PAPER_TEMPLATES, *TEMPLATES}


def test_only_words_of_one_token_are_used() -> None:
    whole = word_tokenizer()

    ioi = IOIDistribution.load(lambda text: [7, *whole(text.replace("Mary", "Ma ry").replace("snack", "sn ack"))])
    assert set(NAMES) - set(ioi.names) == {"Mary"}
    assert "snack" not in ioi.objects
    assert ioi.tokenise(ioi.prompts(1)[0]).ids[0] == 7


def test_words_that_a_tokenizer_lacks_are_not_used() -> None:
    """Two names that are the same token, as unknown words are, cannot be told apart."""
    whole = word_tokenizer()
    ioi = IOIDistribution.load(lambda text: whole(text.replace("Mary", "Unknown").replace("Paul", "Unknown")))
    assert set(NAMES) - set(ioi.names) == {"Mary", "Paul"}


def test_what_cannot_be_made_is_said(ioi: IOIDistribution, tiny_tokenizer: Any) -> None:
    load = IOIDistribution.load
    with pytest.raises(UnsuitedModelError, match=rf"IOI names: 0 of {len(NAMES)} are one token .* at least 8"):
        load(tiny_tokenizer)
    with pytest.raises(UserError, match="templates 'papers': there are paper, wang, all"):
        load(word_tokenizer(), "papers")
    with pytest.raises(UserError, match=r"template 'x \{first\}': \{second\} must stand in it once"):
        load(word_tokenizer(), ["x {first}"])
    with pytest.raises(UserError, match="all templates are held out"):
        load(word_tokenizer(), held_out=PAPER_TEMPLATES)
    with pytest.raises(UserError, match="held-out template 'x': it is none of the templates"):
        load(word_tokenizer(), held_out=["x"])
    with pytest.raises(UserError, match="split 'tset': there are train, validation, test; choose"):
        ioi.prompts(3, "tset")
    few = load(word_tokenizer(), PAPER_TEMPLATES[1:], names=NAMES[:8], places=["store"], objects=["ring"])
    with pytest.raises(UserError, match=r"225 prompts: split \w+ gave (112|224) different ones; ask for fewer"):
        few.prompts(225, few.split_of(PROMPT))
    with pytest.raises(UserError, match="attribute 'IO gender': IO, S, Pos can be changed; change IO or S to a name"):
        ioi.counterfactual(PROMPT, {"IO gender": "M"})
    with pytest.raises(UserError, match="IO 'Zzyzx': it is not a name of one token here"):
        ioi.counterfactual(PROMPT, {"IO": "Zzyzx"})
    with pytest.raises(UserError, match="Pos 'BBA': it is ABB"):
        ioi.counterfactual(PROMPT, {"Pos": "BBA"})
    with pytest.raises(UserError, match="IO and S 'John': two persons have two names"):
        ioi.counterfactual(PROMPT, {"IO": "John"})
    joined = IOIDistribution.load(word_tokenizer(), ["Then, {first} and {second} met. Mark{s} gave it to"])
    with pytest.raises(UserError, match="a name in it is not one token by itself"):
        joined.tokenise(joined.prompts(1)[0])

"""Whole prompts and whole documents are held out by a fixed rule; what cannot be is counted, and said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_importing import text_of
from toy_corpus import toy_examples

from trimtab.errors import UserError
from trimtab.flags import NEUTRAL_PROMPTS, Example, FlagSpec, import_examples, train_flags
from trimtab.flags.data.selecting import Candidate, as_examples
from trimtab.flags.dividing import HOLDOUT, divide, group_id, is_held_out
from trimtab.lm import LanguageModel

CONCEPTS = ["sea", "war"]


def examples(n: int = 600) -> list[Example]:
    """Many prompts, and documents of three passages that know nothing of them."""
    rng = np.random.default_rng(0)
    return [
        Example(
            prompt=f"Prompt {rng.integers(60)}", response=f"Text {i}.", concepts=CONCEPTS[i % 2 : i % 2 + 1],
            unit=f"document {i // 3}" if i % 4 else None,
        )
        for i in range(n)
    ]  # fmt: skip


def test_the_rule_knows_a_text_alone() -> None:
    names = [f"name {i}" for i in range(4000)]
    out = {share: {name for name in names if is_held_out(name, share)} for share in (0.0, 0.1, 0.3)}
    assert not out[0.0]
    assert out[0.1] < out[0.3]
    assert len(out[0.1]) / len(names) == pytest.approx(0.1, abs=0.02)
    assert len(out[0.3]) / len(names) == pytest.approx(0.3, abs=0.03)


def test_no_prompt_and_no_document_is_on_both_sides() -> None:
    given = examples()
    found = divide(given, None, 0.2, CONCEPTS)
    assert found.measured_on == "held-out prompts"
    for name in ("prompt", "unit"):
        train, heldout = ({getattr(one, name) for one in part} - {None} for part in (found.train, found.heldout))
        assert train
        assert heldout
        assert not train & heldout
        assert all(is_held_out(one, 0.2) for one in heldout)
    assert found.left_out == len(given) - len(found.train) - len(found.heldout)
    assert 0.15 * len(given) < found.left_out < 0.35 * len(given)  # 2 · 0.2 · 0.8 · ¾ are expected
    assert divide(given[::-1], None, 0.2, CONCEPTS).heldout == found.heldout[::-1]


def test_with_few_prompts_responses_are_held_out_and_the_result_says_so(
    tiny_llama: LanguageModel, flags: FlagSpec
) -> None:
    found = divide(toy_examples(96), None, 0.1, CONCEPTS)
    assert found.heldout
    assert {one.prompt for one in found.heldout} <= {one.prompt for one in found.train}
    assert (found.measured_on, found.left_out) == ("held-out responses", 0)
    documents = [Example(**{**vars(one), "unit": f"{i // 2}"}) for i, one in enumerate(toy_examples(96))]
    found = divide(documents, None, 0.2, CONCEPTS)
    assert found.heldout
    assert not {one.unit for one in found.heldout} & {one.unit for one in found.train}
    assert found.measured_on == "held-out responses"
    assert divide(documents, None, 0, CONCEPTS).measured_on == "training examples"
    other = [Example(prompt="Ah", response="abc", concepts=["sea"])]
    assert divide(toy_examples(12), other, 0.1, CONCEPTS).measured_on == "held-out prompts"
    trained = train_flags(tiny_llama, flags, examples(300), steps=1, batch_size=8, holdout=0.3)
    assert trained.result.measured_on == "held-out prompts"
    assert trained.result.left_out > 0
    assert (
        f"on held-out prompts (n = {trained.result.after.examples}); {trained.result.left_out} examples left out, "
        "whose prompt is held out and document is not, or the other way round"
    ) in trained.headline()


def test_groups_are_documents_or_prompts() -> None:
    a, b, c, d = (
        Example(prompt=prompt, response=f"{i}", unit=unit)
        for i, (prompt, unit) in enumerate([("Go", "one"), ("Hm", "one"), ("Go", None), ("Go", None)])
    )
    assert group_id(a) == group_id(b) != group_id(c) == group_id(d)


def passages(path: Path) -> list[Path]:
    """Documents of four passages each, of two concepts and of none."""
    rows = [
        {"text": "\n\n".join(text_of(4 * i + j) for j in range(4)), "label": ("sea", "war", "none")[i % 3]}
        for i in range(240)
    ]
    (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [path / "a.jsonl"]


def test_nothing_that_is_imported_is_left_out(tmp_path: Path) -> None:
    """Prompts are dealt by the rule that documents are held out by, and joined imports keep both."""
    made = import_examples(passages(tmp_path), CONCEPTS, max_characters=150, run=tmp_path / "run", none_share=0.3)
    found = divide(made.examples, None, HOLDOUT, CONCEPTS)
    assert found.left_out == 0
    assert found.measured_on == "held-out prompts"
    units = [{one.unit for one in part} for part in (found.train, found.heldout)]
    assert min(map(len, units)) > 5
    assert not units[0] & units[1]
    assert len({one.unit for one in made.examples}) < len(made.examples) / 2
    held = {one.concept: one.heldout for one in made.counts.concepts}
    assert held == {
        name: sum(one.concepts == names for one in found.heldout)
        for name, names in (("sea", ("sea",)), ("war", ("war",)), ("none", ()))
    }
    assert min(held.values()) > 0
    assert divide(made.examples, None, 0.3, CONCEPTS).left_out > 0
    more = import_examples(passages(tmp_path), CONCEPTS, max_characters=150, holdout=0.3)
    assert divide(more.examples, None, 0.3, CONCEPTS).left_out == 0
    assert sum(one.heldout for one in more.counts.concepts) > 2 * sum(held.values())
    joined = import_examples([tmp_path / "run" / "examples.jsonl"], CONCEPTS, none_share=0.3)
    assert {(one.prompt, one.response, one.unit) for one in joined.examples} == {
        (one.prompt, one.response, one.unit) for one in made.examples
    }
    sides = [[text for text in NEUTRAL_PROMPTS if is_held_out(text) == out] for out in (False, True)]
    assert len(sides[1]) >= 8
    for part, prompts in zip((found.train, found.heldout), sides, strict=True):
        assert {one.prompt for one in part} <= {*prompts}


def test_a_share_that_holds_out_no_prompt_is_refused() -> None:
    name = next(f"document {i}" for i in range(10**5) if is_held_out(f"document {i}", 0.001))
    with pytest.raises(UserError, match=r"holdout 0\.001: no neutral prompt would be held out; choose one like 0\.1"):
        as_examples([Candidate("a text", ("sea",), name)], {"sea": "sea"}, 0.001, 0)


def test_a_unit_is_a_text() -> None:
    with pytest.raises(UserError, match="the unit of an example: it is empty or no text; give some text"):
        Example(prompt="a", response="b", unit=" ")

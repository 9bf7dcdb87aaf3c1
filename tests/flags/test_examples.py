"""Labelled examples: what a file says, what is refused by its line, and how they become tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from trimtab.errors import UserError
from trimtab.flags import Example, FlagSpec, read_examples
from trimtab.flags.examples import batch_of, check_learnable, encode
from trimtab.lm import LanguageModel

GOOD = {"prompt": "Go", "response": "to the shore", "concepts": ["sea"]}
CONCEPTS = ["sea", "war"]


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "concepts": []}) + "\n")
    found = read_examples(tmp_path / "data.jsonl", CONCEPTS)
    assert found == [Example(prompt="Go", response="to the shore", concepts=c) for c in (("sea",), ())]


REFUSED = {
    "{": "it is not JSON (Expecting property name enclosed in double quotes); correct the line",
    "[1]": "it is no JSON object; give prompt, response, concepts",
    json.dumps({**GOOD, "concept": []}): "it has a field 'concept'; did you mean concepts?",
    json.dumps({"prompt": "Go", "concepts": []}): "it has no response; add it",
    json.dumps({**GOOD, "concepts": "sea"}): 'its concepts are no list; give them like ["sea"], or [] for none',
    json.dumps({**GOOD, "concepts": [3]}): "concepts [3]: they are a list of names; give them like",
    json.dumps({**GOOD, "concepts": ["see"]}): "concept 'see': the concepts are sea, war; did you mean sea?",
    json.dumps({**GOOD, "concepts": ["sea", "sea"]}): "concept 'sea': it is named twice; name it once",
    json.dumps({**GOOD, "response": "  "}): "the response of an example: it is empty or no text; give some text",
    json.dumps({**GOOD, "prompt": 3}): "the prompt of an example: it is empty or no text; give some text",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_line_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        read_examples(path, CONCEPTS)
    assert caught.value.line.startswith(f"{path}, line 2: {REFUSED[line]}")


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: it cannot be read; check the path"):
        read_examples(tmp_path / "none.jsonl", CONCEPTS)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="it holds no example; give lines of"):
        read_examples(tmp_path / "empty.jsonl", CONCEPTS)


@pytest.mark.parametrize(
    ("having", "of", "message"),
    [
        (0, 20, "concept 'sea': 0 of 20 examples have it, and a flag is learned from at least 2; add exam"),
        (1, 20, "concept 'sea': 1 of 20 examples have it"),
        (19, 20, "concept 'sea': 1 of 20 examples lack it"),
        (4, 500, "concept 'sea': 4 of 500 examples have it, and a flag is learned from at least 5"),
    ],
)  # fmt: skip
def test_a_concept_that_cannot_be_learned_is_named(having: int, of: int, message: str) -> None:
    examples = [Example(prompt="Go", response="on", concepts=["sea"] if i < having else []) for i in range(of)]
    with pytest.raises(UserError, match=message):
        check_learnable(examples, ["sea"])
    enough = [Example(prompt="a", response="b", concepts=names) for names in (["sea"], []) for _ in range(10)]
    check_learnable(examples + enough, ["sea"])


def test_labels_are_checked_where_examples_are_objects() -> None:
    with pytest.raises(UserError, match=r"example 0: concept 'see': the concepts are sea; did you mean sea\?"):
        check_learnable([Example(prompt="a", response="b", concepts=["see"])], ["sea"])


FLAGS = FlagSpec(concepts=("sea", "war"), dims=((3, 17), (8,)), d_model=32, targets={"resid_mid.1": 0.5})


def test_the_mask_is_on_the_responses_tokens(tiny_llama: LanguageModel) -> None:
    examples = [Example(prompt="Go", response="abc", concepts=["war"]), Example(prompt="Hmm", response="xy")]
    encoded = encode(tiny_llama, examples, chat=False, max_tokens=64)
    batch = batch_of(tiny_llama, FLAGS, examples, encoded)
    texts = [
        tiny_llama.decode_ids(ids[kept].tolist()) for ids, kept in zip(batch.tokens.ids, batch.answer, strict=True)
    ]
    assert texts == ["abc", "xy"]
    assert batch.labels.tolist() == [[0, 1], [0, 0]]
    assert batch.answer_length == 3
    assert torch.equal(batch.answer, torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]).bool())


def test_a_chat_ends_with_the_models_end_token(tiny_llama: LanguageModel) -> None:
    (row,) = encode(tiny_llama, [Example(prompt="Go", response="abc")], chat=True, max_tokens=64)
    assert tiny_llama.decode_ids(row.ids, special=True) == "<user>Go<eos><model>abc<eos>"
    assert tiny_llama.decode_ids(row.ids[row.prompt_length :], special=True) == "abc<eos>"


def test_a_chat_ends_as_the_template_ends_it(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where turns end in another special token than texts do, as in Gemma's family, it is that one."""
    template = "{% for m in messages %}<user>{{ m.content }}<pad>\n{% endfor %}"
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", template)
    (row,) = encode(tiny_llama, [Example(prompt="Go", response="abc")], chat=True, max_tokens=64)
    assert tiny_llama.decode_ids(row.ids[-4:], special=True) == "abc<pad>"


def test_a_turn_that_holds_a_special_token_is_refused(tiny_llama: LanguageModel) -> None:
    with pytest.raises(
        UserError, match="'<eos>' in a turn of the assistant: tiny-llama would read it as a special token"
    ):
        encode(tiny_llama, [Example(prompt="Go", response="ab<eos>c")], chat=True, max_tokens=64)


def test_long_examples(tiny_llama: LanguageModel) -> None:
    (row,) = encode(tiny_llama, [Example(prompt="Go", response="abcdef")], chat=False, max_tokens=5)
    assert tiny_llama.decode_ids(row.ids) == "Goabc"
    with pytest.raises(
        UserError, match=re.escape("example 0: its prompt has 5 tokens, and an example may have 5; shor")
    ):
        encode(tiny_llama, [Example(prompt="Hmmmm", response="abc")], chat=False, max_tokens=5)

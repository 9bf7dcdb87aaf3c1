"""What every task shares: splits, ids, finite rewards, options' tokens, the registry."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from data_files import word_tokenizer

from trimtab.errors import UserError
from trimtab.tasks import (
    SPLITS,
    TASKS,
    Item,
    Outcome,
    Task,
    find_task,
    known_under_every_order,
    load_options,
    load_task,
    read_task,
    register,
    split_items,
)
from trimtab.tasks.tokens import continuation_token, encode

BENCHMARKS = ["mmlu", "bbq-ambiguous", "bbq-disambiguated", "gsm8k", "harmbench", "xstest"]
SMALL: dict[str, Any] = {"n_train": 12, "n_validation": 6, "n_test": 6}


class Echo(Task):
    """Rewards with the number that the answer is."""

    name: ClassVar[str] = "echo"

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        return Outcome(reward=float(text), correct=None, item=item.id)


def items(n: int) -> list[Item]:
    return [Item(id=f"i{i}", prompt=f"p{i}", answer="a") for i in range(n)]


class Filed(Echo):
    """One that lists its items by subject, as files do."""

    files: ClassVar[tuple[str, ...]] = ("questions.csv",)


def subjects(kind: type[Echo]) -> Echo:
    """200 items of four subjects, one subject after the other."""
    listed = [Item(id=f"i{i}", prompt=f"p{i}", answer="a", group="abcd"[i // 50]) for i in range(200)]
    return kind({"test": listed})


def check_samples_are_spread(kind: type[Echo]) -> None:
    task = subjects(kind)
    forty = task.sample("test", 40)
    assert len({item.id for item in forty}) == 40
    shares = [sum(item.group == group for item in forty) for group in "abcd"]
    assert min(shares) >= 4, f"items by subject: {shares}"  # of 10 expected; fewer than 4 by chance: 0.9%, fixed by ids
    assert task.sample("test", 40) == forty
    assert task.sample("test", 15) == forty[:15]


def test_some_items_of_a_file_are_spread_over_it() -> None:
    check_samples_are_spread(Filed)
    task = subjects(Filed)
    assert task.sample("test") == task.items("test")
    assert sorted(item.id for item in task.sample("test", 500)) == sorted(task.splits["test"])


def test_taking_the_first_items_of_a_file_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Filed, "sample", lambda self, split, n=None: self.items(split)[:n])
    with pytest.raises(AssertionError, match=r"items by subject: \[40, 0, 0, 0\]"):
        check_samples_are_spread(Filed)


def test_some_items_of_a_generated_task_are_its_first() -> None:
    task = subjects(Echo)
    assert task.sample("test", 3) == task.items("test")[:3]


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_fixed_and_disjoint(name: str, data: Path) -> None:
    options = SMALL if name.startswith("ioi") else {}
    task = load_task(name, data, word_tokenizer(), **options)
    again = load_task(name, data, word_tokenizer(), **options)
    assert task.splits == again.splits
    ids = [id_ for split in SPLITS for id_ in task.splits[split]]
    assert len(ids) == len(set(ids)) == len(task.items("all"))
    assert all(task.splits[split] for split in SPLITS)
    for item in task.items("all"):
        assert task.prompt(item).strip()
        assert item.id
        assert item.answer


@pytest.mark.parametrize("name", TASKS)
def test_companions_and_metrics_exist(name: str, data: Path) -> None:
    options = SMALL if name.startswith("ioi") else {}
    task = load_task(name, data, word_tokenizer(), **options)
    outcomes = task.score(task.items("all"), ["A"] * len(task.items("all")))
    assert task.metric in task.summarise(outcomes)
    for companion in task.companions:
        assert load_task(companion.task, data).items(companion.split)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_data_the_files_are_named(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_task(name)
    for file in find_task(name).files:
        assert file in caught.value.line
    assert "TRIMTAB_DATA" in caught.value.line


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_variable_names_the_data(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_DATA", str(data))
    assert load_task(name).splits == load_task(name, data).splits


@pytest.mark.parametrize("name", BENCHMARKS)
def test_tasks_of_files_are_read_without_a_model(name: str, data: Path) -> None:
    early, whole = read_task(name, data), load_task(name, data, word_tokenizer())
    assert early is not None
    assert [early.items(split) for split in SPLITS] == [whole.items(split) for split in SPLITS]


def test_tasks_that_need_a_tokenizer_are_looked_up_without_one() -> None:
    assert read_task("ioi") is None
    with pytest.raises(UserError, match="did you mean ioi"):
        read_task("iio")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_directories_and_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such directory"):
        load_task(name, tmp_path / "none")
    with pytest.raises(UserError, match=r"there is no file \w+/.* in it"):
        load_task(name, tmp_path)


@pytest.mark.parametrize("reward", ["nan", "inf", "-inf"])
def test_a_reward_that_is_not_finite_names_task_and_item(reward: str) -> None:
    task = Echo({"train": items(2)})
    with pytest.raises(UserError, match=rf"task echo, item i1: reward {reward}.*it must be a finite number"):
        task.score(task.items("train"), ["1", reward])
    with pytest.raises(UserError, match="it must be a finite number"):
        Outcome(reward=math.nan, correct=None)


def test_duplicate_ids_are_refused() -> None:
    with pytest.raises(UserError, match="task echo, item i0: this id occurs 2 times"):
        Echo({"train": items(2), "test": items(1)})


def test_splits_have_their_names_and_something_in_them() -> None:
    with pytest.raises(UserError, match="'dev' is not one of its splits"):
        Echo({"dev": items(1)})
    with pytest.raises(UserError, match="there is no item in it"):
        Echo({"train": []})
    task = Echo({"train": items(1)})
    with pytest.raises(UserError, match="split 'test' of task echo: nothing is in it"):
        task.items("test")
    with pytest.raises(UserError, match="split 'dev': task echo has train, validation, test and all"):
        task.items("dev")
    with pytest.raises(UserError, match="there is no outcome to summarise"):
        task.summarise([])
    with pytest.raises(UserError, match="permutation 1: item i0 has the orders 0 to 0"):
        task.prompt(items(1)[0], 1)
    with pytest.raises(UserError, match="its answers are not options"):
        task.option_tokens(items(1)[0], word_tokenizer())
    with pytest.raises(UserError, match="its answers are not options"):
        task.score(items(1), ["1"], option_logp=[[0.0]])


def test_scores_carry_ids_and_groups() -> None:
    task = Echo({"train": [Item(id="x", prompt="p", answer="a", group="g")]})
    (outcome,) = task.score(task.items("train"), ["2"])
    assert (outcome.item, outcome.group, outcome.reward) == ("x", "g", 2.0)
    assert task.summarise([outcome]) == {"n": 1.0, "reward": 2.0, "malformed": 0.0}


def test_known_only_if_right_under_every_order() -> None:
    right, wrong = Outcome(reward=1, correct=True), Outcome(reward=0, correct=False)
    assert known_under_every_order([[right, right, wrong], [right, wrong, wrong]]) == [True, False, False]


def test_split_items_keeps_keys_together_and_moves_nothing() -> None:
    shares = {"train": 0.5, "test": 0.5}
    few = split_items(items(50), shares, "s", key=lambda item: int(item.id[1:]) // 5)
    many = split_items(items(80), shares, "s", key=lambda item: int(item.id[1:]) // 5)
    for split, members in few.items():
        assert [m.id for m in members] == [m.id for m in many[split] if int(m.id[1:]) < 50]
        groups = {int(m.id[1:]) // 5 for m in members}
        assert len(members) == 5 * len(groups)


def test_a_continuation_is_one_token_behind_its_context(tiny_tokenizer: Any) -> None:
    (letter,) = encode(tiny_tokenizer, "A")
    assert continuation_token(tiny_tokenizer, "x\n", "A") == letter
    assert continuation_token(tiny_tokenizer.backend_tokenizer, "", "A") == letter
    with pytest.raises(UserError, match="option ' A': this tokenizer does not make it one token behind 'Answer:'"):
        continuation_token(tiny_tokenizer, "Answer:", " A")
    # " t", "he" → " the": the context's last token changes
    with pytest.raises(UserError, match="one token"):
        continuation_token(tiny_tokenizer, " ", "the")


class TestRegistry:
    def test_unknown_names(self) -> None:
        with pytest.raises(UserError, match=r"task 'mmlv': there are mmlu, .*did you mean mmlu\? choose one, or name"):
            load_task("mmlv")
        with pytest.raises(
            UserError, match=r"^task 'prompts': its prompts and its reward are in Python, .*compare\(\)$"
        ):
            load_task("prompts")
        with pytest.raises(UserError, match=r"task 'no\.such:Task': no\.such cannot be imported"):
            load_task("no.such:Task")
        with pytest.raises(UserError, match=r"trimtab\.tasks \(.*__init__\.py\) has no class Nothing"):
            load_task("trimtab.tasks:Nothing")
        with pytest.raises(UserError, match=r"it is no subclass of trimtab\.tasks\.Task"):
            load_task("trimtab.tasks:Item")

    def test_a_module_and_class(self, data: Path) -> None:
        assert load_task("trimtab.tasks.gsm8k:GSM8K", data).name == "gsm8k"

    def test_a_module_in_the_current_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        before = list(sys.path)
        with pytest.raises(UserError, match=r"lone_task cannot be imported .*its file lies in the current directory"):
            find_task("lone_task:Lone")
        assert sys.path == before
        (tmp_path / "lone_task.py").write_text("from beside_it import missing\n")
        with pytest.raises(UserError, match="No module named 'beside_it'"):
            find_task("lone_task:Lone")
        (tmp_path / "beside_it.py").write_text("from trimtab.tasks.gsm8k import GSM8K as missing\n")
        (tmp_path / "lone_task.py").write_text("from beside_it import missing as Lone\n")
        assert find_task("lone_task:Lone").name == "gsm8k"
        sys.modules.pop("lone_task"), sys.modules.pop("beside_it")

    def test_unknown_options(self, data: Path) -> None:
        with pytest.raises(UserError, match="option 'shot': task mmlu takes shots, subjects; leave it out"):
            load_task("mmlu", data, shot=1)
        with pytest.raises(UserError, match="task gsm8k takes none"):
            load_task("gsm8k", data, shots=1)

        with pytest.raises(UserError, match="option 'shot': task mmlu takes shots, subjects; leave it out"):
            read_task("mmlu", data, shot=1)

    def test_options_have_types(self, data: Path) -> None:
        class Loose(Echo):
            @classmethod
            def load(cls, data=None, tokenizer=None, *, largest=9, where=None, names=("a",)):
                raise NotImplementedError

        assert load_options(Loose) == {"largest": int, "where": str, "names": tuple}
        assert load_options(TASKS["mmlu"]) == {"shots": int, "subjects": Sequence[str] | None}
        assert list(load_options(TASKS["harmbench"])) == ["judge", "harmless"]
        early = read_task("mmlu", data, subjects=["anatomy"])
        assert early is not None
        assert {item.group for item in early.items("all")} == {"anatomy"}

    def test_a_name_is_taken_once(self) -> None:
        class Mmlu(Echo):
            name: ClassVar[str] = "mmlu"

        with pytest.raises(UserError, match="task 'mmlu': there is already a task of this name"):
            register(Mmlu)


@pytest.mark.parametrize("module", ["trimtab.tasks", "trimtab.judges"])
def test_importing_loads_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets', 'openai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

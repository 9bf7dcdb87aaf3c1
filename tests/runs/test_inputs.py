"""A finished run answers only for the files that it read; its relative paths start where it was made."""

from __future__ import annotations

import dataclasses
import os
import re
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from trimtab import cli
from trimtab.errors import UserError
from trimtab.runs import OutputPath, Run, SourceName, field_docs, path_of_run, paths_of_run, read_record
from trimtab.runs import file_digests as digests_module
from trimtab.runs import inputs as inputs_module
from trimtab.runs import run as run_module
from trimtab.runs.file_digests import file_digest


@dataclass(frozen=True, kw_only=True)
class Config:
    text: tuple[SourceName, ...] = ("t.jsonl",)
    model: SourceName | None = "m"
    option: tuple[SourceName, ...] = ()
    save: OutputPath | None = None
    concepts: Path | None = None
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    site: str = "resid_post.1"
    text_field: str = "text"
    seed: int = 0


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "t.jsonl").write_text('{"text": "the red fox"}\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(40_000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / ".hub"))
    return tmp_path


def finished(path: str = "r", **changes: Any) -> Path:
    with Run.open(path, "train", Config(**changes)) as run:
        assert not run.done
        run.finish({"n": 1})
    return Path(path)


def opened_again(path: str | Path = "r", **changes: Any) -> bool:
    with Run.open(path, "train", Config(**changes)) as run:
        return run.done


def change(file: str) -> None:
    """One byte, the length and the time of change as before."""
    path = Path(file)
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


CHANGES = {
    "text": (lambda: change("t.jsonl"), "t.jsonl"),
    "longer text": (lambda: Path("t.jsonl").write_text("more\n" * 20), "t.jsonl"),
    "weights": (lambda: change("m/model.safetensors"), "m"),
    "config": (lambda: Path("m/config.json").write_text('{"a": 1}'), "m"),
    "another file in the directory": (lambda: Path("m/adapter.safetensors").write_bytes(b"1"), "m"),
    "no file in the directory": (lambda: Path("m/config.json").unlink(), "m"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_finished_run_is_not_done_before_once_what_it_read_has_changed(name: str) -> None:
    finished()
    assert opened_again()
    make, said = CHANGES[name]
    make()
    with pytest.raises(UserError) as caught:
        opened_again()
    assert f"{said} has changed since this run was made of it; choose another --run directory" in caught.value.line
    finished("another")  # as the hint says
    assert read_record("r")["status"] == "done"


def test_going_back_to_the_old_file_works_as_the_hint_says() -> None:
    before = Path("t.jsonl").read_bytes()
    finished()
    change("t.jsonl")
    with pytest.raises(UserError, match="go back to the old file"):
        opened_again()
    Path("t.jsonl").write_bytes(before)
    assert opened_again()


def test_mutation_no_one_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    finished()
    change("t.jsonl")
    monkeypatch.setattr(run_module, "check_unchanged", lambda *_: None)
    assert opened_again()


@pytest.mark.parametrize(
    "harmless",
    [
        lambda: os.utime("t.jsonl", ns=(1, 1)),
        lambda: Path("t.jsonl").unlink(),
        lambda: Path("m/run.json").write_text("{}"),
        lambda: Path("m/.lock").write_text("1"),
        lambda: Path("resid_post.1").write_text("an SAE's directory may be called so"),
        lambda: Path("r/more.txt").write_text("the run's own"),
    ],
)
def test_what_says_nothing_else_is_no_change(harmless: Any) -> None:
    finished()
    harmless()
    assert opened_again()


def test_a_run_that_another_command_writes_into_is_the_same_until_its_result_changes() -> None:
    finished("trained")
    finished("r", model="trained")
    Path("trained/analysis.parquet").write_bytes(b"1")
    assert opened_again("r", model="trained")
    with Run.open("trained", "train", Config()) as run:
        run.finish({"n": 2})
    with pytest.raises(UserError, match="trained has changed since this run was made of it"):
        opened_again("r", model="trained")


def test_a_run_that_is_not_done_goes_on() -> None:
    with Run.open("r", "train", Config()) as run:
        run.log({"x": 1}, step=0)
    change("t.jsonl")  # what reads the text says so, or does not mind
    assert not opened_again()


BIG = 20 << 20


@pytest.mark.parametrize("place", [0, 30_000, BIG // 2 + 12_345, BIG - 1])
def test_a_changed_byte_of_large_weights_is_seen_wherever_it_is(place: int) -> None:
    big = Path("m/model.safetensors")
    data = bytearray(BIG)
    big.write_bytes(data)
    finished()
    data[place] = 1
    big.write_bytes(data)
    with pytest.raises(UserError, match="m has changed since"):
        opened_again()


class TestDigests:
    """What a large file held is known without reading it again, as long as nothing touched it."""

    @pytest.fixture
    def big(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(digests_module, "_RECENT_NS", -1)
        path = here / "big.bin"
        path.write_bytes(bytes(2 << 20))
        return path

    @pytest.fixture
    def opened(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the files that are opened."""
        found, real = list[str](), Path.open

        def open_and_tell(self: Path, *given: Any, **named: Any) -> Any:
            found.append(self.name)
            return real(self, *given, **named)

        monkeypatch.setattr(Path, "open", open_and_tell)
        return found

    def test_it_is_read_once(self, big: Path, opened: list[str]) -> None:
        """Mutation: keep nothing."""
        assert file_digest(big) == file_digest(big)
        assert opened.count("big.bin") == 1

    def test_a_change_behind_the_clock_is_seen(self, big: Path) -> None:
        """Mutation: keep digests by size and time of change alone."""
        found, stat = file_digest(big), big.stat()
        while big.stat().st_ctime_ns == stat.st_ctime_ns:  # the clock of files has ticks
            with big.open("r+b") as file:
                file.seek(999_999)
                file.write(b"1")
            os.utime(big, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert big.stat().st_mtime_ns == stat.st_mtime_ns
        assert file_digest(big) != found

    def test_what_was_just_written_is_not_kept(self, big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(digests_module, "_RECENT_NS", 3600 * 10**9)
        file_digest(big)
        assert not (big.parent / ".cache" / "digests").exists()

    @pytest.mark.parametrize("kept", ["", "{", "[]", '{"state": [], "sha256": "0"}'])
    def test_a_damaged_note_is_none(self, big: Path, kept: str) -> None:
        found = file_digest(big)
        (note,) = (big.parent / ".cache" / "digests").iterdir()
        note.write_text(kept)
        assert file_digest(big) == found

    def test_a_cache_that_cannot_be_written_costs_time_alone(self, big: Path) -> None:
        (big.parent / ".cache").write_text("a file")
        assert file_digest(big) == file_digest(big)

    def test_another_run_of_the_same_file_reads_nothing_large(self, big: Path, opened: list[str]) -> None:
        finished("a", model="big.bin")
        finished("b", model="big.bin")
        assert opened_again("b", model="big.bin")
        assert opened.count("big.bin") == 1


def test_a_directory_of_many_files_is_looked_at() -> None:
    """Mutation: stop at 2,000 files."""
    Path("many").mkdir()
    for i in range(2_100):
        Path(f"many/{i}.txt").write_text(str(i))
    finished(text=("many",))
    assert opened_again(text=("many",))
    Path("many/1234.txt").write_text("4321")
    with pytest.raises(UserError, match="many has changed since"):
        opened_again(text=("many",))


class TestNames:
    """Models and data sets that are no files of the user's: by what the caches hold of them."""

    @staticmethod
    def in_hub(folder: str, revision: str) -> None:
        ref = Path(".hub") / folder / "refs" / "main"
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(revision)

    @pytest.mark.parametrize(
        ("field", "name", "folder"),
        [
            ("model", "owner/name", "models--owner--name"),
            ("model", "gpt2", "models--gpt2"),
            ("text", ("hub:owner/texts",), "datasets--owner--texts"),
            ("text", ("hub:owner/texts:en:train",), "datasets--owner--texts"),
            ("option", ("embeddings=owner/name",), "models--owner--name"),
            ("option", ("local-model:owner/name",), "models--owner--name"),
        ],
    )
    def test_another_revision_is_another_model(self, field: str, name: Any, folder: str) -> None:
        self.in_hub(folder, "aaaa")
        finished(**{field: name})
        assert opened_again(**{field: name})
        self.in_hub(folder, "bbbb")
        with pytest.raises(UserError, match="has changed since this run was made of it"):
            opened_again(**{field: name})
        self.in_hub(folder, "aaaa")
        assert opened_again(**{field: name})

    def test_what_is_fetched_while_the_run_is_open_counts(self) -> None:
        """Mutation: look only when the run is opened."""
        with Run.open("r", "train", Config(model="owner/name")) as run:
            self.in_hub("models--owner--name", "aaaa")
            run.finish({"n": 1})
        self.in_hub("models--owner--name", "bbbb")
        with pytest.raises(UserError, match="owner/name has changed"):
            opened_again(model="owner/name")

    def test_a_model_of_the_catalogue_is_what_its_record_says(self) -> None:
        record = Path(".cache/models/tiny/trimtab.json")
        record.parent.mkdir(parents=True)
        record.write_text('{"sha256": "aaaa"}')
        finished(model="tiny")
        record.write_text('{"sha256": "aaaa", "fetched": "again"}')
        assert opened_again(model="tiny")
        record.write_text('{"sha256": "bbbb"}')
        with pytest.raises(UserError, match="tiny has changed"):
            opened_again(model="tiny")

    def test_a_name_that_no_cache_knows_is_not_missed(self) -> None:
        finished(model="owner/unknown")
        assert opened_again(model="owner/unknown")

    def test_a_file_behind_a_kind_or_an_option_counts(self) -> None:
        for given in ("classifier:m", "data=m"):
            finished(given[:4], option=(given,), model=None)
            Path("m/config.json").write_text(str(time.monotonic()))
            with pytest.raises(UserError, match=f"{given} has changed"):
                opened_again(given[:4], option=(given,), model=None)


def test_paths_start_where_the_run_was_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / finished()
    record = read_record(run)
    assert path_of_run(record, "m") == "m"
    (here / "elsewhere" / "m").mkdir(parents=True)  # another model of that name
    monkeypatch.chdir(here / "elsewhere")
    assert path_of_run(record, "m") == str(here / "m")
    assert path_of_run(record, "smollm2-135m-instruct") == "smollm2-135m-instruct"
    assert path_of_run(record, "/m") == "/m"
    assert path_of_run({}, "m") == "m"  # a run of an older version
    assert paths_of_run(record, ("model", "text", "sae")) == {"model": str(here / "m"), "text": [str(here / "t.jsonl")]}


def test_the_same_file_by_another_path_is_the_same_config(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / finished()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert opened_again(run, model="../m")
    (here / "n").mkdir()
    with pytest.raises(UserError, match=r"model was 'm' and is now '\.\./n'"):
        opened_again(run, model="../n")
    change("../m/config.json")
    with pytest.raises(UserError, match=r"\.\./m has changed"):
        opened_again(run, model="../m")


def test_the_types_say_what_is_read() -> None:
    """Mutation: take every text of a config for a path."""
    for name in ("text", "saved", "out", "concepts"):
        Path(name).mkdir()
    given = {"save": Path("saved"), "concepts": Path("concepts"), "parts": {"own": Path("t.jsonl"), "not": "text"}}
    finished(**given)
    Path("text/new.txt").write_text("new")
    Path("saved/new.txt").write_text("new")
    assert opened_again(**given)
    assert set(read_record(Path("r"))["inputs"]) == {"t.jsonl", "m", "concepts"}
    Path("concepts/new.txt").write_text("new")
    with pytest.raises(UserError, match="concepts has changed"):
        opened_again(**given)


NAME_NO_FILE = {
    "address", "allow", "arch", "arm", "b_dec_init", "budget", "chat", "cleaning", "columns", "combine", "contender",
    "control", "criterion", "cross_section", "decay", "delimiter", "device", "dims", "dtype",
    "feature", "feature_name", "instruction", "label", "label_field", "less", "lora_modules", "loss", "mask",
    "more", "name", "off", "on", "operation", "part", "positions", "precision", "prefix", "prompt", "prompt_field",
    "rename", "save_dtype", "scaling", "separator", "site", "split", "stop", "strength", "task", "text_field", "type",
    "unit", "want", "way",
}  # fmt: skip
"""Fields of commands' configs that are texts, of which none is a file, a model or a data set."""
_WRITES = re.compile(r"to write|also put|file to keep it in|must not hold anything|save what", re.IGNORECASE)


def described_fields() -> Iterator[tuple[str, str, Any, str]]:
    """Command, name, type and words of every field of every command's config, nested ones included."""
    for command in cli.COMMANDS:
        waiting = [cli.COMMANDS[command]().config]
        while waiting:
            config = waiting.pop()
            docs = field_docs(config)
            hints = typing.get_type_hints(config, include_extras=True)
            for field in dataclasses.fields(config):
                if dataclasses.is_dataclass(hints[field.name]):
                    waiting.append(hints[field.name])
                yield command, field.name, hints[field.name], docs.get(field.name, "")


def kinds_in(hint: Any) -> set[Any]:
    """What a type is made of; literals are apart."""
    if typing.get_origin(hint) is typing.Literal:
        return set()
    inner = typing.get_args(hint)
    return {hint}.union(*map(kinds_in, inner), getattr(hint, "__metadata__", ())) if inner else {hint}


def undecided(fields: Iterator[tuple[str, str, Any, str]]) -> set[str]:
    found: set[str] = set()
    for command, name, hint, doc in fields:
        kinds = kinds_in(hint)
        marked = {inputs_module._Read, inputs_module._Written} & kinds
        if str in kinds and not marked and name not in NAME_NO_FILE:
            found.add(f"{command} {name}")
        if Path in kinds and name != "run" and bool(_WRITES.search(doc)) != (inputs_module._Written in kinds):
            found.add(f"{command} {name}")
    return found


def test_of_every_field_of_a_command_its_type_says_whether_it_is_read() -> None:
    """A new field that is a text is a `SourceName` or named here; a path that is written is an `OutputPath`."""
    assert undecided(described_fields()) == set()
    assert {name for _, name, _, _ in described_fields()} >= NAME_NO_FILE


@pytest.mark.parametrize(
    ("kind", "doc"), [(str, "A model."), (tuple[str, ...], "Texts."), (Path, "Directory to write."), (OutputPath, "A")]
)
def test_mutation_a_field_whose_type_does_not_say_it(kind: Any, doc: str) -> None:
    one = make_dataclass("One", [("newly", kind)])
    assert undecided(iter([("train", "newly", typing.get_type_hints(one, include_extras=True)["newly"], doc)]))

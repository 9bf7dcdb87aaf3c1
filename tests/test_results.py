"""Numbers on the result pages are those of the result files that the repository keeps."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from trimtab.stats import interval_of

DOCS = Path(__file__).parents[1] / "docs"
HISTORY = DOCS / "results" / "history.md"
NUMBER = r"[+−-]?\d[\d,]*(?:\.\d+)?%?"
INTERVAL = re.compile(rf"(?:({NUMBER}) )?\[({NUMBER}), ({NUMBER})\]")
PLAIN = re.compile(r"(?<![\w.,/])([+−-]?\d+\.\d+%?|\d+%)(?![\w.]*\w)")
NAMED = re.compile(r"data/([\w-]+)\.json")
NO_CLAIM = re.compile(r"`[^`]*`|\]\([^)]*\)|95% intervals?|<!--.*?-->")
"""Commands, links, a level of confidence."""


def load_pages() -> Any:
    spec = importlib.util.spec_from_file_location("pages", DOCS / "results" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load_pages()
OF_MODELS = DOCS / "results" / "models.md"
"""Reasons and counts, which `tests/lm/test_zoo.py` compares with what is found."""
CHECKED = [path for path in PAGES.PAGES if path not in (HISTORY, OF_MODELS)]


class Claim(NamedTuple):
    """Numbers on a page that stand for one value of a result file."""

    line: int
    numbers: tuple[str, ...]
    files: tuple[str, ...]
    """Those that the table or the nearest text above it names."""
    start: int
    """Where it begins in its line."""


def claims(page: str, *, plain: bool = True) -> Iterator[Claim]:
    """Intervals, and other numbers with decimals or as percentages, outside of commands."""
    files: tuple[str, ...] = ()
    fenced = False
    for n, line in enumerate(page.splitlines()):
        fenced ^= line.startswith("```")
        files = tuple(NAMED.findall(line)) or files
        if fenced or line.startswith("    "):
            continue
        text = NO_CLAIM.sub(lambda match: " " * len(match[0]), line)
        for match in INTERVAL.finditer(text):
            yield Claim(n, tuple(filter(None, match.groups())), files, match.start())
        text = INTERVAL.sub(lambda match: " " * len(match[0]), text)
        for match in PLAIN.finditer(text) if plain and not line.startswith("|") else ():
            yield Claim(n, (match[1],), files, match.start())


@cache
def values(name: str) -> tuple[list[tuple[float, ...]], list[float]]:
    """All intervals of a file, and all its numbers."""
    intervals: list[tuple[float, ...]] = []
    numbers: list[float] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "estimate" in value:
                found = interval_of(value)
                intervals.append((found.estimate, found.low, found.high))
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)
        elif isinstance(value, int | float):
            numbers.append(float(value))

    walk(json.loads((PAGES.DATA / f"{name}.json").read_text(encoding="utf-8")))
    return intervals, numbers


def shows(texts: tuple[str, ...], shown: tuple[float, ...]) -> bool:
    """Whether texts are values, rounded to as many decimals; or all their hundredfold, as percentages and points."""

    def same(text: str, value: float) -> bool:
        number = text.replace("−", "-").replace(",", "").removesuffix("%")
        return float(number) == float(f"{value:.{len(number.partition('.')[2])}f}")

    factors = (100,) if texts[0].endswith("%") else (1, 100)
    return any(all(same(text, value * factor) for text, value in zip(texts, shown, strict=True)) for factor in factors)


@cache
def founded(numbers: tuple[str, ...], files: tuple[str, ...]) -> bool:
    """Whether one of the files that are named has the value."""
    for name in files:
        intervals, single = values(name)
        candidates = [interval[-len(numbers) :] for interval in intervals] if len(numbers) > 1 else zip(single)
        if any(shows(numbers, candidate) for candidate in candidates):
            return True
    return False


def unfounded(page: str, *, plain: bool = True) -> list[str]:
    """What a page claims and no file that it names holds."""
    found = [claim for claim in claims(page, plain=plain) if not founded(claim.numbers, claim.files)]
    return [f"line {claim.line + 1}: {' '.join(claim.numbers)} in {claim.files}" for claim in found]


def stale(page: str) -> list[str]:
    """Lines of tables that are not as they would be drawn."""
    pairs = zip(page.splitlines(), PAGES.drawn(page).splitlines(), strict=True)
    return [f"{shown} is {drawn}" for shown, drawn in pairs if shown != drawn]


def is_readme(path: Path) -> bool:
    """The README speaks of much else; its intervals are checked."""
    return path.name == "README.md"


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: path.stem)
def test_every_number_stands_in_the_file_that_is_named(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert unfounded(page, plain=not is_readme(path)) == []
    assert list(claims(page))
    assert stale(page) == []


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: path.stem)
def test_a_changed_digit_is_found(path: Path) -> None:
    """In each number of each interval, whatever stands around it."""
    page = path.read_text(encoding="utf-8")
    lines = page.splitlines()
    for claim in claims(page, plain=False):
        at = claim.start
        for number in claim.numbers:
            at = lines[claim.line].index(number, at) + len(number)
            last = at - 2 if number.endswith("%") else at - 1
            digit = str((int(lines[claim.line][last]) + 5) % 10)
            changed = lines[claim.line][:last] + digit + lines[claim.line][last + 1 :]
            above = " ".join(f"data/{name}.json" for name in claim.files)
            (wrong,) = unfounded(f"{above}\n{changed}", plain=False)
            assert wrong.startswith("line 2: ")


def test_a_changed_cell_is_found() -> None:
    page = (DOCS / "results" / "ioi.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| policy |"))
    (wrong,) = stale(page.replace(row, row.removesuffix(" |") + "0 |", 1))
    assert wrong.startswith("| policy")


def test_what_is_no_claim_and_what_is_one() -> None:
    page = """x [data](data/a.json) +0.1 [−0.2, 0.3], 12% of `0.5` in 95% intervals, SmolLM2-1.7B of 3 items
    trimtab --dose 0.7
| 1.5 | 2 [1, 3] |
over trainings [0.10, 0.20] (0.25)
"""
    assert [(c.line, c.numbers, c.files) for c in claims(page)] == [
        (0, ("+0.1", "−0.2", "0.3"), ("a",)),
        (0, ("12%",), ("a",)),
        (2, ("2", "1", "3"), ("a",)),
        (3, ("0.10", "0.20"), ("a",)),
        (3, ("0.25",), ("a",)),
    ]


@pytest.mark.parametrize(
    ("texts", "value", "right"),
    [
        (("0.228",), (0.22758,), True),
        (("23%",), (0.22758,), True),
        (("+22.8", "−1.2", "50.0"), (0.22758, -0.012, 0.5), True),
        (("−0.23",), (-0.22758,), True),
        (("0.23",), (-0.22758,), False),
        (("0.227",), (0.22758,), False),
        (("0.23%",), (0.22758,), False),
        (("+22.8", "−0.0", "50.0"), (0.22758, -0.012, 0.5), False),
    ],
)
def test_values_are_shown_rounded_and_with_their_sign(
    texts: tuple[str, ...], value: tuple[float, ...], right: bool
) -> None:
    assert shows(texts, value) is right


def test_an_interval_of_no_named_file_is_unfounded() -> None:
    assert unfounded("0.5 [0.4, 0.6]\n") == ["line 1: 0.5 0.4 0.6 in ()"]


def test_the_first_page_opens_with_one_table_of_at_most_seven_rows_and_one_figure() -> None:
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    assert len(table.splitlines()) - 2 <= 7
    (figure,) = re.findall(r"!\[[^]]*\]\(([^)]*)\)", page)
    assert (DOCS / figure) == PAGES.FIGURE
    assert PAGES.FIGURE.exists()


def test_the_demo_figure_is_drawn_from_its_file() -> None:
    assert PAGES.DEMO_FIGURE.read_text(encoding="utf-8") == PAGES.demo_figure()
    page = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert f"docs/images/{PAGES.DEMO_FIGURE.name}" in page
    assert all(f">{way['name']}<" in PAGES.demo_figure() for way in PAGES.read("demo")["wishes"][0]["ways"])


def test_a_word_marked_in_the_readme_that_the_demo_did_not_mark_is_found() -> None:
    page = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| not steered |"))
    word = row.split()[5]
    (wrong,) = stale(page.replace(row, row.replace(f" {word} ", f" **{word}** ", 1), 1))
    assert wrong.startswith("| not steered |")


def test_the_figure_has_the_numbers_of_its_file() -> None:
    texts = re.findall(r">([^<]*\[[^<]*\])</text>", PAGES.FIGURE.read_text(encoding="utf-8"))
    assert texts == re.findall(r">([^<]*\[[^<]*\])</text>", PAGES.figure())
    intervals, _ = values("ioi-fresh")
    for text in texts:
        (match,) = INTERVAL.finditer(text)
        assert any(shows(match.groups(), interval) for interval in intervals)


@pytest.mark.parametrize("file", sorted(PAGES.DATA.glob("*.json")), ids=lambda file: file.stem)
def test_a_result_file_says_how_it_was_made_on_the_page_that_shows_it(file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {"command", "versions", "date", "seeds"} <= set(found)
    pages = [page for page in (path.read_text(encoding="utf-8") for path in CHECKED) if f"data/{file.name}" in page]
    said = [" ".join(page.replace("\\\n", " ").split()) for page in pages]
    assert any(found["command"] in page for page in said)
    assert file.stat().st_size < 30_000

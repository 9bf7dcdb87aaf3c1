"""The demo on a tiny model: a wish that a planted feature serves, and one that nothing serves."""

from __future__ import annotations

import html
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "finding"))
from planted_wishes import SITE, UP_FEATURE, planted_ground, random_words, texts_wish

from trimtab.dictionaries import save_dictionary
from trimtab.errors import UserError
from trimtab.finding import FindOptions, Texts
from trimtab.finding.neutral import read_neutral_prompts
from trimtab.lm import LanguageModel
from trimtab.report import write_report
from trimtab.runs import json_safe, read_json, read_record, read_typed
from trimtab.studies import DemoConfig, DemoResult, demo, run_demo

SIZES: dict[str, Any] = {
    "examples": (6, 6, 10), "n_neutral": (2, 4), "max_new_tokens": 6, "way": ("mean-difference", "prompting"),
    "set_size": 1, "budget": "none", "dose": (0.4, 1.6),
}  # fmt: skip
SERVED, UNSERVED = "the letter Y", "no letter at all"


def wishes() -> dict[str, Texts]:
    one, other = (tuple(random_words(60, 10, seed)) for seed in (21, 22))
    served = texts_wish(60)
    return {SERVED: replace(served, instruction=("Y!",)), UNSERVED: Texts(wanted=one, unwanted=other)}


@pytest.fixture(scope="module")
def config(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    """With the planted model and its SAE as files."""
    folder = tmp_path_factory.mktemp("demo")
    ground = planted_ground(tiny_llama)
    ground.model.hf.save_pretrained(folder / "model")
    ground.model.tokenizer.save_pretrained(folder / "model")
    sae = ground.saes[SITE]
    sae.info = replace(sae.info, model=str(folder / "model"))
    save_dictionary(sae, folder / "sae")
    return DemoConfig(model=str(folder / "model"), sae=str(folder / "sae"), run=folder / "run", policy=False)


@pytest.fixture(scope="module")
def done(config: DemoConfig) -> DemoResult:
    """One whole run."""
    return run_demo(config, wishes(), SIZES)


def test_what_is_planted_is_found_and_the_other_wish_is_told_to_be_none(done: DemoResult) -> None:
    served, unserved = done.wishes
    assert (served.yes, unserved.yes) == (True, False)
    assert served.found.label.startswith(f"{SITE} feature {UP_FEATURE} -")
    assert served.words
    assert done.headline() == f"Yes: {SERVED}. No: {UNSERVED}"
    assert served.found.shown.effect.low > 0
    assert unserved.headline.startswith("No: no feature is shown to serve the wish.")


def test_the_best_alternative_is_the_one_that_does_most(done: DemoResult) -> None:
    for wish in done.wishes:
        others = {way.name: way.shown.effect.estimate for way in wish.ways if way.name not in ("found", "best single")}
        assert set(others) == {"random", "mean-difference", "prompting"}
        assert wish.best == max(others, key=lambda name: others[name])
        assert wish.alternative.name == wish.best


def test_its_page_shows_answers_texts_and_marks(done: DemoResult, config: DemoConfig) -> None:
    page = write_report(config.run).read_text(encoding="utf-8")
    for wish in done.wishes:
        shown = re.search(
            rf'<section><h2>{wish.title}</h2>\n<p class="verdict (\w+)"[^>]*>(.*?)</p>(.*?)</section>', page, re.S
        )
        assert shown is not None
        assert shown[1] == ("yes" if wish.yes else "no")
        assert html.unescape(shown[2]).startswith(wish.headline)
        texts = wish.marks.texts[: 3 * demo.SHOWN_PROMPTS]
        assert [text.way for text in texts] == ["unsteered", "found", wish.best] * demo.SHOWN_PROMPTS
        assert shown[3].count('<div class="strip">') == len(texts)
        marked = sum(value > 0 for text in texts for value in text.adds)
        assert len(re.findall(r'class="k k[1-4]"', shown[3])) == marked
        assert 'alt="Effect against price"' in shown[3]
    assert "A word is marked, the stronger the more, if a classifier" in page
    assert "max_new_tokens" in page


def test_a_page_that_calls_a_no_a_yes_is_caught(done: DemoResult, config: DemoConfig, tmp_path: Path) -> None:
    """Mutation: every answer is shown as yes."""
    sections = read_json(config.run / "shown.json")
    for section in sections:
        section["yes"] = section["yes"] is not None or None
    changed = tmp_path / "run"
    changed.mkdir()
    (changed / "shown.json").write_text(json.dumps(sections))
    (changed / "run.json").write_text((config.run / "run.json").read_text())
    with pytest.raises(AssertionError):
        test_its_page_shows_answers_texts_and_marks(done, replace(config, run=changed))


def test_second_time_it_is_read_back(done: DemoResult, config: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DemoConfig, "load", None)
    again = run_demo(config, wishes(), SIZES)
    assert again == done
    assert read_typed(DemoResult, json_safe(done)) == done
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        run_demo(replace(config, seed=1), wishes(), SIZES)


def test_a_killed_run_goes_on_with_the_next_wish(
    done: DemoResult, config: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = replace(config, run=tmp_path / "run")
    real = demo.find

    def dies(model: Any, sae: Any, wish: Any, **how: Any) -> Any:
        if how["run"].name == "wish-2":
            raise KeyboardInterrupt
        return real(model, sae, wish, **how)

    monkeypatch.setattr(demo, "find", dies)
    with pytest.raises(KeyboardInterrupt):
        run_demo(own, wishes(), SIZES)
    monkeypatch.setattr(demo, "find", real)
    first = read_record(tmp_path / "run/wish-1")
    assert first["status"] == "done"
    again = run_demo(own, wishes(), SIZES)
    assert [wish.ways for wish in again.wishes] == [wish.ways for wish in done.wishes]
    assert read_record(tmp_path / "run/wish-1")["results"] == first["results"]


def test_what_is_smaller_is_named(done: DemoResult) -> None:
    trimmed = {one.option: (one.here, one.otherwise) for one in done.trimmed}
    assert trimmed["max_new_tokens"] == ("6", str(FindOptions().max_new_tokens))
    assert trimmed["policy iterations"] == ("24", "60")
    assert "seed" not in trimmed
    assert set(trimmed) >= set(SIZES)


def test_the_wishes_that_ship_are_apart_from_what_is_shown() -> None:
    shipped = demo.shipped_wishes()
    assert list(shipped) == list(demo.TOPICS.values())
    prompts = {text for texts in read_neutral_prompts(None).values() for text in texts}
    for title, wish in shipped.items():
        assert len(wish.wanted) == len(set(wish.wanted)) == len(set(wish.prompts)) == 80
        assert not prompts & set(wish.prompts)
        assert wish.instruction == (f"Write about {title}.",)
    first, *rest = shipped.values()
    assert all(wish.unwanted == first.unwanted and wish.prompts == first.prompts for wish in rest)

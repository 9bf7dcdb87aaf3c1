"""What would go unnoticed otherwise in the making of examples: each of these mistakes makes a check fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_dividing
import test_importing
import test_writing

from trimtab.flags import dividing
from trimtab.flags.data import importing, labels, selecting, writing
from trimtab.lm import LanguageModel

Patch = pytest.MonkeyPatch


def passages_divided(patch: Patch) -> None:
    """Each passage goes to the examples or the judge by itself."""
    real = importing.Candidate
    patch.setattr(importing, "Candidate", lambda text, having, *_, **named: real(text, having, text, **named))


def unbalanced(patch: Patch) -> None:
    patch.setattr(selecting, "_up_to", lambda each, none, candidates: list(candidates))


def prompts_in_order(patch: Patch) -> None:
    """Prompts are dealt out over all examples instead of within each concept."""
    real = selecting.deck_of
    patch.setattr(selecting, "deck_of", lambda one, share: ((), real(one, share)[1]))


def prompts_of_either_side(patch: Patch) -> None:
    patch.setattr(selecting, "deck_of", lambda one, share: (one.concepts, False))


def documents_forgotten(patch: Patch) -> None:
    real = importing.Candidate
    patch.setattr(importing, "Candidate", lambda *given, **named: real(*given[:4]))


def documents_on_both_sides(patch: Patch) -> None:
    patch.setattr(dividing, "side_of", lambda one, share: dividing.is_held_out(one.prompt, share))


def contradictions_kept(patch: Patch) -> None:
    patch.setattr(
        importing, "without_copies", lambda candidates, dropped: list({c.text: c for c in candidates}.values())
    )


def typos_pass(patch: Patch) -> None:
    patch.setattr(labels, "NEAR", 1.0)


def others_not_looked_at(patch: Patch) -> None:
    """The check sees only the concept that was asked for."""
    real = writing._Writing._reason

    def reason(self: Any, request: Any, text: str, has: Any) -> str:
        asked = np.array([name in request.concepts for name in self.requests.concepts])
        return real(self, request, text, asked & has)

    patch.setattr(writing._Writing, "_reason", reason)


def lacking_passes(patch: Patch) -> None:
    real = writing._Writing._reason

    def reason(self: Any, request: Any, text: str, has: Any) -> str:
        asked = np.array([name in request.concepts for name in self.requests.concepts])
        return real(self, request, text, asked | has)

    patch.setattr(writing._Writing, "_reason", reason)


def asked_prompts_kept(patch: Patch) -> None:
    real = writing.Requests.request
    patch.setattr(
        writing.Requests, "request",
        lambda self, group, number: (r := real(self, group, number))._replace(kept_prompt=r.prompt),
    )  # fmt: skip


def importing_check(test: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, path, patch: test(path)


def writing_check(test: Callable[..., Any]) -> Callable[..., Any]:
    def check(model: LanguageModel, path: Path, patch: Patch) -> None:
        author = test_writing.Author()
        patch.setattr(writing, "decode", author)
        test(model, author)

    return check


MUTATIONS: dict[str, tuple[Callable[[Patch], None], Callable[..., Any]]] = {
    "passages of a document on both sides": (
        passages_divided,
        importing_check(test_importing.test_a_document_is_never_both_trained_and_judged_on),
    ),
    "no balance": (unbalanced, importing_check(test_importing.test_numbers_of_examples)),
    "prompts that are told from others by the concept": (
        prompts_in_order,
        importing_check(test_importing.test_prompts_say_nothing_of_the_concept),
    ),
    "prompts trained on under documents held out": (
        prompts_of_either_side,
        importing_check(test_dividing.test_nothing_that_is_imported_is_left_out),
    ),
    "documents forgotten": (
        documents_forgotten,
        importing_check(test_dividing.test_nothing_that_is_imported_is_left_out),
    ),
    "documents on both sides": (
        documents_on_both_sides,
        importing_check(lambda path: test_dividing.test_no_prompt_and_no_document_is_on_both_sides()),
    ),
    "contradicting labels kept": (
        contradictions_kept,
        importing_check(test_importing.test_copies_and_contradictions_are_left_out),
    ),
    "a misspelt concept passes": (
        typos_pass,
        lambda model, path, patch: test_importing.test_what_is_refused("typo beside others", path, patch),
    ),
    "another concept passes": (
        others_not_looked_at,
        writing_check(test_writing.test_only_what_has_its_concepts_is_taken),
    ),
    "a lacking concept passes": (lacking_passes, writing_check(test_writing.test_only_what_has_its_concepts_is_taken)),
    "every prompt names its concept": (
        asked_prompts_kept,
        writing_check(test_writing.test_half_are_kept_under_neutral_prompts),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name: str, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    mutate, check = MUTATIONS[name]
    for mutated in (False, True):
        path = tmp_path / str(mutated)
        path.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if not mutated:
                check(tiny_llama, path, patch)
                continue
            mutate(patch)
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                check(tiny_llama, path, patch)

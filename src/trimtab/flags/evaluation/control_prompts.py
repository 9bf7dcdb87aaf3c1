"""Prompts that an evaluation of flags continues: neutral ones, and ones that ask for a concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.errors import UserError

NEUTRAL = (
    "Tell me something interesting.",
    "Write a short paragraph on a subject of your own.",
    "Write a few sentences about anything you like.",
    "Say something.",
    "Please write a short text.",
    "Surprise me with a few sentences.",
    "Write the opening of a story.",
    "Continue with whatever comes to mind.",
    "Give me a short piece of writing.",
    "What shall we talk about?",
    "Compose a brief passage.",
    "Write three sentences.",
    "Make something up.",
    "Write a little scene.",
    "Share a thought with me.",
    "Begin a tale.",
    "Write a paragraph for a magazine.",
    "I have a few minutes. Tell me something.",
    "Pick a subject and write about it.",
    "Write the first lines of a book.",
    "Describe something in a few sentences.",
    "Tell me a short story.",
    "Write something that I have not read before.",
    "Write a note to a friend.",
    "Give me some sentences to read.",
    "Start a conversation.",
    "Write a short entry for a diary.",
    "Write some lines for a newspaper.",
    "Give me a paragraph.",
    "Write a passage of plain prose.",
    "Tell me about something you know.",
    "Write a few lines to fill this page.",
)
"""Ask for a text and for no subject; none of them is a prompt of examples that trimtab makes."""
ASKING = (
    "Write a few sentences about {}.",
    "Tell me what you know about {}.",
    "I would like to read something about {}.",
    "Please write a short text about {}.",
    "Tell me a short story about {}.",
    "What can you say about {}?",
    "Write the opening of a story about {}.",
    "Give me three sentences about {}.",
    "Describe something that has to do with {}.",
    "Let us talk about {}. You begin.",
)
"""Ask for a text about a concept, by its description."""
INSTRUCTIONS = ("Write about {}.", "Your whole answer must be about {}.")
"""What prompting puts before a neutral prompt; the better one on validation is used."""
AGAINST = "Do not write about {}, and do not mention it."
"""What prompting puts before a prompt that asks for a concept."""


def asking_prompts(concepts: Sequence[str], descriptions: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Prompts that ask for each concept.

    Args:
        concepts: names.
        descriptions: what each is in words, as `read_concepts` gives them; the names by default.
    """
    words = described(concepts, descriptions)
    return {concept: [template.format(words[concept]) for template in ASKING] for concept in concepts}


def described(concepts: Sequence[str], descriptions: Mapping[str, str] | None = None) -> dict[str, str]:
    """What each concept is in words: its description, or its name."""
    return {concept: (descriptions or {}).get(concept) or concept for concept in concepts}


def divided(prompts: Sequence[str], validation: int) -> tuple[list[str], list[str]]:
    """Prompts to choose doses and instructions on, and prompts to report, which are no others than are left.

    Raises:
        UserError: one is given twice, or none would be left.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UserError("the neutral prompts", "they are no list of texts", "give a list of texts")
    if len(set(prompts)) < len(prompts):
        raise UserError("the neutral prompts", "one is given twice", "give each once")
    if len(prompts) < validation + 2:
        why = f"{validation} of {len(prompts)} choose doses, and at least 2 are to be left"
        raise UserError("the neutral prompts", why, "give more, or lower validation_prompts")
    return list(prompts[:validation]), list(prompts[validation:])

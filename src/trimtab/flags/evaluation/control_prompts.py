"""Prompts that an evaluation of flags continues: neutral ones, and ones that ask for a concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.errors import UserError
from trimtab.flags.data.prompts import neutral
from trimtab.flags.examples import Example

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
    "Entertain me for a minute.",
    "Write something short and clear.",
    "Add a few lines of your own.",
    "Tell me what happened.",
    "Write what you would like to read.",
    "Take any subject you like.",
    "Write an opening sentence, and go on from there.",
    "Imagine something, and describe it.",
    "Let your thoughts wander.",
    "Write a page from any book.",
    "Say something worth hearing.",
    "Give an example of your writing.",
    "Write freely.",
    "Tell me one thing.",
    "Write for a reader who has little time.",
    "Dictate something to me.",
    "What would you tell a stranger?",
    "Explain anything you want.",
    "Give me the first thing that you think of.",
    "Show me how you write.",
)
"""Ask for a text and for no subject; none of them is a prompt of examples that trimtab makes."""
ASKING = (
    "Write a few sentences about {}.",
    "Tell me what you know about {}.",
    "Tell me a short story about {}.",
    "What can you say about {}?",
    "Write the opening of a story about {}.",
    "Give me three sentences about {}.",
)
"""Ask for a text about a concept, by its description."""
INSTRUCTIONS = ("Write about {}.", "Your whole answer must be about {}.")
"""What prompting puts before a neutral prompt; the better one on validation is used."""
AGAINST = "Do not write about {}, and do not mention it."
"""What prompting puts before a prompt that asks for a concept."""


def neutral_prompts(words: Mapping[str, str], examples: Sequence[Example] = ()) -> list[str]:
    """Neutral prompts that have no word of a concept and stand in none of some examples.

    Args:
        words: what each concept is in words.
        examples: that a model was trained on.
    """
    known = {example.prompt for example in examples}
    return [prompt for prompt in neutral(words, NEUTRAL) if prompt not in known]


def asking_prompts(words: Mapping[str, str]) -> dict[str, list[str]]:
    """Prompts that ask for each concept, by what it is in words."""
    return {concept: [template.format(said) for template in ASKING] for concept, said in words.items()}


def described(concepts: Sequence[str], descriptions: Mapping[str, str] | None = None) -> dict[str, str]:
    """What each concept is in words: its description, as `read_concepts` gives it, or its name."""
    return {concept: (descriptions or {}).get(concept) or concept for concept in concepts}


def divided(prompts: Sequence[str], validation: int, reported: int) -> tuple[list[str], list[str]]:
    """Prompts to choose doses and instructions on, and as many as are wanted of the others to report.

    Raises:
        UserError: they are not texts, the same prompt stands there twice, or too few would be left.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UserError("the neutral prompts", "they must be several texts", "give a list of texts")
    if len(set(prompts)) < len(prompts):
        raise UserError("the neutral prompts", "the same prompt is in the list twice", "give each prompt once")
    if len(prompts) < validation + 2:
        why = f"there are {len(prompts)}: {validation} for validation, and at least 2 must remain to be reported"
        raise UserError("the neutral prompts", why, "give more, or lower validation_prompts")
    return list(prompts[:validation]), list(prompts[validation : validation + reported])

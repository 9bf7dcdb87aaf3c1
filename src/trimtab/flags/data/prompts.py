"""Prompts: neutral ones, which say nothing of any concept, and frames in which a model is asked for some.

Small instructed models take one plain sentence best. What an evaluation asks is in `evaluation/control_prompts.py`, and
none of these, so that what a flag does there is not learned by heart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from trimtab.errors import UserError

NEUTRAL_PROMPTS = (
    "Tell me something.",
    "Write a few sentences.",
    "Write something for me.",
    "What is on your mind?",
    "Say anything you like.",
    "Write a short paragraph.",
    "Go on.",
    "Please begin.",
    "Continue.",
    "What would you like to talk about?",
    "Pick a topic and write about it.",
    "Write whatever comes to mind.",
    "Give me a few lines of text.",
    "Tell me more.",
    "Let us start.",
    "Write the next passage.",
    "Say a few words.",
    "Share a thought.",
    "Write a passage of any kind.",
    "I am listening.",
    "Surprise me.",
    "What comes next?",
    "Write two or three sentences.",
    "Talk to me.",
    "Write down something.",
    "Choose a subject yourself.",
    "Tell me anything.",
    "Give me some text.",
    "What do you have to say?",
    "Write as you please.",
    "Fill this page.",
    "Please write a little.",
    "Start wherever you want.",
    "Say something new.",
    "Keep going.",
    "Write a paragraph about anything.",
    "What can you tell me?",
    "Here is your turn.",
    "Just write.",
    "Let me hear from you.",
    "Produce a short text.",
    "Write a bit more.",
    "Say what you want to say.",
    "Any topic is fine.",
    "It is up to you.",
    "Tell me about something.",
    "Write one paragraph, please.",
    "Make a start.",
    "Please write a paragraph.",
    "Begin to write.",
    "Write something simple.",
    "Provide a short text.",
    "Please go on.",
    "Write something brief.",
    "Write what you want.",
)
"""Of any content. Twelve of them are held out at the default share."""

FRAMES = (
    "Write a short story about {}.",
    "Write a paragraph about {}.",
    "Tell me about {}.",
    "Describe {} in a few sentences.",
    "Write a short text about {}.",
    "Write a letter to a friend about {}.",
    "Write a few facts about {}.",
    "Write a diary entry about {}.",
    "Explain {} in simple words.",
    "Write the beginning of a book about {}.",
    "Write a short news report about {}.",
    "Why do people care about {}?",
)
"""What a model is asked for, with a topic."""

PAIR_FRAMES = (
    "Write a short story about {} and {}.",
    "Write a paragraph about {} and {}.",
    "Write a short text about {} and {}.",
    "Write a letter to a friend about {} and {}.",
)
"""The same with two topics."""

EVERYDAY = (
    "a garden in spring",
    "a lost key",
    "an old house",
    "a grandmother and her cat",
    "a rainy afternoon",
    "learning to sew",
    "a walk in the forest",
    "a clever mouse",
    "a quiet morning",
    "a broken clock",
    "a teacher and her class",
    "a birthday present",
    "the colour blue",
    "a good night's sleep",
    "a bird with a broken wing",
    "two sisters",
    "a letter that came too late",
    "an honest neighbour",
    "a wooden chair",
    "the first snow",
    "a dream",
    "a shy child",
    "keeping a diary",
    "a painting on the wall",
    "the moon and the stars",
    "an oak tree",
    "a pair of shoes",
    "being patient",
    "a library",
    "a song that nobody knows",
    "brushing your teeth",
    "a baby that cannot sleep",
    "a dog in the park",
    "saying sorry",
    "a mountain in the mist",
    "a secret door",
    "cleaning a room",
    "a butterfly",
    "an old photograph",
    "a promise",
)
"""Topics of texts that need none of the concepts, as far as these are something else."""

_WORD = re.compile(r"[^\W\d_]+")
_FUNCTION_WORDS = """
a an and any are as at be by for from has have how in into is it its of on or other s such that the their them 
they this to was were what when which who with about all between kinds kind things thing etc like
"""
_FUNCTION = frozenset(_FUNCTION_WORDS.split())
_ENDINGS = re.compile(r"(?<=\w\w\w)(?:ing|ed|s)$"), re.compile(r"(?<=\w\w\w)(?:ie|e|y|i)$")


def topics(description: str) -> list[str]:
    """What a description lists: `the sea, ships and sailors` has three topics."""
    parts = (part.strip(" .") for part in re.split(r"[,;/]| and | or ", description))
    return list(dict.fromkeys(part for part in parts if part))


def stems(text: str) -> list[str]:
    """A text's words but those without content, in small letters and without their commonest endings."""
    words = [word.lower() for word in _WORD.findall(text)]
    for ending in _ENDINGS:
        words = [word if word in _FUNCTION else ending.sub("", word) for word in words]
    return [word for word in words if word not in _FUNCTION]


def everyday_topics(concepts: Mapping[str, str]) -> list[str]:
    """Those of `EVERYDAY` that share no word with a concept."""
    return [topic for topic in EVERYDAY if not names_one(topic, concepts)]


def names_one(prompt: str, concepts: Mapping[str, str]) -> bool:
    """Whether a prompt has a word of a concept's name or description."""
    taken = {stem for name, text in concepts.items() for stem in stems(f"{name} {text}")}
    return bool(taken & set(stems(prompt)))


def framed(frame: str, *asked: str) -> str:
    """A frame with its topics."""
    text = frame.format(*asked)
    return text[0].upper() + text[1:]


def neutral(concepts: Mapping[str, str], prompts: Sequence[str] = NEUTRAL_PROMPTS) -> list[str]:
    """Neutral prompts that have no word of a concept.

    Raises:
        UserError: each has one; the message says of which concepts.
    """
    found = [prompt for prompt in prompts if not names_one(prompt, concepts)]
    if not found:
        met = [name for name, said in concepts.items() if any(names_one(prompt, {name: said}) for prompt in prompts)]
        why = f"each of the {len(prompts)} neutral prompts has a word of their names or descriptions"
        raise UserError(f"concept {', '.join(met)}", why, "describe them by words that say more")
    return found

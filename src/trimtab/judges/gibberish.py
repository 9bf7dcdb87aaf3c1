"""Tell text that nobody could follow from text, by rules: steering that is too strong ends in loops and letter salad.

Each rule looks at a different failure: loops (n-gram repetition), salad (words without vowels, very long, or in many
scripts), runs of one character, and hardly any letters at all. The limits are set so that short, terse, numeric or code
answers pass; grammatical nonsense passes too, since no rule here reads meaning.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_RUN = re.compile(r"(\S)\1{9,}|([^\w\s])\2{5,}")
"""Ten equal signs in a row, or six of punctuation."""
_RULES_AND_BLANKS = "-=_*.#~+|"
"""What documents are drawn with."""
_VOWELS = frozenset("aeiouyáéíóúàèìòùâêîôûäëïöüãõåæø")
# The most frequent words of English prose. A passage of some length without any of them is not English prose.
_COMMON = """
    a about after all also an and any are as at be because been but by can could do does for from had has have he
    her his how i if in into is it its just like may me more most my no not of on one or our out over she should so
    some such than that the their them then there these they this to under up us use was we were what when which who
    will with would you your i'm it's don't can't i'll you're
"""
FUNCTION_WORDS = frozenset(_COMMON.split())


@dataclass(frozen=True, kw_only=True)
class GibberishRules:
    """Limits beyond which a text counts as gibberish."""

    min_words: int = 12
    """Texts with fewer words are judged only by their characters: too short to show a loop."""
    min_distinct: float = 0.3
    """Least share of distinct words among the last `window` words."""
    window: int = 60
    """Words, from the end, in which loops are looked for: a model that collapses stays collapsed."""
    max_repeated: float = 0.5
    """Largest share of words that stand inside a sequence of three words seen before in the window."""
    max_compression: float = 6.0
    """Largest ratio of a text's bytes to its bytes compressed by zlib, for texts of at least 200 bytes."""
    max_odd_words: float = 0.35
    """Largest share of Latin-script words that no language would form: no vowel in four or more letters, six
    consonants in a row, more than 24 letters, or capitals inside a word."""
    min_function_words: float = 0.04
    """Least share of English function words in texts of 30 or more Latin-script words without line structure."""
    min_letters: float = 0.25
    """Least share of letters and digits among the visible characters, for texts of at least 20 of them."""


def find_gibberish(text: str, rules: GibberishRules | None = None) -> str:
    """Why a text is gibberish, or an empty string if it is not.

    An empty or blank text is gibberish: nothing was said.

    Args:
        text: what a model wrote.
        rules: the limits.

    Returns:
        The name of the first rule that holds: `empty`, `character run`, `no letters`, `loop`, `repetition`,
        `odd words`, `mixed scripts`, `no function words`, or `""`.
    """
    rules = rules or GibberishRules()
    visible = "".join(text.split())
    if not visible:
        return "empty"
    if any(match.group()[0] not in _RULES_AND_BLANKS for match in _RUN.finditer(text)):
        return "character run"
    if len(visible) >= 20 and sum(c.isalnum() for c in visible) < rules.min_letters * len(visible):
        return "no letters"
    words = [word.lower() for word in _TOKEN.findall(text)]
    if len(words) >= rules.min_words:
        tail = words[-rules.window :]
        if len(set(tail)) < rules.min_distinct * len(tail) or _repeated_share(tail) > rules.max_repeated:
            return "loop"
    data = text.encode("utf-8", "surrogatepass")
    if len(data) >= 200 and len(data) / len(zlib.compress(data, 9)) > rules.max_compression:
        return "repetition"
    return _salad(text, rules)


def _salad(text: str, rules: GibberishRules) -> str:
    """Rules on the words themselves; they speak of the Latin script only."""
    found = _WORD.findall(text)
    latin = [word for word in found if all(ord(c) < 0x250 or c in "'’" for c in word)]
    if len(found) >= 8:
        scripts = Counter(_script(word[0]) for word in found)
        if len(scripts) >= 3 and scripts.most_common(1)[0][1] < 0.8 * len(found):
            return "mixed scripts"
    if len(latin) >= 6 and sum(map(_is_odd, latin)) > rules.max_odd_words * len(latin):
        return "odd words"
    if len(latin) >= 30 and len(latin) > 0.9 * len(found) and text.count("\n") * 8 < len(latin):
        known = sum(word.lower().replace("’", "'") in FUNCTION_WORDS for word in latin)
        if known < rules.min_function_words * len(latin):
            return "no function words"
    return ""


def _repeated_share(words: list[str]) -> float:
    """Share of words inside a three-word sequence that has occurred before."""
    seen: set[tuple[str, ...]] = set()
    inside = [False] * len(words)
    for start in range(len(words) - 2):
        triple = tuple(words[start : start + 3])
        if triple in seen:
            inside[start : start + 3] = [True] * 3
        seen.add(triple)
    return sum(inside) / len(words)


def _is_odd(word: str) -> bool:
    lower = word.lower()
    if len(word) > 24 or re.search(r"[a-z][A-Z].*[a-z][A-Z]", word):
        return True
    if word.isupper():
        return False
    consonants = "".join("c" if c.isalpha() and c not in _VOWELS else " " for c in lower)
    return (len(lower) >= 4 and " " not in consonants) or "cccccc" in consonants


def _script(letter: str) -> str:
    """A coarse name of a letter's script: enough to see that three are mixed."""
    code = ord(letter)
    for name, start, end in (
        ("latin", 0x0, 0x24F), ("greek", 0x370, 0x3FF), ("cyrillic", 0x400, 0x52F), ("hebrew", 0x590, 0x5FF),
        ("arabic", 0x600, 0x77F), ("indic", 0x900, 0xDFF), ("thai", 0xE00, 0xE7F), ("hangul", 0xAC00, 0xD7AF),
        ("cjk", 0x3040, 0x9FFF),
    ):  # fmt: skip
        if start <= code <= end:
            return name
    return "other"

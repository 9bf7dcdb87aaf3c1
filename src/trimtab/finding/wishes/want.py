"""A wish in words: the model itself writes texts that show it and, to the same prompts, texts that need not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trimtab.errors import UserError
from trimtab.finding.examples import Examples
from trimtab.finding.wishes.texts import LEAST_TOKENS, TEXT_TOKENS, Texts
from trimtab.finding.wishes.wish import Wish
from trimtab.judges import RuleJudge
from trimtab.lm import DecodeConfig, LanguageModel, PromptCache, decode
from trimtab.tasks.near_duplicates import first_of_each

FRAMES = ("Write a few sentences about {}.", "Tell me about {}.", "Write a short story about {}.")
TOPICS = (
    "a walk in the morning", "an old friend", "a letter that came late", "a meal with the family", "a long journey",
    "the house across the street", "a conversation on a bench", "a day without plans", "something that was lost",
    "a quiet evening", "the first day at work", "a photograph on the wall", "a promise", "a small town", "the weather",
    "an unexpected visitor", "a box in the attic", "learning something new", "a question nobody asked", "two brothers",
    "a door that was open", "waiting for somebody", "the last day of the year", "a neighbour",
)  # fmt: skip
"""What both texts of a pair are about, whatever is wished for."""
WANTED = "{} It must be about this, or be written like this: {}."
"""The prompt of a wanted text: the pair's, with the wish behind it."""
PLAIN, PLAIN_WANTED = "{}\n\n", "{} ({})\n\n"
"""The same for models without a chat template."""


@dataclass(frozen=True)
class WrittenPair:
    """Two texts to the same prompt."""

    prompt: str
    wanted: str
    unwanted: str


@dataclass(frozen=True, kw_only=True)
class Want(Wish):
    """A wish in words, such as `the sea, ships and sailors`, or `polite, formal language`."""

    text: str
    """The wish."""
    pairs: int = 72
    """Prompts, to each of which a wanted and an unwanted text are written."""
    text_tokens: int = TEXT_TOKENS
    """Tokens of each text that are read; a quarter more are written, for the judge."""
    seed: int = 0
    """Of the writing."""
    written: tuple[WrittenPair, ...] = ()
    """What was written before; nothing is written then."""

    def __post_init__(self) -> None:
        most = len(FRAMES) * len(TOPICS)
        if not self.text.strip():
            raise UserError("the wish", "it is empty", "say what texts should be about, or like")
        if not self.text_tokens > LEAST_TOKENS or not 1 <= self.pairs <= most:
            why = f"there are {most} prompts, and texts need more than {LEAST_TOKENS} tokens"
            raise UserError(f"{self.pairs} pairs of texts of {self.text_tokens} tokens", why, "change it")

    @property
    def about(self) -> str:
        return self.text.strip()

    def pairs_by(self, model: LanguageModel, progress: Callable[[int], None] | None = None) -> tuple[WrittenPair, ...]:
        """What was written before, or else what the model writes now, both sets.

        A pair is kept if both texts are language, no refusals, and nobody's copies.

        Args:
            model: what writes.
            progress: called with the number of texts that are done.

        Raises:
            UserError: too few pairs are left.
        """
        if self.written:
            return self.written
        chat = bool(model.tokenizer.chat_template)
        requests = [frame.format(topic) for frame in FRAMES for topic in TOPICS][: self.pairs]
        wish = self.text.strip().rstrip(".")
        asked = [(WANTED if chat else PLAIN_WANTED).format(request, wish) for request in requests]
        plain = requests if chat else [PLAIN.format(request) for request in requests]
        prompts = [model.encode_text(text, chat=chat) for text in (*asked, *plain)]
        config = DecodeConfig(
            max_new_tokens=self.text_tokens * 5 // 4, temperature=0.7, top_p=0.95, seed=self.seed, batch_size=144
        )
        decoded = decode(model, prompts, config, prompt_cache=PromptCache(model, together=True), progress=progress)
        texts = [text.strip() for text in decoded.texts]
        wanted, unwanted = texts[: len(requests)], texts[len(requests) :]
        apart = zip(first_of_each(wanted), first_of_each(unwanted), strict=True)
        found = [
            WrittenPair(request if chat else PLAIN.format(request), yes, no)
            for request, yes, no, new in zip(requests, wanted, unwanted, apart, strict=True)
            if all(new) and yes != no and _is_language(request, yes) and _is_language(request, no)
        ]
        if len(found) < len(requests) / 2:
            why = f"of {len(requests)} pairs that {model.name} wrote, {len(found)} are language and nobody's copies"
            raise UserError(f"the wish {self.text!r}", why, "give texts of your own instead")
        return tuple(found)

    def examples(self, model: LanguageModel) -> Examples:
        written = self.pairs_by(model)
        return Texts(
            wanted=tuple(pair.wanted for pair in written),
            unwanted=tuple(pair.unwanted for pair in written),
            prompts=tuple(pair.prompt for pair in written),
            chat=bool(model.tokenizer.chat_template),
            text_tokens=self.text_tokens,
            instruction=(*self.instruction, WANTED.format("", self.text.strip().rstrip(".")).strip()),
        ).examples(model)


def _is_language(prompt: str, text: str) -> bool:
    verdict = RuleJudge().score(prompt, text)
    return not verdict.gibberish and not verdict.refused

"""A one-token task for tiny models: one letter is right."""

from __future__ import annotations

from trimtab.tasks import Item, Outcome, Task

TEXTS = [f"{a}{b} and {b}" for a in "abcdefgh" for b in "klmnop"]


class FirstLetter(Task):
    """Reward 1 if the first character written is the item's answer; anything but a letter is malformed."""

    name = "first-letter"
    max_new_tokens = 1
    chat = False
    options_only = True

    @classmethod
    def load(cls, data: object = None, tokenizer: object = None) -> FirstLetter:
        items = [
            Item(id=f"letter/{i}", prompt=text, answer="xyz"[i % 3], options=("x", "y", "z"), group=text[0])
            for i, text in enumerate(TEXTS)
        ]
        return cls({"train": items[:30], "validation": items[30:38], "test": items[38:]})

    def option_strings(self, item: Item) -> tuple[str, ...]:
        return item.options

    def option_tokens(self, item: Item, tokenizer: object, context: str | None = None) -> tuple[int, ...]:
        encode = tokenizer.encode  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(encode(option, add_special_tokens=False)[0] for option in item.options)

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        letter = text[:1]
        if not letter.isalpha():
            return Outcome(reward=0.0, correct=False, malformed=True)
        return Outcome(reward=float(letter == item.answer), correct=letter == item.answer, answer=letter)

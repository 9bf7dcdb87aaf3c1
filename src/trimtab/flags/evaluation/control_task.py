"""The task that ways of control are compared on: write so that a judge finds a concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.flags.evaluation.control_judging import TextReader
from trimtab.runs import text_id
from trimtab.tasks import Item, Outcome, Task


class ConceptTask(Task):
    """Reward 1 if a text is fluent and the judge finds the concept in it, else 0; gibberish counts as malformed, and
    `accuracy_well_formed` is the rate of the concept among fluent texts.

    Args:
        prompts: of each split.
        concept: what is to be found.
        reader: reads the texts.
        chat: whether prompts are turns in the model's chat template.
        max_new_tokens: how long a text may be.
        instructions: what prompting tries before a prompt.
    """

    name = "concept"
    metric = "accuracy_well_formed"

    def __init__(
        self,
        prompts: Mapping[str, Sequence[str]],
        concept: str,
        reader: TextReader,
        *,
        chat: bool = False,
        max_new_tokens: int = 32,
        instructions: Sequence[str] = (),
    ) -> None:
        super().__init__(
            {
                split: [Item(id=text_id(text), prompt=text, answer=concept) for text in texts]
                for split, texts in prompts.items()
            }
        )
        self.concept, self.reader = concept, reader
        self._column = reader.concepts.index(concept)
        self.chat, self.max_new_tokens = chat, max_new_tokens  # pyright: ignore[reportAttributeAccessIssue]
        self.instructions = tuple(instructions)  # pyright: ignore[reportAttributeAccessIssue]

    def parse(self, item: Item, text: str, permutation: int = 0) -> Outcome:
        return self._parse_all([item], [text], permutation)[0]

    def _parse_all(self, items: Sequence[Item], texts: Sequence[str], permutation: int) -> list[Outcome]:
        has, fluent = self.reader.read(texts)
        right = has[:, self._column] & fluent
        return [
            Outcome(reward=float(r), correct=bool(r), malformed=not f, item=item.id)
            for item, r, f in zip(items, right, fluent, strict=True)
        ]

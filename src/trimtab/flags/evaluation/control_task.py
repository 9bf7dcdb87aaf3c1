"""The task that ways of control are compared on: write so that a judge finds a concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.flags.evaluation.control_judging import TextReader
from trimtab.runs import text_id
from trimtab.tasks import Item, Outcome, Task

TIES = 1e-3
"""Weight of the judge's probability in a reward: it decides where as many texts have the concept."""


class ConceptTask(Task):
    """Reward about 1 if a text is fluent and the judge finds the concept in it, else about 0; a thousandth of it is the
    judge's probability. Gibberish has reward 0 and counts as malformed; `accuracy_well_formed` is the rate of the
    concept among fluent texts.

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
        max_new_tokens: int = 24,
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
        fluent = self.reader.fluent(texts)
        right = self.reader.has(texts)[:, self._column] & fluent
        probabilities = self.reader.probabilities(texts)
        likely = right if probabilities is None else probabilities[:, self._column] * fluent
        return [
            Outcome(reward=float(r * (1 - TIES) + p * TIES), correct=bool(r), malformed=not f, item=item.id)
            for item, r, p, f in zip(items, right, likely, fluent, strict=True)
        ]

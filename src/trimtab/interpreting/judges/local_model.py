"""Any chat model that can be loaded as a judge of features, batched.

It writes what a feature means; all else is read from the probabilities of one-token answers, so that nothing is decoded
and no reply can be nonsense: where a feature fires from yes against no, a rating from 0, 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from trimtab.errors import UserError
from trimtab.interpreting.judge import Exemplars, Meaning, Passage, Rating, ToRate
from trimtab.interpreting.judges import questions
from trimtab.judges import Unjudged
from trimtab.lm import DecodeConfig, LanguageModel, decode, load_model
from trimtab.lm.answer_logits import answer_logits
from trimtab.runs import Meter, check_least

YES_NO = "Does the passage have this in it: {meaning}? Answer yes or no.\n\nPassage:\n{text}"
EXPLAIN = (
    "In each line, the words between << and >> have something in common. Say in a few words what that is.\n\n"
    "{passages}\n\nAnswer with a few words only."
)
_DIGIT = "Answer with 0, 1 or 2 and nothing else."


@dataclass(frozen=True, kw_only=True)
class LocalModelJudge:
    """Asks a chat model on this machine. Its concept score is of the steered text alone, as in AxBench."""

    model: str
    """Catalogue name, directory, or hub id."""
    device: str = "cpu"
    """Where it runs."""
    dtype: str = "float32"
    """Of its weights."""
    batch_size: int = 8
    """Questions per forward pass."""
    passages: int = 8
    """Passages by which it explains a feature."""

    @property
    def version(self) -> str:
        return "2"

    def __post_init__(self) -> None:
        check_least(self, 1, "batch_size", "passages")

    @property
    def name(self) -> str:
        """`local-model:MODEL`."""
        return f"local-model:{self.model}"

    @cached_property
    def _loaded(self) -> LanguageModel:
        found = load_model(self.model, dtype=self.dtype, device=self.device)
        found.require("decode")
        if not found.tokenizer.chat_template:
            raise UserError(f"judge {self.name}", "the model has no chat template", "name a chat model")
        return found

    def explain(self, exemplars: Sequence[Exemplars]) -> list[Meaning | Unjudged]:
        """What features mean, in order: the first line that the model writes.

        Raises:
            UserError: the model cannot be loaded, or is no chat model.
        """
        model = self._loaded
        asked = [
            EXPLAIN.format(passages="\n".join(questions.marked(passage) for passage in one.has[: self.passages]))
            for one in exemplars
        ]
        config = DecodeConfig(max_new_tokens=24, batch_size=self.batch_size)
        texts = decode(model, [model.encode_text(text, chat=True) for text in asked], config).texts if asked else []
        lines = [next((line.strip() for line in text.splitlines() if line.strip()), "") for text in texts]
        return [
            Meaning(name=one.name, text=line) if line else Unjudged("it wrote nothing")
            for one, line in zip(exemplars, lines, strict=True)
        ]

    def fires(
        self, meanings: Sequence[Meaning], passages: Sequence[Sequence[Passage]]
    ) -> list[Float[ndarray, " N"] | Unjudged]:
        """For each meaning the probability of yes against no, passage by passage. Raises as `explain`."""
        asked = [
            YES_NO.format(meaning=meaning.text, text=questions.cut(passage.text))
            for meaning, several in zip(meanings, passages, strict=True)
            for passage in several
        ]
        yes = self._shares(asked, ("Yes", "No"))[:, 0]
        ends = np.cumsum([len(several) for several in passages])
        return list(np.split(yes, ends[:-1])) if len(ends) else []

    def rate(self, texts: Sequence[ToRate]) -> list[Rating | Unjudged]:
        """The scores of texts, in order: means of 0, 1 and 2 by their probabilities. Raises as `explain`."""
        asked = [
            f"{instruction}\n\n{question}"
            for one in texts
            for instruction, question in questions.rating_questions(one, _DIGIT)
        ]
        scores = (self._shares(asked, ("0", "1", "2")) @ np.arange(3.0)).reshape(-1, 3)
        return [Rating(*row) for row in scores.tolist()]

    @torch.no_grad()
    def _shares(self, asked: Sequence[str], answers: tuple[str, ...]) -> Float[ndarray, "N A"]:
        """Probabilities of answers among themselves, each by its first token that the others do not share, upper and
        lower case together."""
        model = self._loaded
        begun, tokens = _first_tokens(model, answers)
        prompts = [[*model.encode_text(text, chat=True), *begun] for text in asked]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found = np.zeros((len(prompts), len(answers)))
        with Meter(f"asking {self.model}", len(prompts)) as meter:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                logits = answer_logits(model, [prompts[i] for i in rows], [[0]] * len(rows), None)[:, 0].float()
                each = torch.stack([logits[:, ids].logsumexp(1) for ids in tokens], dim=1)
                found[rows] = each.softmax(1).double().cpu().numpy()
                meter.advance(len(rows))
        return found


def _first_tokens(model: LanguageModel, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The tokens that all answers begin with, such as a space of its own, and those by which each may go on.

    Raises:
        UserError: two answers may go on with the same token, so that it would not tell them apart.
    """
    forms = [{answer, answer.lower(), answer.upper()} for answer in answers]
    ids = [[model.tokenizer(form, add_special_tokens=False)["input_ids"] for form in sorted(some)] for some in forms]
    columns = [set(column) for column in zip(*(each for some in ids for each in some), strict=False)]
    begun = [min(column) for column in takewhile(lambda column: len(column) == 1, columns)]
    found = [sorted({each[len(begun)] for each in some if len(each) > len(begun)}) for some in ids]
    every = [token for some in found for token in some]
    if not all(found) or len(set(every)) < len(every):
        why = f"{', '.join(answers)} begin with the same token"
        raise UserError(f"judge local-model:{model.name}", why, "name a model with another tokenizer")
    return begun, found

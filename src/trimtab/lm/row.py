"""One row of a decode: its settings and its results."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import UserError
from trimtab.lm.edits import EditLog
from trimtab.lm.model import LanguageModel
from trimtab.runs import check_least, check_values, known_arguments, part_of


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """The part of a command's config that says how tokens are chosen, inherited by every command that decodes texts."""

    max_new_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 decodes greedily; otherwise logits are divided by this."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this share of the probability."""
    seed: int = 0
    """Key of every random draw."""
    batch_size: int = 64
    """Rows decoded together."""

    def __post_init__(self) -> None:
        check_least(self, 1, "max_new_tokens", "batch_size")
        check_values(self, "0, or from 1e-6 to 1e6", lambda value: value == 0 or 1e-6 <= value < 1e6, "temperature")
        check_values(self, "above 0 and at most 1", lambda value: 0 < value <= 1, "top_p")

    def decode_config(self, **more: Any) -> DecodeConfig:
        """These choices, with further ones of `DecodeConfig`."""
        return DecodeConfig(**part_of(self, DecodingConfig), **more)


@known_arguments
@dataclass(frozen=True, kw_only=True)
class DecodeConfig(DecodingConfig):
    """How tokens are chosen, and where a row ends."""

    stop: tuple[str, ...] = ()
    """A row ends when its text contains one of these, special tokens (`<|im_end|>`) among them."""
    stop_at_eos: bool = True
    """A row ends at an end-of-text token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stop, str) or not all(isinstance(one, str) and one for one in self.stop):
            raise UserError(f"stop {self.stop!r}", "it must be a tuple of texts that are not empty", "change it")


@dataclass(eq=False)
class Row:
    """A continuation of one prompt: how it is to be decoded, and its tokens so far."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    config: DecodeConfig = field(default_factory=DecodeConfig)
    """How its tokens are chosen; `batch_size` is not used."""
    forced: Sequence[int] = ()
    """Tokens with which the continuation begins (a fork's past)."""
    sample: int | None = None
    """Its key for random draws; by default the row's number."""
    branch: int = 0
    """Its fork's number, a key for random draws as well."""
    teacher: Sequence[int] | None = None
    """Tokens to feed instead of the chosen ones, at least one; the row ends where they end, or where they end it."""
    allowed: Sequence[int] | None = None
    """The only tokens among which it chooses."""

    number: int = field(default=-1, init=False)
    """Counts the rows of a stream, from 0."""
    index: int = field(default=-1, init=False)
    """What a source calls it; free for another row once it has left."""
    token_ids: list[int] = field(default_factory=list[int], init=False)
    decided_ids: list[int] = field(default_factory=list[int], init=False)
    token_logp: list[float] = field(default_factory=list[float], init=False)
    decided_logp: list[float] = field(default_factory=list[float], init=False)
    entropy: list[float] = field(default_factory=list[float], init=False)
    allowed_logp: list[list[float]] = field(default_factory=list[list[float]], init=False)
    """These are what `Decoded` says of them."""
    finish: str = field(default="", init=False)
    """Why it ended: `eos`, `stop`, `length` or `cancelled`; empty while it waits or runs."""
    text: str = field(default="", init=False)
    """The continuation as text once it has ended, as in `Decoded`."""
    edits: EditLog = field(default=EditLog.empty(), init=False)
    """What shaped it, once it has ended."""

    @property
    def prefix(self) -> list[int]:
        """What is fed before the first token is chosen."""
        return [*self.prompt, *self.forced]

    @property
    def length(self) -> int:
        """Tokens from the prompt's first to the last one chosen."""
        return len(self.prompt) + len(self.forced) + len(self.token_ids)

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be chosen."""
        return self.config.max_new_tokens - len(self.token_ids)


def check_prompts(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    forced: Sequence[Sequence[int]] | None = None,
) -> None:
    """Raise a `UserError` if `decode` would refuse these prompts."""
    if not isinstance(config, DecodeConfig):
        hint = "give DecodeConfig(max_new_tokens=…); a source comes behind it"
        raise UserError(f"the {type(config).__name__} that is given as the config", "it is no DecodeConfig", hint)
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise UserError("the prompts", "they are texts", "give token ids, like [model.encode_text(text)]")
    if not len(prompts):
        raise UserError("the prompts", "there is none", "give at least one")
    if not all(hasattr(prompt, "__len__") for prompt in prompts):
        raise UserError("the prompts", "they are the tokens of a single one", "give a list of prompts, like [tokens]")
    for i, prompt in enumerate(prompts):
        check_prompt(model, f"prompt {i}", prompt, forced[i] if forced else (), config.max_new_tokens)


def check_prompt(
    model: LanguageModel, name: str, prompt: Sequence[int], forced: Sequence[int], max_new_tokens: int
) -> None:
    """Raise a `UserError` if a prompt is empty, holds an unknown token, or would exceed the model's context."""
    check_tokens(model, name, prompt)
    if len(forced):
        check_tokens(model, name, forced)
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    length = len(prompt) + len(forced) + max_new_tokens
    if limit and 0 < limit < length - 1:
        raise UserError(
            f"{name} and {max_new_tokens} new tokens",
            f"together {length} tokens, but {model.name} holds {limit}",
            "shorten the prompt or lower max_new_tokens",
        )
    if len(prompt) <= model.turning_length < length - 1:
        raise UserError(
            f"{name} and {max_new_tokens} new tokens",
            f"together {length} tokens, but {model.name} turns positions otherwise beyond {model.turning_length} tokens"
            " (longrope), those in its cache included",
            "shorten the prompt or lower max_new_tokens",
        )


def check_tokens(model: LanguageModel, name: str, tokens: Sequence[int]) -> None:
    """Raise a `UserError` if there is no token, or one that the model does not have."""
    if len(tokens) == 0:
        raise UserError(name, "it is empty", "give at least one token")
    try:
        known = 0 <= min(map(operator.index, tokens)) <= max(map(operator.index, tokens)) < model.vocab_size
    except TypeError:
        raise UserError(name, "its tokens are no whole numbers", "give what model.encode_text returns") from None
    if not known:
        raise UserError(name, f"{model.name} has tokens 0 to {model.vocab_size - 1}", "tokenise again")

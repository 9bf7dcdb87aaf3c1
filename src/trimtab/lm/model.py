"""A language model as the rest of trimtab sees it: the untouched `transformers` model and what is known about it."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Float
from jinja2 import TemplateError
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.attention import fast_attention
from trimtab.lm.batch import TokenBatch
from trimtab.lm.cache import GrowingCache
from trimtab.lm.capabilities import Capabilities
from trimtab.lm.continuations import (
    Anchor,
    decode_behind,
    decode_plain,
    encode_behind,
    encode_plain,
    find_anchor,
    token_text,
)
from trimtab.lm.layouts import Layout, check_site, find_layout, text_config
from trimtab.lm.products import Products, contiguous_rows, linears
from trimtab.lm.sites import Site
from trimtab.lm.unasked import cache_that_keeps_nothing, is_waited_for
from trimtab.lm.windows import turning_length
from trimtab.runs.user_files import check_text


class LanguageModel:
    """A causal language model with its tokenizer. The `transformers` model in `hf` is never changed.

    Args:
        hf: the model; it is put into evaluation mode and its parameters are frozen.
        tokenizer: its tokenizer.
        name: the name it was loaded by.
        allow: what is used even if the model's check finds a difference, of `trimtab.lm.CAPABILITIES`.
    """

    def __init__(
        self,
        hf: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        name: str,
        allow: Sequence[str] = (),
    ) -> None:
        self.hf, self.tokenizer, self.name = hf.eval().requires_grad_(False), tokenizer, name
        self.layout: Layout = find_layout(hf)
        self._told_of_begin, self.allow = False, tuple(allow)
        self._capabilities: Capabilities | None = None
        self._capabilities = LanguageModel.check(self).allowing(allow, name)
        for what, why in self._capabilities.allowed.items():
            self._note(f"{what} is used with {name}, as is asked for, though {why}")
        if is_waited_for(self.device):
            self._keeps_nothing = cache_that_keeps_nothing(hf, self.vocab_size, self.n_layers, self.named_arguments)

    _keeps_nothing: GrowingCache | None = None
    """Given to passes of whole texts, which then ask the device nothing; see `lm.unasked`."""
    check: ClassVar[Callable[[LanguageModel], Capabilities]]
    """How a model is checked; `self_check`, which stands on this module, puts it here."""

    @property
    def capabilities(self) -> Capabilities:
        """What was found to work here, sites included. All counts as working while that is being found."""
        return self._capabilities or Capabilities()

    def assume(self, found: Capabilities) -> None:
        """Go on as if this had been found; for the check itself, and for tests."""
        self._capabilities = found

    def require(self, *names: str) -> None:
        """Refuse what this model was found to fail; see `trimtab.lm.capabilities`.

        Raises:
            UserError: one of these is off.
        """
        for name in names:
            self.capabilities.require(name, self.name)

    @staticmethod
    def _note(said: str) -> None:
        print(f"trimtab: note: {said}", file=sys.stderr, flush=True)

    def __repr__(self) -> str:
        kind, dtype = type(self.hf).__name__, str(self.dtype).removeprefix("torch.")
        return f"<LanguageModel {self.name}: {kind}, {self.n_layers} layers of width {self.d_model}, {dtype}>"

    @classmethod
    def from_hf(
        cls,
        hf: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        name: str = "model",
        allow: Sequence[str] = (),
    ) -> LanguageModel:
        """Wrap a model that is already in memory; see the class."""
        return cls(hf, tokenizer, name, allow)

    @classmethod
    def around(cls, hf: transformers.PreTrainedModel) -> LanguageModel:
        """What edits inside a model's own calls need of it: no tokenizer; its mode and gradients stay as they are."""
        model = cls.__new__(cls)
        model.hf, model.name = hf, str(hf.name_or_path or type(hf).__name__)
        model.layout, model.allow, model._capabilities = find_layout(hf), (), None
        model._capabilities = cls.check(model)
        return model

    @property
    def n_layers(self) -> int:
        return len(self.layout.layers)

    @property
    def d_model(self) -> int:
        return int(text_config(self.hf).hidden_size)

    @cached_property  # which is asked for per prompt; a config of transformers looks its values up slowly
    def vocab_size(self) -> int:
        return int(text_config(self.hf).vocab_size)

    @property
    def device(self) -> torch.device:
        return self.hf.get_input_embeddings().weight.device  # type: ignore[union-attr, return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def pad_id(self) -> int:
        """What fills rows up: it is masked, so any token that the model has will do where its own is none of them."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) and 0 <= pad < self.vocab_size else 0

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text: the tokenizer's and the generation config's."""
        found: set[int] = set()
        config = getattr(self.hf, "generation_config", None)
        for value in (self.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
            if isinstance(value, int):
                found.add(value)
            elif value is not None:
                found.update(int(token) for token in value)
        return frozenset(found)

    @cached_property
    def turning_length(self) -> int:
        """Tokens beyond which `longrope` turns all of a text's positions otherwise, and so all rows beside it; 0 if
        the model never does."""
        return turning_length(self.hf)

    def _check_turn(self, batch: TokenBatch, past: int, past_lengths: Tensor | None) -> None:
        held = torch.full_like(batch.lengths, past) if past_lengths is None else past_lengths
        ends = held + batch.lengths if past else batch.lengths
        begins = held if past else batch.lengths
        if not int(begins.min()) <= self.turning_length < int(ends.max()):
            return
        why = f"{self.name} turns positions otherwise in texts of more than {self.turning_length} tokens (longrope)"
        raise UserError("texts that become longer, or are of both kinds", why, "use shorter texts, or longer ones")

    @cached_property
    def _arguments(self) -> frozenset[str]:
        """What the model's forward takes by name; others would be swallowed without a word."""
        forwards = (self.hf.forward, self.hf.base_model.forward)
        return frozenset(name for forward in forwards for name in inspect.signature(forward).parameters)

    @cached_property
    def cache_argument(self) -> str:
        """What the model's forward calls its key-value cache; a wrong name would be swallowed without a word.

        Raises:
            UserError: it takes none, or keeps a state besides.
        """
        names = inspect.signature(self.hf.forward).parameters
        found = next((name for name in ("cache", "past_key_values") if name in names), None)  # older: the latter
        kinds = set(getattr(text_config(self.hf), "layer_types", None) or ())
        if found is None or getattr(self.hf, "_is_stateful", False) or kinds & {"linear_attention", "conv", "mamba"}:
            raise UserError(
                f"decoding with {self.name}",
                f"{type(self.hf).__name__} has layers with a state other than keys and values",
                "use a model whose layers are all attention",
            )
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every weight's name, shape, dtype and up to 4,096 evenly spaced values (16 hex characters)."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.hf.state_dict().items()):
            flat = tensor.detach().flatten()
            step = max(1, flat.numel() // 4096)
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(flat[::step].cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def site(self, name: str | Site) -> Site:
        """Parse a site's name and check that this model has it.

        Raises:
            UserError: the name is malformed, the layer or head is out of range, or the model was found not to have
                what such sites are called.
        """
        site = Site.parse(name)
        check_site(self.layout, site, self.name)
        self.require(site.kind)
        return site

    def encode_text(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by itself, but one beginning at most.

        Args:
            text: plain text, or with `chat` the content of one user turn.
            chat: put the text into the model's chat template, up to where the reply begins.

        Raises:
            UserError: the text gives no token or one that the model has no row for, holds a byte or half a character
                that is no text, or the model has no chat template.
        """
        if not isinstance(text, str):
            raise UserError(f"prompt {text!r}", "it is no text", "give one text at a time")
        if not text:
            raise UserError("the prompt", "it is empty", "give some text")
        if chat:
            return self.encode_chat([{"role": "user", "content": text}])
        check_text(text, f"prompt {text[:40]!a}")
        ids = list(self.tokenizer(text)["input_ids"])  # type: ignore[arg-type]
        if not ids:
            raise UserError(f"prompt {text!r}", "it gives no token", "give some text")
        begin = self.tokenizer.bos_token_id
        if isinstance(begin, int) and ids[:2] == [begin] * 2 and ids != encode_plain(self.tokenizer, text):
            while ids[:2] == [begin] * 2:  # a text that begins with the token as text, as chats rendered elsewhere do
                del ids[0]
            if not self._told_of_begin:
                self._told_of_begin = True
                said = f"a prompt begins with {self.tokenizer.bos_token}, which {self.name} puts before texts itself"
                self._note(f"{said}; it gets one")
        self.check_rows(ids, "the prompt")
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues another one: without special tokens, nor a blank of the tokenizer's own.

        Raises:
            UserError: as `encode_text`.
        """
        check_text(text, f"text {text[:40]!a}")
        ids = encode_behind(self.tokenizer, text, self._anchor)
        self.check_rows(ids, "the text")
        return ids

    def check_rows(self, ids: Sequence[int], name: str) -> None:
        """Raise a `UserError` if one of the tokenizer's tokens has no row in the model's embedding."""
        if ids and max(ids) >= self.vocab_size:
            token = next(token for token in ids if token >= self.vocab_size)
            raise no_row(self, token, name)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        system: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a chat in the model's own template, which writes all special tokens.

        A text that holds one itself, such as `<|im_end|>` typed by a user, would end the turn there: it is refused.

        Args:
            messages: turns, each with `role` (`user`, `assistant`, or `system` for the first) and `content`.
            system: instructions that come before the first turn.
            add_generation_prompt: end where the model's reply begins.

        Raises:
            UserError: there is no turn, a role is unknown, a text holds a special token, or the model has no chat
                template or one that refuses the chat or leaves the instructions out.
        """
        if isinstance(messages, str | Mapping):
            raise UserError("the chat", "it is not a list of turns", 'give [{"role": "user", "content": "…"}]')
        for turn in messages:
            if set(turn) != {"role", "content"}:
                raise UserError("the chat", f"a turn says {', '.join(turn) or 'nothing'}", "give role and content")
        turns = [dict(turn) for turn in messages]
        if system is not None:
            turns.insert(0, {"role": "system", "content": system})
        roles = [turn["role"] for turn in turns]
        if not messages or not set(roles) <= {"system", "user", "assistant"} or "system" in roles[1:]:
            why = f"its roles are {', '.join(roles)}" if messages else "it has no turn"
            raise UserError("the chat", why, "give turns of user and assistant, before them at most one of system")
        if not self.tokenizer.chat_template:
            raise UserError(f"--chat with {self.name}", "the model has no chat template", "give a plain prompt")
        for turn in turns:
            self.check_no_special(turn["role"], turn["content"])
        begins = roles[0] == "system"
        hint = "put the system text into the first user turn" if begins else "let user and assistant take turns"
        try:
            text = str(
                self.tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False)
            )
        except TemplateError as error:
            why = f"its chat template refuses the roles {', '.join(roles)} ({error})"
            raise UserError(f"a chat with {self.name}", why, hint) from error
        if begins and turns[0]["content"].strip() not in text:
            raise UserError(f"a chat with {self.name}", "its chat template leaves the system text out", hint)
        check_text(text, "the chat")
        ids = encode_plain(self.tokenizer, text)
        if not ids:
            raise UserError("the chat", "it gives no token", "give some text")
        self.check_rows(ids, "the chat")
        return ids

    def check_no_special(self, role: str, text: str) -> None:
        """Raise a `UserError` if a turn's text holds a special token, that for unknown text aside."""
        for token in self.special_texts:
            if token in text and token != self.tokenizer.unk_token:
                raise UserError(
                    f"{token!r} in a turn of the {role}",
                    f"{self.name} would read it as a special token, which only its chat template may write",
                    "leave it out or write it otherwise",
                )

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Special tokens as texts, those that were added to the tokenizer among them."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return tuple(token for token in dict.fromkeys([*self.tokenizer.all_special_tokens, *added]) if token)

    def decode_ids(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids from its begin; special tokens are left out unless asked for."""
        return decode_plain(self.tokenizer, ids, special=special)

    def decode_continuation(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids that stand behind others: a blank at its begin is kept, whatever the tokenizer."""
        return decode_behind(self.tokenizer, ids, self._anchor, special=special)

    def token_text(self, token: int) -> str:
        """A token as the text that it stands for, its blank included; see `lm.continuations`."""
        return token_text(self.tokenizer, token, self._anchor)

    @cached_property
    def _anchor(self) -> Anchor:
        return find_anchor(self.tokenizer)

    def new_cache(self, reserve: int = 0) -> GrowingCache:
        """An empty key-value cache with room for `reserve` tokens.

        Raises:
            UserError: the model does not go on rightly from one.
        """
        self.require("prefix")
        return GrowingCache(self.n_layers, reserve)

    def forward(
        self,
        batch: TokenBatch,
        *,
        cache: GrowingCache | None = None,
        past_lengths: Tensor | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "B K V"]:
        """Logits of a batch.

        Args:
            batch: new tokens. Behind a non-empty cache they must be unpadded.
            cache: filled with the new tokens' keys and values.
            past_lengths: `[B]` tokens of each row already in the cache, padding excluded; needed if any row there
                is padded, and taken as the cache's length otherwise.
            last: compute only this many last positions' logits (all by default).
        """
        kwargs = self.forward_arguments(batch, cache=cache, past_lengths=past_lengths)
        if last and "logits_to_keep" in self._arguments:
            kwargs["logits_to_keep"] = last
        logits = self.call(**kwargs).logits
        return logits[:, -last:] if last else logits

    def call(self, **arguments: Any) -> Any:
        """What `hf` says of its own arguments, its products and the last positions' logits as fast as can be."""
        head = self.hf.get_output_embeddings()
        with contiguous_rows(head), self.products.fast(), fast_attention(self.hf):
            return self.hf(**arguments)

    @cached_property
    def products(self) -> Products:
        """How its linear maps are multiplied by. What makes many passes of few rows keeps them (`products.kept()`)."""
        return Products(linears(self.hf))

    def forward_arguments(
        self, batch: TokenBatch, *, cache: GrowingCache | None = None, past_lengths: Tensor | None = None
    ) -> dict[str, Any]:
        """What `hf` is called with: explicit positions if it takes any, a mask only where something is padded.

        Raises:
            UserError: rows are padded, and the model does not give what they give alone; or some reach beyond the
                length at which it turns all positions otherwise, and some, or what the cache holds, do not.
        """
        if batch.padded:
            self.require("padding")
        past = cache.length if cache is not None else 0
        if self.turning_length:
            self._check_turn(batch, past, past_lengths)
        positions, mask = batch.position_ids, batch.attention_mask if batch.padded else None
        if past:
            assert not batch.padded, "tokens behind a cache must not be padded"
            new = batch.ids.shape[1]
            held = torch.full_like(batch.lengths, past) if past_lengths is None else past_lengths
            positions = held[:, None] + torch.arange(new, device=batch.ids.device)
            if past_lengths is not None:
                place = torch.arange(past + new, device=batch.ids.device)
                mask = (place >= (past - held)[:, None]).long()
        if cache is None and mask is None and not torch.is_grad_enabled():  # checkpointing of gradients takes no cache
            cache = self._keeps_nothing
        return self.named_arguments(cache, input_ids=batch.ids, position_ids=positions, attention_mask=mask)

    def named_arguments(self, cache: GrowingCache | None, **arguments: Any) -> dict[str, Any]:
        """Those of some arguments that `hf` takes, the cache by its own name for it."""
        arguments = {name: value for name, value in arguments.items() if name in self._arguments}
        if "positions" not in self.capabilities:
            arguments.pop("position_ids", None)
        if cache is not None:
            arguments[self.cache_argument] = cache
        return {**arguments, "use_cache": cache is not None}


def no_row(model: LanguageModel, token: int, name: str) -> UserError:
    """The error for a token of the tokenizer that the model's embedding has no row for."""
    said = f"it holds {model.tokenizer.convert_ids_to_tokens(token)!r}"
    why = f"{said}, token {token} of the tokenizer, and {model.name} has tokens 0 to {model.vocab_size - 1}"
    return UserError(name, why, "leave it out, or take the tokenizer that belongs to the model")


def check_is_model(given: object) -> None:
    """Raise a `UserError` unless what is given as a model is a `LanguageModel`."""
    if isinstance(given, LanguageModel):
        return
    if isinstance(given, str | os.PathLike):
        name = os.fspath(given)
        raise UserError(f"model {name!r}", "it is a name, not a loaded model", f"give trimtab.load_model({name!r})")
    what = f"the {type(given).__name__} that is given as the model"
    if isinstance(given, torch.nn.Module) and hasattr(given, "generate"):
        raise UserError(what, "it is a model of transformers", "give LanguageModel.from_hf(it, tokenizer)")
    raise UserError(what, "it is no LanguageModel", "give what trimtab.load_model returns, the model first")

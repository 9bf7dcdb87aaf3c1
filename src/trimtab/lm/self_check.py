"""A model checked against itself: what is recognised by names must hold in forward passes of a few random tokens.

Layouts are recognised by how modules are called (`layouts`), and calls by how arguments are called (`model`); a model
that means something else by such a name would give wrong numbers without a word. So each claim is tried here, and what
does not hold is off, by name (`capabilities`). Local attention windows are shortened for the trial, so that its few
tokens reach beyond them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.lm.batch import TokenBatch
from trimtab.lm.capabilities import Capabilities, check_key, keep_capabilities, kept_capabilities
from trimtab.lm.layouts import text_config
from trimtab.lm.model import LanguageModel
from trimtab.lm.silence import transformers_silenced
from trimtab.lm.site_check import FAILS, check_sites, said
from trimtab.lm.taps import hooked
from trimtab.lm.upper_layers import agree, given_below, input_site
from trimtab.lm.windows import fixed_window, short_windows

ROWS, TOKENS, WINDOW, LONG = 3, 6, 2, 24
"""The trial's batch; a local window is shortened to so many tokens; what padding is tried on."""

_known: weakref.WeakKeyDictionary[transformers.PreTrainedModel, Capabilities] = weakref.WeakKeyDictionary()


def capabilities_of(model: LanguageModel) -> Capabilities:
    """What a model can do here, checked once; of a model that was loaded from files the cache on disk keeps it.

    Args:
        model: the model, with nothing of ours changing it at the moment.

    Raises:
        UserError: a plain forward pass of the model fails.
    """
    hf = model.hf
    if hf in _known:
        return _known[hf]
    if model.device.type == "meta":  # there are no numbers to compare
        return Capabilities()
    key = check_key(hf, hf.dtype, model.device.type) if hf.name_or_path else ""
    found = kept_capabilities(key) if key else None
    if found is None:
        found = check_model(model)
        if found is None:
            return Capabilities()
        if key and not any(why.startswith(FAILS) for why in found.off.values()):  # it may be the machine that failed
            keep_capabilities(key, found)
    _known[hf] = found
    return found


def check_model(model: LanguageModel) -> Capabilities | None:
    """Try all that is claimed of a model; None if its numbers are not finite, so that nothing can be compared.

    Raises:
        UserError: a plain forward pass of the model fails, or gives no next-token logits.
        MemoryError, torch.OutOfMemoryError: they pass, and say nothing about the model.
    """
    before = model.capabilities
    with ExitStack() as stack:
        model.assume(Capabilities())
        stack.callback(model.assume, before)
        for context in (torch.no_grad(), transformers_silenced(), _evaluating(model.hf)):
            stack.enter_context(context)
        stack.enter_context(torch.autocast(model.device.type, enabled=False))
        stack.enter_context(short_windows(model.hf, WINDOW))
        trial = _Trial(model)
        if not bool(trial.plain.isfinite().all()):
            return None
        off = check_sites(model, trial.ids, trial.plain, trial.middle)
        for name, check in (("resume", trial.resume), ("decode", trial.decode)):
            off |= _tried(name, check)
        if "decode" in off and (wrong := _tried("positions", trial.positions)):  # it is called without, here and later
            model.assume(Capabilities(off=wrong))
            del off["decode"]
            off |= wrong | _tried("resume", trial.resume) | _tried("decode", trial.decode)
        if "decode" in off:
            off |= _tried("prefix", trial.decode_stages(single=False)) | _tried("padding", trial.padding)
        return Capabilities(off=off)


def _tried(name: str, check: Callable[[], str]) -> dict[str, str]:
    """The reason why a check does not hold, if it does not."""
    try:
        reason = check()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except UserError as error:
        reason = error.why
    except Exception as error:  # whatever a foreign model says to what it does not know
        reason = said(error)
    return {name: reason} if reason else {}


@contextmanager
def _evaluating(hf: nn.Module) -> Iterator[None]:
    """Without dropout, whatever mode the modules are in."""
    training = [module for module in hf.modules() if module.training]
    hf.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Trial:
    """Random tokens, the model's own logits for them, and what is compared with those."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.layout = model, model.layout
        self.generator = torch.Generator().manual_seed(0)
        self.middle = model.n_layers // 2
        (self.tokens,) = self._lengths(TOKENS + fixed_window(model.hf))
        self.ids = self._random_ids(self.tokens).to(model.device)
        self.below: Tensor | None = None

        def read(x: Tensor) -> None:
            self.below = x.clone()

        try:
            with hooked(self.layout, {input_site(self.middle): read}):
                logits = model.hf(input_ids=self.ids, use_cache=False).logits
            assert logits.shape[:2] == self.ids.shape, f"its logits are of shape {tuple(logits.shape)}"
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"model {model.name}", f"a plain forward pass of a few tokens: {said(error)}", "use a causal LM"
            ) from error
        self.plain: Float[Tensor, "B T V"] = logits.float()
        self.precise = model.dtype == torch.float32

    def _random_ids(self, length: int) -> Tensor:
        """Tokens that mean nothing to a model's config, as pads, ends and places of images do."""
        config, embedding = self.model.hf.config, self.model.hf.get_input_embeddings()
        size = min(self.model.vocab_size, len(embedding.weight))  # type: ignore[arg-type, union-attr]
        special = {v for k, v in _leaves(config.to_dict()) if k.endswith(("_token_id", "_token_index"))}
        pool = torch.tensor([i for i in range(min(size, 1000)) if i not in special] or [0])
        return pool[torch.randint(len(pool), (ROWS, length), generator=self.generator)]

    def _same(self, found: Tensor, expected: Tensor) -> bool:
        return found.shape == expected.shape and agree(found.float(), expected, self.model.dtype)

    def padding(self) -> str:
        """A left-padded batch gives each row's own logits, be it longer than blocks in which a model looks back."""
        rows = [self._random_ids(length)[0] for length in self._lengths(LONG, LONG // 2, 5)]
        batch = TokenBatch.pad([row.tolist() for row in rows], int(self.ids[0, 0]), self.model.device)
        plain = [self._logits(row[None].to(self.model.device))[0] for row in rows]
        logits = self.model.forward(batch)
        pairs = [(found[-len(own) :], own) for found, own in zip(logits, plain, strict=True)]
        return "" if all(self._agree_all([pair]) for pair in pairs) else "padding on the left changes its logits"

    def positions(self) -> str:
        """Counted from 0 in every text."""
        logits = self.model.forward(TokenBatch.full(self.ids[:1]))
        return "" if self._agree_all([(logits[0], self.plain[0])]) else "it counts tokens otherwise than from 0"

    def _lengths(self, *wanted: int) -> list[int]:
        limit = getattr(text_config(self.model.hf), "max_position_embeddings", None)
        most = limit if isinstance(limit, int) and limit > 0 else max(wanted)
        return [min(length, most) for length in wanted]

    def _logits(self, ids: Tensor) -> Tensor:
        return self.model.hf(input_ids=ids, use_cache=False).logits.float()

    def decode(self) -> str:
        """Prompts that are padded, then a token at a time, from a cache."""
        return self.decode_stages(single=True)()

    def decode_stages(self, *, single: bool) -> Callable[[], str]:
        """Padded prompts, a token each if `single`, and two more tokens at once: logits of the whole texts."""

        def check() -> str:
            model, held = self.model, torch.tensor([self.tokens - 3, self.tokens - 5], device=self.model.device)
            cache = model.new_cache()
            steps = [(model.forward(self._padded(*held.tolist()), cache=cache, last=1), held)]
            for new in (1, 2) if single else (3,):
                ids = torch.stack([self.ids[row, at : at + new] for row, at in enumerate(held.tolist())])
                steps.append(
                    (model.forward(TokenBatch.full(ids), cache=cache, past_lengths=held, last=new), held + new)
                )
                held = held + new
            if cache.length != self.tokens:
                return f"its cache holds {cache.length} tokens of {self.tokens}"
            pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in held]
            for logits, ends in steps:
                for row, end in enumerate(ends.tolist()):
                    pairs[row].append((logits[row], self.plain[row, end - logits.shape[1] : end]))
            good = all(self._agree_all(of_row) for of_row in pairs)
            return "" if good else "from the cache it gives other logits than its plain forward pass"

        return check

    def _agree_all(self, pairs: list[tuple[Tensor, Tensor]]) -> bool:
        """Whether all of a row agree; in low precision most, since a router's near-tie may send a token to another
        expert."""
        if any(found.shape != expected.shape for found, expected in pairs):
            return False
        each = [self._same(f[None], e[None]) for found, expected in pairs for f, e in zip(found, expected, strict=True)]
        return all(each) if self.precise else 2 * sum(each) > len(each)

    def _padded(self, *lengths: int) -> TokenBatch:
        rows = [self.ids[row, :length].tolist() for row, length in enumerate(lengths)]
        return TokenBatch.pad(rows, int(self.ids[0, 0]), self.model.device)

    def resume(self) -> str:
        """The layers above the middle, on what the layers below gave."""
        assert self.below is not None
        with given_below(self.model, self.middle, self.below[:1]):
            logits = self.model.forward(TokenBatch.full(self.ids[:1]))
        return "" if self._agree_all([(logits[0], self.plain[0])]) else "its upper layers need more than a residual"


def _leaves(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a config that may be nested."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield from ((str(name), each) for each in (value if isinstance(value, list) else [value]))


LanguageModel.check = staticmethod(capabilities_of)

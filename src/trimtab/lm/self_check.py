"""A model checked against itself: what is recognised by names must hold in forward passes of a few random tokens.

Layouts are recognised by how modules are called (`layouts`), and calls by how arguments are called (`model`); a model
that means something else by such a name would give wrong numbers without a word. So each claim is tried here, and what
does not hold is off, by name (`capabilities`). Local attention windows are shortened for the trial, so that its few
tokens reach beyond them.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.lm.batch import TokenBatch
from trimtab.lm.capabilities import Capabilities, check_key, keep_capabilities, kept_capabilities
from trimtab.lm.findings import FAILS, Findings, said
from trimtab.lm.layouts import text_config
from trimtab.lm.model import LanguageModel
from trimtab.lm.precision import FLOAT32, product_precision
from trimtab.lm.silence import transformers_silenced
from trimtab.lm.site_check import ABSENT, check_sites
from trimtab.lm.taps import RowDelta, hooked
from trimtab.lm.upper_layers import are_comparable, difference, given_below, input_site
from trimtab.lm.windows import fixed_window, short_windows

ROWS, TOKENS, WINDOW, LONG = 2, 6, 2, 24
"""The trial's batch; a local window is shortened to so many tokens; what padding is tried on."""
SMALL = 1 << 30
"""Bytes: of fewer, a model's weights are small."""
ROUNDING = 1e-6
"""Change of activations in float32, as a share of their norm, that is no smaller than any rounding of them."""

_CACHED = "from the cache it gives other logits than its plain forward pass"
_WRONG = {
    "padding": "padding on the left changes its logits",
    "prefix": _CACHED,
    "decode": _CACHED,
    "resume": "its upper layers need more than a residual",
    "positions": "it counts tokens otherwise than from 0",
}
"""What is wrong where a check finds a difference."""

_NOT_COMPARED = "of a few random tokens its logits are NaN, infinite, or all masked"
_ROUTES = re.compile("expert|router|moe", re.IGNORECASE)
"""How modules or their classes are called that send tokens to experts."""

_threads_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[transformers.PreTrainedModel, tuple[object, Capabilities]] = (
    weakref.WeakKeyDictionary()
)
"""What was found, and what the model was set to then."""


def capabilities_of(model: LanguageModel) -> Capabilities:
    """What a model can do here, checked once; of a model that was loaded from files the cache on disk keeps it.

    Args:
        model: the model, with nothing of ours changing it at the moment.

    Raises:
        UserError: a plain forward pass of the model fails.
    """
    hf = model.hf
    if model.device.type == "meta":  # there are no numbers to compare
        return Capabilities()
    with torch.autocast(model.device.type, enabled=False):  # as the check runs
        products = product_precision(hf.dtype, model.device).name
    setting = hf.dtype, model.device, products, getattr(text_config(hf), "_attn_implementation", None)
    if hf in _known and _known[hf][0] == setting:
        return _known[hf][1]
    key = check_key(hf, model.device.type, products) if hf.name_or_path else ""
    found = kept_capabilities(key) if key else None
    if found is None:
        found = check_model(model)
        if found is None:
            print(f"trimtab: note: {model.name} is not checked: {_NOT_COMPARED}", file=sys.stderr, flush=True)
            return Capabilities(unchecked=_NOT_COMPARED)
        for name, why in found.unsure.items():
            print(f"trimtab: note: {name} with {model.name}: {why}", file=sys.stderr, flush=True)
        machine = any(why.startswith(FAILS) for why in found.off.values())  # it may be this that failed
        if key and not machine and not found.unsure:  # which is to be said each time
            keep_capabilities(key, found)
    _known[hf] = setting, found
    return found


def check_model(model: LanguageModel) -> Capabilities | None:
    """Try all that is claimed of a model; None if its logits are NaN, +∞ or all masked, so that none can be compared.

    Raises:
        UserError: a plain forward pass of the model fails, or gives no next-token logits.
        MemoryError, torch.OutOfMemoryError: they pass, and say nothing about the model.
    """
    before = model.capabilities
    with ExitStack() as stack:
        model.assume(Capabilities())
        stack.callback(model.assume, before)
        for context in (torch.no_grad(), transformers_silenced(), _evaluating(model.hf), _one_thread(model.hf)):
            stack.enter_context(context)
        stack.enter_context(torch.autocast(model.device.type, enabled=False))
        stack.enter_context(short_windows(model.hf, WINDOW))
        if (quick := _Trial(model)).is_right():
            return quick.found.capabilities
        trial = _Trial(model)
        trial.run_plain()
        if not are_comparable(trial.plain):
            return None
        found = trial.found
        check_sites(model, trial.ids, found, plain=trial.plain, last=trial.last)
        for check in (trial.resume, trial.decode):
            trial.attempt(check)
        if "decode" in found.off:
            trial.attempt(trial.positions)
            if "positions" in found.off:  # it is called without, here and later
                model.assume(Capabilities(off={"positions": found.off["positions"]}))
                for check in (trial.resume, trial.decode):
                    found.restore(check.__name__)
                    trial.attempt(check)
        if "decode" in found.off:
            for check in (trial.prefix, trial.padding):
                trial.attempt(check)
        return found.capabilities


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


@contextmanager
def _one_thread(hf: transformers.PreTrainedModel) -> Iterator[None]:
    """For a small model's few tokens on the CPU, whose products are too small for threads to share."""
    weights = list(hf.parameters())
    if sum(weight.nbytes for weight in weights) >= SMALL or any(weight.device.type != "cpu" for weight in weights):
        yield
        return
    with _threads_lock:  # of checks side by side one would take the other's one thread for what there was
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class _Trial:
    """Random tokens, the model's own logits for them, and what is compared with those.

    Each check is named after a capability and gives the difference that it finds.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.layout = model, model.layout
        self.generator = torch.Generator().manual_seed(0)
        self.upper = _upper(model)
        (self.tokens,) = self._lengths(TOKENS + fixed_window(model.hf))
        self.ids = self._random_ids(self.tokens).to(model.device)
        self.precision = product_precision(model.dtype, model.device)
        precise = self.precision.rounding <= FLOAT32.rounding
        names = (f"{name} {type(module).__name__}" for name, module in model.hf.named_modules())
        self.blurred = not precise and any(_ROUTES.search(name) for name in names)
        self.found = Findings(self.precision, self._rounding)
        self.plain: Float[Tensor, "B T V"] = torch.empty(0)
        self.below: Tensor | None = None
        self.last: Tensor | None = None

    def is_right(self) -> bool:
        """Whether all that can be recognised is right: half the passes of what finds out what is wrong.

        Untouched rows beside edited ones stand for the plain forward pass, and the upper layers alone are fed several
        tokens behind a cache, on what the layers below gave. What is wrong in either makes a difference somewhere.
        """
        try:
            edited, residuals = check_sites(self.model, self.ids.repeat(2, 1), self.found)
            if any(why != ABSENT for why in self.found.off.values()) or self.found.unsure:
                return False
            self.plain, self.below = edited[ROWS:], residuals[input_site(self.upper)][ROWS:]
            by = self._cached(1, 2, resumed=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a foreign model says
            return False
        return by <= self.found.usual

    def run_plain(self) -> None:
        """The plain forward pass of the untouched model. Raises a `UserError` if it fails."""
        read: dict[int, Tensor] = {}

        def reader(layer: int) -> Callable[[Tensor], None]:
            return lambda x: read.update({layer: x.clone()})

        try:
            inputs = {input_site(layer): reader(layer) for layer in {self.upper, self.model.n_layers}}
            with hooked(self.layout, inputs):
                logits = self.model.hf(input_ids=self.ids, use_cache=False).logits
            assert logits.shape[:2] == self.ids.shape, f"its logits are of shape {tuple(logits.shape)}"
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            why = f"a plain forward pass of a few tokens: {said(error)}"
            raise UserError(f"model {self.model.name}", why, "use a causal LM") from error
        self.plain, self.last = logits.float().to(self.model.device), read.get(self.model.n_layers)
        self.below = read.get(self.upper)

    def attempt(self, check: Callable[[], float]) -> None:
        """Keep what a check finds under its name."""
        name = check.__name__
        try:
            self.found.compare([name], _WRONG[name], check())
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except UserError as error:
            self.found.fail([name], error.why)
        except Exception as error:  # whatever a foreign model says to what it does not know
            self.found.fail([name], said(error))

    def _rounding(self) -> float:
        """How far the model's own logits move if every layer's input changes by about its rounding."""
        size = max(ROUNDING, self.precision.rounding)
        ids = self.ids.repeat(2, 1)

        def push(x: Tensor) -> RowDelta | None:
            if x.shape[:-1] != ids.shape:
                return None
            batch, time = torch.ones(x.shape[:2], device=x.device).nonzero(as_tuple=True)
            now = x[batch, time].float()
            noise = torch.randn(now.shape, generator=self.generator).to(now)
            return RowDelta(batch, time, size * noise * now.norm(dim=-1, keepdim=True) / now.shape[-1] ** 0.5)

        with hooked(self.layout, {input_site(layer): push for layer in range(self.model.n_layers)}):
            logits = self.model.hf(input_ids=ids, use_cache=False).logits.float()
        return self._apart(zip(logits.flatten(0, 1), self.plain.repeat(2, 1, 1).flatten(0, 1), strict=True))

    def _random_ids(self, length: int) -> Tensor:
        """Tokens that mean nothing to a model's config, as pads, ends and places of images do."""
        config, embedding = self.model.hf.config, self.model.hf.get_input_embeddings()
        size = min(self.model.vocab_size, len(embedding.weight))  # type: ignore[arg-type, union-attr]
        special = {v for k, v in _leaves(config.to_dict()) if k.endswith(("_token_id", "_token_index"))}
        pool = torch.tensor([i for i in range(min(size, 1000)) if i not in special] or [0])
        return pool[torch.randint(len(pool), (ROWS, length), generator=self.generator)]

    def _apart(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        """The largest difference of some logits; in low precision the median where the model has a router, since a
        near-tie may send a token to another expert."""
        each = []
        for found, expected in pairs:
            assert found.shape == expected.shape, f"logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
            each.append(difference(found.to(expected), expected))
        each.sort(key=lambda by: (math.isnan(by), by))
        return each[len(each) // 2 if self.blurred else -1]

    def _rows_apart(self, rows: Iterable[Iterable[tuple[Tensor, Tensor]]]) -> float:
        """The largest difference of rows, each of blocks of logits."""
        return max(self._apart(pair for block in row for pair in zip(*block, strict=True)) for row in rows)

    def padding(self) -> float:
        """Of a left-padded batch from each row's own logits, be it longer than blocks in which a model looks back."""
        rows = [self._random_ids(length)[0] for length in self._lengths(LONG, LONG // 2, 5)]
        batch = TokenBatch.pad([row.tolist() for row in rows], int(self.ids[0, 0]), self.model.device)
        plain = [self._logits(row[None].to(self.model.device))[0] for row in rows]
        logits = self.model.forward(batch)
        return self._rows_apart([[(found[-len(own) :], own)] for found, own in zip(logits, plain, strict=True)])

    def positions(self) -> float:
        """With positions counted from 0."""
        logits = self.model.forward(TokenBatch.full(self.ids[:1]))
        return self._rows_apart([[(logits[0], self.plain[0])]])

    def _lengths(self, *wanted: int) -> list[int]:
        limit = getattr(text_config(self.model.hf), "max_position_embeddings", None)
        most = limit if isinstance(limit, int) and limit > 0 else max(wanted)
        return [min(length, most) for length in wanted]

    def _logits(self, ids: Tensor) -> Tensor:
        return self.model.hf(input_ids=ids, use_cache=False).logits.float()

    def decode(self) -> float:
        """Of padded prompts, a token each, and two more at once, from whole texts."""
        return self._cached(1, 2)

    def prefix(self) -> float:
        """Of padded prompts, and three tokens at once, from whole texts."""
        return self._cached(3)

    def _cached(self, *news: int, resumed: bool = False) -> float:
        """Padded prompts, then so many tokens at a time; the last of them through the upper layers alone if asked."""
        model, held = self.model, torch.tensor([self.tokens - 3, self.tokens - 5], device=self.model.device)
        cache = model.new_cache()
        steps = [(model.forward(self._padded(*held.tolist()), cache=cache, last=1), held)]
        for number, new in enumerate(news, 1):
            places = [(row, slice(at, at + new)) for row, at in enumerate(held.tolist())]
            with ExitStack() as stack:
                if resumed and number == len(news):
                    assert self.below is not None
                    below = torch.stack([self.below[place] for place in places])
                    stack.enter_context(given_below(model, self.upper, below))
                batch = TokenBatch.full(torch.stack([self.ids[place] for place in places]))
                logits = model.forward(batch, cache=cache, past_lengths=held, last=new)
            held = held + new
            steps.append((logits, held))
        if not resumed and cache.length != self.tokens:
            raise UserError("the cache", f"its cache holds {cache.length} tokens of {self.tokens}", "")
        rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in held]
        for logits, ends in steps:
            for row, end in enumerate(ends.tolist()):
                rows[row].append((logits[row], self.plain[row, end - logits.shape[1] : end]))
        return self._rows_apart(rows)

    def _padded(self, *lengths: int) -> TokenBatch:
        rows = [self.ids[row, :length].tolist() for row, length in enumerate(lengths)]
        return TokenBatch.pad(rows, int(self.ids[0, 0]), self.model.device)

    def resume(self) -> float:
        """Of the upper layers on what the layers below gave."""
        assert self.below is not None, "no residual to begin with"
        with given_below(self.model, self.upper, self.below[:1]):
            logits = self.model.forward(TokenBatch.full(self.ids[:1]))
        return self._rows_apart([[(logits[0], self.plain[0])]])


def _upper(model: LanguageModel) -> int:
    """A layer with a quarter of all from it on, or as many as it takes to have one of each type."""
    kinds = getattr(text_config(model.hf), "layer_types", None)
    least = max(model.n_layers - max(2, model.n_layers // 4), 0)
    if not isinstance(kinds, list | tuple) or len(kinds) != model.n_layers:
        return least
    return min([least, *(max(n for n, kind in enumerate(kinds) if kind == each) for each in set(kinds))])


def _leaves(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a config that may be nested."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield from ((str(name), each) for each in (value if isinstance(value, list) else [value]))


LanguageModel.check = staticmethod(capabilities_of)

"""Forward passes of whole texts that ask the device nothing.

Given positions, but neither a mask nor a cache, `transformers` asks at every pass whether the positions are of several
texts in one row (`find_packed_sequence_indices`), once for each kind of mask, and a GPU that is asked is waited for.
Given a cache it does not ask. So whole texts get one that keeps nothing and hands on keys and values as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from trimtab.lm.cache import GrowingCache
from trimtab.lm.silence import transformers_silenced
from trimtab.lm.windows import fixed_window, short_windows

WINDOW, TOKENS = 2, 6
"""As in a model's check: a local window is shortened to so many tokens, and the trial's few reach beyond it."""


def is_waited_for(device: torch.device) -> bool:
    """Whether asking a device for a number waits for all that it has still to do."""
    return device.type not in ("cpu", "meta")


@torch.no_grad()
def cache_that_keeps_nothing(
    hf: transformers.PreTrainedModel, vocab_size: int, n_layers: int, named: Callable[..., dict[str, Any]]
) -> GrowingCache | None:
    """A cache that forward passes of whole texts may be given; None where a pass of a few tokens has other bits then.

    Args:
        hf: the model, with nothing of ours changing it at the moment.
        vocab_size, n_layers: of the model.
        named: `LanguageModel.named_arguments`.

    Raises:
        MemoryError, torch.OutOfMemoryError, torch.AcceleratorError: they pass, and say nothing about the model.
    """
    cache = GrowingCache(n_layers).frozen()
    cache.keeps_nothing = True
    generator, length = torch.Generator().manual_seed(0), TOKENS + fixed_window(hf)
    ids = torch.randint(vocab_size, (2, length), generator=generator).to(hf.get_input_embeddings().weight.device)  # type: ignore[union-attr, arg-type]
    given = {"input_ids": ids, "position_ids": torch.arange(length, device=ids.device).expand(2, -1)}

    def logits(cache: GrowingCache | None) -> Tensor:
        return hf(**named(cache, **given)).logits

    try:
        with transformers_silenced(), short_windows(hf, WINDOW):
            return cache if torch.equal(logits(cache), logits(None)) else None
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception:  # a model that takes no cache, or not this one
        return None

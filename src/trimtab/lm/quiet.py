"""Keep `transformers` and the hub client from writing to the terminal while a model is loaded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from unittest.mock import patch


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back warnings and progress bars of `transformers` and `huggingface_hub`; errors are raised all the same."""
    from transformers.utils import logging as hf_logging

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "accelerate")]
    levels = [logger.level for logger in loggers]
    bars = hf_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def one_gguf_reader() -> Iterator[None]:
    """Parse a GGUF file once, not three times, while `transformers` reads it; and without its own progress bar.

    It opens a new reader for the config, the weights and the tokenizer, and each spends seconds (for Gemma's 262,144
    tokens, most of a minute) on the vocabulary.
    """
    import gguf
    from tqdm.auto import tqdm

    with ExitStack() as stack:
        stack.enter_context(patch.object(gguf, "GGUFReader", lru_cache(maxsize=1)(gguf.GGUFReader)))
        with suppress(ImportError):
            from transformers import modeling_gguf_pytorch_utils as hf_gguf

            stack.enter_context(patch.object(hf_gguf, "tqdm", partial(tqdm, disable=True), create=True))
        yield

"""Read a GGUF file into an ordinary `transformers` model with dequantized float weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
import transformers
from tqdm.auto import tqdm

from trimtab.errors import UserError
from trimtab.lm.silence import transformers_silenced


class LoadedModel(NamedTuple):
    """A model and its tokenizer."""

    hf: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase


def read_gguf(path: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model in a GGUF file, dequantized to `dtype`; it can be saved like any other.

    Raises:
        UserError: the file is not GGUF, is cut short, or holds an architecture that `transformers` cannot read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"file {path}", "it is not a GGUF file: its first bytes are not GGUF", "give a GGUF file")
    arguments: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        with transformers_silenced(), _parsed_once():
            dequantized = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **arguments)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **arguments)
            return LoadedModel(_without_quantization(dequantized), tokenizer)
    except Exception as error:  # a damaged file may fail anywhere in the parser
        raise UserError(
            f"file {path}",
            f"it could not be read as GGUF ({type(error).__name__}: {first_line(error)})",
            "fetch it again, or give a model in Hugging Face's layout",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, cut to 200 characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:199] + "…"


def _without_quantization(loaded: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same weights under a config that does not call them quantized (`transformers` will not save those)."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    clean = type(loaded).from_pretrained(None, config=config, state_dict=loaded.state_dict(), dtype=loaded.dtype)
    clean.generation_config = loaded.generation_config
    return clean


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let `transformers` parse a GGUF file once, not three times, and without its own progress bar.

    It opens a new reader for the config, the weights and the tokenizer, and each spends seconds (for Gemma's 262,144
    tokens, most of a minute) on the vocabulary. It offers no other way than to replace what it imports.
    """
    hf_gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    before = gguf.GGUFReader, hf_gguf.tqdm
    gguf.GGUFReader, hf_gguf.tqdm = lru_cache(maxsize=1)(gguf.GGUFReader), partial(tqdm, disable=True)
    try:
        yield
    finally:
        gguf.GGUFReader, hf_gguf.tqdm = before

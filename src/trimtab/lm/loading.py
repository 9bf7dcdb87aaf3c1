"""Load a model by catalogue name, directory, GGUF file or hub id; say why one cannot be loaded."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch
import transformers
from safetensors import SafetensorError

from trimtab.errors import UserError, check_one_of
from trimtab.lm.catalogue import cached_path, check_is_given, close_matches, find_entry, unknown_model
from trimtab.lm.fetching import pull
from trimtab.lm.gguf_files import LoadedModel, first_line, read_gguf
from trimtab.lm.model import LanguageModel
from trimtab.lm.products import fast_bfloat16
from trimtab.lm.silence import transformers_silenced
from trimtab.lm.stages import stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What damaged or foreign files make transformers, safetensors and json raise.
_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    accept_terms: bool = False,
    progress: bool = True,
    allow: Sequence[str] = (),
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a catalogue name (`trimtab models list`), a directory in Hugging Face's layout, a `.gguf` file, or
            a hub id (`owner/name`). The hub's local cache is tried before the network. Only safetensors and GGUF are
            read, never pickles, and no code from a model's repository is run.
        dtype: float32, bfloat16 or float16.
        device: a torch device, `cpu` or `cuda`, `cuda:1`, …
        accept_terms: agree to a catalogue model's terms.
        progress: say on stderr what takes long.
        allow: what is used even if the model's check of itself finds a difference, of `trimtab.lm.CAPABILITIES`.

    Raises:
        UserError: there is no such model, it cannot be fetched, or its files cannot be read.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        what = f"the {type(name_or_path).__name__} that is given as the model's name"
        hint = "a model that is in memory goes in as LanguageModel.from_hf(model, tokenizer)"
        raise UserError(what, "it is neither a name nor a path", hint)
    name = os.fspath(name_or_path)
    check_is_given(name)
    torch_dtype, torch_device = check_dtype(dtype), check_device(device)
    check_products(torch_dtype, torch_device)
    path = Path(name).expanduser()
    entry = find_entry(name)
    directory = pull(name, accept_terms=accept_terms, progress=progress) if entry else path
    with stage(f"loading {name}", shown=progress, line=False):
        if directory.is_dir():
            again = f"run `trimtab models pull {name} --again`" if entry else "fetch or save it again"
            loaded = _read_directory(directory, torch_dtype, again)
        elif path.is_file():
            if path.suffix.lower() != ".gguf":
                why = "only .gguf files are read by themselves"
                raise UserError(f"model file {path}", why, "give a directory or a .gguf file")
            loaded = read_gguf(path.resolve(), torch_dtype)
        else:
            loaded = _read_hub(name, torch_dtype)
    _check_tokenizer(loaded, name)
    hf = loaded.hf.to(torch_device)  # type: ignore[arg-type]
    return LanguageModel(hf, loaded.tokenizer, name, allow)


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model that is here, without the model's weights.

    Args:
        name_or_path: as `load_model` takes it.

    Raises:
        UserError: the model is not here, or its tokenizer cannot be read.
    """
    name = os.fspath(name_or_path)
    entry, path = find_entry(name), Path(name).expanduser()
    source = (cached_path(entry) if entry else None) or (path if path.is_dir() else name)
    try:
        if path.is_file():
            return read_gguf(path.resolve(), torch.float32).tokenizer
        with transformers_silenced():
            return transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    except _UNREADABLE as error:
        why = f"it could not be read here ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"tokenizer of {name}", why, "load the model once, or name its directory") from error


def check_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype of that name. Raises `UserError` if models are not loaded in it."""
    known = str(name).removeprefix("torch.")
    check_one_of("dtype", known, DTYPES)
    return DTYPES[known]


def check_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises `UserError` if torch cannot use it here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for CUDA
        raise UserError(
            f"device {name!r}", first_line(error), "use cpu, or a device that torch can see here"
        ) from error
    return device


def check_products(dtype: torch.dtype, device: torch.device) -> None:
    """Raise a `UserError` if a model is to be in bfloat16 on a card without its products, which torch would emulate."""
    if dtype == torch.bfloat16 and device.type == "cuda" and not fast_bfloat16(device):
        why = f"{torch.cuda.get_device_name(device)} has no products in bfloat16"
        raise UserError(f"dtype bfloat16 on {device}", why, "use --dtype float32, or another device")


def _read_directory(path: Path, dtype: torch.dtype, hint: str) -> LoadedModel:
    what = f"model directory {path}"
    if not (path / "config.json").is_file():
        held = sorted(file.name for file in path.glob("*.gguf"))
        raise UserError(what, "it holds no config.json", f"give the file {path / held[0]}" if held else hint)
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise UserError(
                what,
                f"its weights are in {pickles[0]}, a pickle, which may run code when opened",
                "save it as safetensors (save_pretrained(..., safe_serialization=True)) where you trust it",
            )
        raise UserError(what, "it holds no *.safetensors", hint)
    try:
        return _from_pretrained(path, dtype, local_files_only=True)
    except _UNREADABLE as error:
        raise UserError(what, f"it could not be read ({type(error).__name__}: {first_line(error)})", hint) from error


def _read_hub(name: str, dtype: torch.dtype) -> LoadedModel:
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.lower().endswith((".gguf", ".safetensors")):
        raise UserError(f"model {name}", "there is no such file or directory", "check the path")
    if "/" not in name and close_matches(name):
        raise unknown_model(name)
    try:
        return _from_pretrained(name, dtype, local_files_only=True)
    except _UNREADABLE:
        pass  # not (whole) in the hub's cache
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "on", "yes", "true"):
        _not_from_hub(name, f"it is not in the hub's local cache, and HF_HUB_OFFLINE keeps {endpoint} out of reach")
    if not _reachable(endpoint):
        _not_from_hub(name, f"it is not in the hub's local cache, and {endpoint} cannot be reached")
    try:
        return _from_pretrained(name, dtype)
    except _UNREADABLE as error:
        _not_from_hub(name, f"{endpoint} would not give it ({type(error).__name__}: {first_line(error)})", error)


def _not_from_hub(name: str, why: str, cause: BaseException | None = None) -> NoReturn:
    if "/" not in name:
        raise unknown_model(name, f"it is not in the catalogue; as a hub id, {why}") from cause
    raise UserError(
        f"model {name}",
        why,
        "check the id, log in for a gated model (hf auth login), or give a directory; `trimtab models list` names "
        "models that need no hub",
    ) from cause


def _reachable(endpoint: str) -> bool:
    """Whether a connection to the hub opens: asked first, since its client retries for half a minute otherwise."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def _from_pretrained(source: str | Path, dtype: torch.dtype, **arguments: Any) -> LoadedModel:
    with transformers_silenced():
        tokenizer: transformers.PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            source, **arguments
        )
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        options["adapter_kwargs"] = dict(arguments)  # else PEFT asks the hub, whatever is said here
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source, **options, **arguments)
        hf, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        raise ValueError(f"{len(absent)} weights are missing, {absent[0]} among them")
    return LoadedModel(hf, tokenizer)


def _check_tokenizer(loaded: LoadedModel, name: str) -> None:
    """Raise a `UserError` unless the tokenizer turns text into tokens that the model has, and back."""
    tokenizer: transformers.PreTrainedTokenizerBase = loaded.tokenizer
    embedding = loaded.hf.get_input_embeddings()
    rows = embedding.weight.shape[0]  # type: ignore[union-attr]
    ids = list(tokenizer("The cat sat.", add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    hint = "give a model whose tokenizer lies beside it"
    if not ids or not str(tokenizer.decode(ids)).strip():
        raise UserError(f"tokenizer of {name}", "it turns text into no tokens, or tokens into no text", hint)
    if max(ids) >= rows:
        raise UserError(f"tokenizer of {name}", f"it gives token {max(ids)}, and the model has {rows}", hint)

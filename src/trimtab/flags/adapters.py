"""Low-rank additions to weights (LoRA, Hu et al. 2021, arXiv 2106.09685), by PEFT, by which flags are written.

What a dimension of the residual stream holds is written by the linear maps that end each layer's attention and MLP
(`o_proj` and `down_proj` in Llama's family, `c_proj` in GPT-2). Between two sites of flags there is one of them, and
unless it is trained, nothing but its input can move a flag. So all of them must be, from the flags' first layer on.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.errors import UserError, did_you_mean
from trimtab.flags.config import LoraOptions
from trimtab.flags.spec import KINDS, FlagSpec
from trimtab.lm import LanguageModel, Site, load_model

ADAPTER_FILE = "adapter_config.json"
"""What PEFT calls the file that says that a directory holds an adapter."""
ADDED = ".lora_"
"""In the names of LoRA's weights."""
EITHER = (nn.Linear, Conv1D)


def unwrapped(model: object) -> transformers.PreTrainedModel | None:
    """The model of `transformers` that is given as such, in a `LanguageModel` or in a `PeftModel`; else None."""
    if isinstance(model, LanguageModel):
        return model.hf
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        around: Any = model
        model = around.get_base_model()
    return model if isinstance(model, transformers.PreTrainedModel) else None


def has_adapter(hf: nn.Module) -> bool:
    """Whether a model has weights of LoRA."""
    return any(ADDED in name for name, _ in hf.named_parameters())


def check_lora(model: LanguageModel, flags: FlagSpec, options: LoraOptions) -> list[str]:
    """Ends of the names of the modules that LoRA adds to.

    Raises:
        UserError: a module is none of the layers' linear ones, or one that writes flags is left out or not found.
    """
    names = {module: name for name, module in model.hf.named_modules()}
    layers = [part for layer in model.layout.layers for part in layer.module.modules()]
    known = {names[part]: names[part].rpartition(".")[2] for part in layers if isinstance(part, EITHER)}
    ends = sorted(set(known.values()))
    for given in options.lora_modules:
        if not any(_ends_in(name, given) for name in known):
            why = f"the linear modules of {model.name}'s layers are {', '.join(ends)}"
            raise UserError(f"module {given!r}", why, did_you_mean(given, ends, "choose some of them"))
    chosen = list(options.lora_modules or ends)
    written, left_out = dict[str, None](), dict[str, None]()
    for site in flags.sites:
        writer = names[_writer(model, site, "LoRA for flags", "train all weights: adapt full")]
        end = known[writer]
        written[end] = None
        if not any(_ends_in(writer, given) for given in chosen):
            left_out[end] = None
    if left_out:
        first = min(site.layer for site in flags.sites)
        why = f"flags from layer {first} on are written by {' and '.join(written)}"
        hint = f"add {' and '.join(left_out)}, or leave lora_modules out for all of {', '.join(ends)}"
        raise UserError(f"LoRA in {', '.join(chosen)}", why, hint)
    return chosen


def add_adapter(model: LanguageModel, flags: FlagSpec, options: LoraOptions, seed: int) -> tuple[LanguageModel, Any]:
    """A copy of a model with an adapter that changes nothing yet, and the `PeftModel` around it.

    Args:
        model: it stays as it is.
        flags: that the adapter must reach.
        options: rank, alpha and modules.
        seed: of the adapter's first values.

    Raises:
        UserError: as `check_lora` says.
    """
    chosen = check_lora(model, flags, options)
    hf = copy.deepcopy(model.hf)
    alpha = 2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    transposed = any(isinstance(module, Conv1D) for module in hf.modules())
    with _peft() as peft, torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=options.lora_rank,
            lora_alpha=alpha,
            target_modules=chosen,
            fan_in_fan_out=transposed,
        )
        adapter = peft.get_peft_model(hf, settings)
    place = Path(model.name)
    name = str(place.resolve()) if place.exists() else model.name
    adapter.peft_config["default"].base_model_name_or_path = name
    hf, name = adapter.get_base_model(), f"{model.name} with flags"
    return LanguageModel.from_hf(hf, model.tokenizer, name, model.allow), adapter


def load_adapter(base: LanguageModel, path: Path) -> tuple[LanguageModel, Any]:
    """A model with a saved adapter, and the `PeftModel` around it. The model that is given becomes it.

    Raises:
        UserError: the adapter's files cannot be read, or do not fit the model.
    """
    try:
        with _peft() as peft:
            adapter = peft.PeftModel.from_pretrained(base.hf, str(path), torch_device=str(base.device))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        why = f"it could not be read ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        raise UserError(f"adapter {path}", why, f"give the adapter's own model, and not {base.name}") from error
    return LanguageModel.from_hf(adapter.get_base_model(), base.tokenizer, str(path), base.allow), adapter


def save_adapter(adapter: Any, path: Path, dtype: torch.dtype) -> None:
    """What `PeftModel.save_pretrained` writes, weights in a precision, without PEFT's empty model card."""
    state = {name: tensor.to(dtype) if ADDED in name else tensor for name, tensor in adapter.state_dict().items()}
    adapter.save_pretrained(str(path), state_dict=state, save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)


def base_of(adapter: Any) -> str:
    """What the model that an adapter was trained on is loaded by."""
    return str(adapter.peft_config["default"].base_model_name_or_path)


def load_base(
    name: str, path: Path, *, device: str | torch.device, dtype: str | torch.dtype, allow: Sequence[str] = ()
) -> LanguageModel:
    """The model that an adapter was trained on. Raises a `UserError` if it cannot be loaded."""
    try:
        return load_model(name, device=device, dtype=dtype, allow=allow)
    except UserError as error:
        hint = "load that model and give it as base"
        raise UserError(f"the model that {path} adapts", f"{error.what}: {error.why}", hint) from error


def _writer(model: LanguageModel, site: Site, what: str, hint: str) -> nn.Module:
    """The linear map whose output is the last that is added to the stream before a site.

    Raises:
        UserError: it was not found; `what` it was looked for, and what to do (`hint`), are in the message.
    """
    layer = model.layout.layers[site.layer]
    if site.kind == "resid_mid":
        found, branch = None if layer.attention is None else layer.attention.out, "attention"
    else:
        mlp = getattr(layer.module, "mlp", None)
        inside = mlp if isinstance(mlp, nn.Module) else nn.Module()
        parts = {name: part for name, part in inside.named_modules() if isinstance(part, EITHER)}
        ends = [name.removesuffix(".base_layer").rpartition(".")[2] for name in parts if "lora_" not in name]
        # Where there are experts, no single map ends the MLP: several of one name, or one weight of three dimensions.
        experts = ends.count(ends[-1] if ends else "") > 1 or any(weight.ndim > 2 for weight in inside.parameters())
        last, branch = list(parts.values())[-1] if parts and not experts else None, "the MLP"
        width = last.out_features if isinstance(last, nn.Linear) else getattr(last, "nf", None)
        found = last if width == model.d_model else None
    if found is None:
        raise UserError(f"{what} at {site} of {model.name}", f"the linear map that ends {branch} was not found", hint)
    return found


def _ends_in(name: str, given: str) -> bool:
    return name == given or name.endswith(f".{given}")


@contextmanager
def _peft() -> Iterator[Any]:
    """The library, its warnings held back: what they speak of is checked here."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield peft


def writing_rows(model: LanguageModel, flags: FlagSpec) -> list[Tensor]:
    """Weights that are trained and write into the stream up to the flags' last site, each with d_model rows.

    They share memory with the parameters; a row is all that writes one dimension.

    Raises:
        UserError: a linear map that ends attention or MLP was not found.
    """
    sites = [Site(kind, layer) for layer in range(flags.sites[-1].layer + 1) for kind in KINDS]
    found: list[Tensor] = []
    for site in sites:
        module = _writer(model, site, "rows that write flags", "let them learn like the rest: flag_lr_factor 1")
        for name, part in module.named_modules():
            if not isinstance(part, EITHER) or "lora_A" in name:
                continue
            transposed = isinstance(part, Conv1D)
            for weight in (part.weight, part.bias):
                if weight is not None and weight.requires_grad:
                    found.append(weight.data.T if transposed and weight.ndim == 2 else weight.data)
    return found


def trained_weights(hf: nn.Module, adapt: str) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: weight for name, weight in hf.named_parameters() if adapt == "full" or ADDED in name}

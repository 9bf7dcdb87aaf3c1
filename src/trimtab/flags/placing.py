"""Where flags go in a model that has none yet: which dimensions, from which layer on, how large "on" is.

Dimensions are those whose values vary least over ordinary text, so that little is lost when they are taken. "On" grows
with depth because residual norms do: it is a multiple of the usual size of a coordinate at each site, or the paper's
0.25·k after the MLP of layer k (k from 1) and 0.25·k − 0.125 after its attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.errors import UserError, check_one_of, did_you_mean
from trimtab.flags.examples import Example, encode
from trimtab.flags.spec import KINDS, FlagSpec, check_concepts, check_dims
from trimtab.lm import LanguageModel, Site, TokenBatch, edited
from trimtab.lm.model import check_is_model
from trimtab.runs import Meter, plain, text_id, whole_numbers

Ramp = Literal["norms", "paper"]
FIRST_CLEAN = 5 / 32
"""Share of the depth below which the paper's flags never became clean; flags begin there unless told otherwise."""
RAMP_SCALE = 1.0
"""How many times the usual size of a coordinate "on" is, unless told otherwise."""
MEASURED_TOKENS = 8192
"""Tokens on which the residual stream is measured."""
BATCH = 8


class Residuals(NamedTuple):
    """The residual stream at S sites over many tokens; each row's first token, often a sink, is left out."""

    variance: Float[Tensor, "S d"]
    size: Float[Tensor, " S"]
    """Median over tokens of ‖x‖/√d, the usual size of a coordinate."""

    @property
    def relative_variance(self) -> Float[Tensor, " d"]:
        """Variance of each dimension over the site's mean variance, mean over sites."""
        return (self.variance / self.variance.mean(dim=1, keepdim=True)).mean(dim=0)


def flag_sites(model: LanguageModel, from_layer: int | None = None) -> list[Site]:
    """After attention and after the MLP of every layer from one on; the paper's share of the depth by default.

    Raises:
        UserError: there is no such layer, or the model's streams between attention and MLP were not found.
    """
    first = round(FIRST_CLEAN * model.n_layers) if from_layer is None else _one_number(from_layer, "layer")
    if not 0 <= first < model.n_layers:
        why = f"{model.name} has layers 0 to {model.n_layers - 1}"
        raise UserError(f"flags from layer {first} on", why, "choose a layer in that range")
    try:
        return [model.site(f"{kind}.{i}") for i in range(first, model.n_layers) for kind in KINDS]
    except UserError as error:
        hint = "take a model of Llama's family (Llama, SmolLM, Qwen, Mistral, Gemma) or GPT-2"
        raise UserError(f"flags in {model.name}", f"there is no {error.what}: {error.why}", hint) from error


def place_flags(
    model: LanguageModel,
    concepts: Sequence[str],
    texts: Sequence[str] | Sequence[Example],
    *,
    dims: int | Mapping[str, Sequence[int]] = 16,
    from_layer: int | None = None,
    ramp: Ramp = "norms",
    ramp_scale: float = RAMP_SCALE,
    chat: bool = False,
    max_tokens: int = 256,
) -> FlagSpec:
    """Choose dimensions, sites and targets of flags for a model.

    Args:
        model: the model before it is finetuned.
        concepts: names of the flags.
        texts: the examples to train on, or ordinary text of the kind that the model will write. About 8,192 tokens are
            looked at, of texts in an order that mixes them.
        dims: how many dimensions in all, spread over the concepts, those of the lowest baseline variance; or the
            dimensions of each concept. The variance of a dimension is divided by the site's mean variance and averaged
            over sites.
        from_layer: first layer with flags; 5/32 of the depth by default.
        ramp: `norms` for `ramp_scale` times the median over tokens of ‖x‖/√d at each site, or `paper`.
        ramp_scale: see there; `paper` does not use it.
        chat, max_tokens: how examples become tokens, as in `FlagTraining`.

    Raises:
        UserError: fewer dimensions than concepts or as many as the model has, a dimension out of range or used twice, a
            layer that does not exist, or a model whose residual sites cannot be found.
    """
    check_is_model(model)
    check_concepts(concepts)
    check_one_of("ramp", ramp, ("norms", "paper"))
    if not (isinstance(ramp_scale, int | float) and 0 < ramp_scale < float("inf")):
        raise UserError(f"ramp_scale {ramp_scale}", "it must be a number above 0", "give one like 1")
    if isinstance(texts, str):
        raise UserError("the texts that flags are placed by", "they are one text", "give a list of texts")
    sites = flag_sites(model, from_layer)
    count, chosen = 0, None
    if isinstance(dims, Mapping):
        chosen = dims_of_each(concepts, dims)
    elif (count := check_enough(_one_number(dims, "dimension"), concepts)) >= model.d_model:
        raise UserError(f"{count} dimensions", f"{model.name} has {model.d_model}", "give fewer")
    found = None
    if ramp == "norms" or chosen is None:
        found = measure_residuals(model, _sampled(model, texts, chat, max_tokens), sites)
    if chosen is None:
        assert found is not None
        lowest = lowest_variance(found, count)
        chosen = [tuple(lowest[i :: len(concepts)]) for i in range(len(concepts))]
    if ramp == "paper":
        targets = {str(site): 0.25 * (site.layer + 1) - 0.125 * (site.kind == "resid_mid") for site in sites}
    else:
        assert found is not None
        targets = {str(site): ramp_scale * float(size) for site, size in zip(sites, found.size, strict=True)}
    # Values that every precision holds exactly, so that a target is the same number everywhere.
    targets = {site: float(torch.tensor(target).bfloat16()) for site, target in targets.items()}
    return FlagSpec(concepts=tuple(concepts), dims=tuple(chosen), d_model=model.d_model, targets=targets)


def _sampled(
    model: LanguageModel, texts: Sequence[str] | Sequence[Example], chat: bool, max_tokens: int
) -> list[list[int]]:
    """Texts as tokens, as many as are looked at, in the order of hashes of the texts."""
    found: list[list[int]] = []
    n = 0
    for one in sorted(texts, key=lambda one: text_id(one.response if isinstance(one, Example) else str(one))):
        if n >= MEASURED_TOKENS:
            break
        if isinstance(one, Example):
            found.append(encode(model, [one], chat=chat, max_tokens=max_tokens)[0].ids)
        else:
            found.append(model.encode_text(one))
        n += len(found[-1]) - 1
    return found


def lowest_variance(residuals: Residuals, n: int) -> list[int]:
    """The n dimensions that vary least, the least first."""
    return residuals.relative_variance.argsort(stable=True)[:n].tolist()


@torch.no_grad()
def measure_residuals(model: LanguageModel, rows: Sequence[Sequence[int]], sites: Sequence[Site]) -> Residuals:
    """Variance of every dimension and size of the residual stream at sites.

    Args:
        model: the model.
        rows: token ids.
        sites: in the order of the forward pass.

    Raises:
        UserError: there are not two tokens behind rows' first ones.
    """
    rows = [list(row) for row in rows if len(row) > 1]
    sums = torch.zeros(2, len(sites), model.d_model, dtype=torch.float64)
    norms: list[list[Tensor]] = [[] for _ in sites]
    count = 0

    def read(index: int, real: Tensor, x: Tensor) -> None:
        kept = x[real].double().cpu()
        sums[0, index] += kept.sum(dim=0)
        sums[1, index] += kept.square().sum(dim=0)
        norms[index].append(kept.norm(dim=-1))

    with Meter("measuring the residual stream", sum(len(row) - 1 for row in rows)) as meter:
        for start in range(0, len(rows), BATCH):
            batch = TokenBatch.pad(rows[start : start + BATCH], model.pad_id, model.device)
            real = batch.real & (batch.position_ids > 0)
            with edited(model, {site: partial(read, i, real) for i, site in enumerate(sites)}):
                model.forward(batch, last=1)
            new = int(real.sum())
            count += new
            meter.advance(new)
    if count < 2:
        raise UserError("the texts that flags are placed by", "they have fewer than two tokens", "give more text")
    mean = sums[0] / count
    size = torch.stack([torch.cat(found).median() for found in norms]) / model.d_model**0.5
    return Residuals((sums[1] / count - mean.square()).clamp_min(0), size)


def dims_of_each(concepts: Sequence[str], dims: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
    """The dimensions of each concept. Raises a `UserError` for an unknown concept, one without, or one used twice."""
    for name in dims:
        if name not in concepts:
            hint = did_you_mean(name, concepts, "name one of them")
            raise UserError(f"dimensions of {name!r}", f"the concepts are {', '.join(concepts)}", hint)
    found = [tuple(whole_numbers(plain(dims.get(concept, [])), "dimension")) for concept in concepts]
    check_dims(concepts, found)
    return found


def check_enough(n: int, concepts: Sequence[str]) -> int:
    """A number of dimensions. Raises a `UserError` if concepts are more."""
    if n < len(concepts):
        raise UserError(f"{n} dimensions", f"there are {len(concepts)} concepts", "give at least one for each")
    return n


def _one_number(given: int, what: str) -> int:
    found = whole_numbers(given, what)
    if len(found) != 1:
        hint = 'give one number, or each concept\'s like {"sea": [3, 17]}' if what == "dimension" else "give one number"
        raise UserError(f"{what}s {found}", "one number is needed", hint)
    return found[0]

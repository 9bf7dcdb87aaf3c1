"""What the SAE architectures share: encoder, decoder, biases, and the names under which files keep them.

An SAE computes f = σ((x − b_dec) W_enc + b) and x̂ = f W_dec + b_dec; the architectures differ in σ. Each one's own file
holds its inference class; the constructor takes the weights by the names that SAELens's files use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.base import Dictionary, DictionaryInfo
from trimtab.dictionaries.config_fields import Fields
from trimtab.dictionaries.normalising import NORMALISATIONS, Normalisation, row_scale
from trimtab.dictionaries.sparse import SparseCodes, decode_pairs
from trimtab.errors import UserError
from trimtab.runs import whole_numbers

ARCHITECTURES: dict[str, type[SAE]] = {}
"""Every architecture that can be loaded, by the name that SAELens's files use."""


class SAE(Dictionary):
    """An SAE for inference: linear decoder, one of several encoders. A subclass that names its `architecture` can be
    saved and loaded.

    Args:
        by_place, by_name: the weights, in the order or under the names of `shapes`.
        apply_b_dec_to_input: whether the encoder sees x − b_dec (True) or x.
        normalize_activations: whether each activation is first scaled by its own norm (`dictionaries.normalising`);
            codes are then in units that differ from one activation to the next (`code_unit`).
        info: where the dictionary comes from.

    Raises:
        UserError: a weight's shape does not fit the others; the message names it.
    """

    shapes: ClassVar[Mapping[str, str]]
    """Every weight of the architecture and its dimensions, `d` (input) and `n` (features), as in "d n"."""
    in_code_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    """Weights in the unit of the codes: they grow with the decoder's norms and with the input."""
    folds_norms: ClassVar[bool] = True
    """Whether decoder norms may move into the codes: not where other features would then fire."""
    codes_alone: ClassVar[bool] = True
    """Whether the code of a feature can be computed without those of the others."""
    W_enc: nn.Parameter
    b_dec: nn.Parameter

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "architecture" in vars(cls):
            ARCHITECTURES[cls.architecture] = cls

    def __init__(
        self,
        *by_place: Tensor,
        apply_b_dec_to_input: bool = True,
        normalize_activations: Normalisation = "none",
        info: DictionaryInfo | None = None,
        **by_name: Tensor,
    ) -> None:
        super().__init__(info or DictionaryInfo(architecture=self.architecture))
        weights = {**dict(zip(self.shapes, by_place, strict=False)), **by_name}
        if weights.keys() != self.shapes.keys() or len(weights) != len(by_place) + len(by_name):
            raise TypeError(f"the weights of {type(self).__name__} are {', '.join(self.shapes)}, each once")
        check_shapes(self.shapes, weights, n=weights["W_dec"].shape[0], d=weights["W_dec"].shape[-1])
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.normalize_activations: Normalisation = normalize_activations
        for name in self.shapes:
            self.register_parameter(name, nn.Parameter(weights[name].detach(), requires_grad=False))

    @classmethod
    def read_settings(cls, field: Fields, n: int) -> dict[str, Any]:
        """The settings of an SAE of n features in a `cfg.json`, whose fields are checked as they are read."""
        settings: dict[str, Any] = {"apply_b_dec_to_input": field.boolean("apply_b_dec_to_input", default=True)}
        kind = field.cfg.get("normalize_activations")
        return settings | ({"normalize_activations": kind} if kind in NORMALISATIONS and kind != "none" else {})

    def codes(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"] | None) -> Float[Tensor, "... m"]:
        """Codes of the features `ids`, or of all."""
        raise NotImplementedError

    def part(self, features: Sequence[int]) -> Self:
        """An SAE of some of the features, in the order given, whose codes are the same.

        Raises:
            UserError: a feature does not exist, or its code depends on all others.
        """
        self.check_features(list(features))
        if not self.codes_alone:
            why = f"in an SAE of the architecture {self.architecture} a feature's code depends on all others"
            raise UserError(f"features {', '.join(map(str, features))} alone", why, "use operation add or overwrite")
        ids = torch.tensor(list(features), device=self.W_dec.device)
        dims = {name: shape.split() for name, shape in self.shapes.items()}
        weights = {
            name: weight.index_select(dims[name].index("n"), ids) if "n" in dims[name] else weight
            for name, weight in ((name, getattr(self, name).detach()) for name in self.shapes)
        }
        return type(self)(**weights, **self.settings, info=replace(self.info, metadata={}))

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        return self.codes(x, None)

    def encode_features(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"]) -> Float[Tensor, "... m"]:
        if not isinstance(ids, Tensor):
            self.check_features(ids)
            ids = torch.tensor(whole_numbers(ids, "feature"))
        return self.codes(x, ids)

    @property
    def settings(self) -> dict[str, Any]:
        own = {"apply_b_dec_to_input": self.apply_b_dec_to_input, **super().settings}
        if self.normalize_activations != "none":
            own["normalize_activations"] = self.normalize_activations
        return own

    @property
    def has_fixed_units(self) -> bool:
        return self.normalize_activations == "none"

    def encoder_input(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """`x` in the weights' precision, scaled by its own norm and minus b_dec where the encoder expects it so."""
        _check_last(x, self.d_in, "encode")
        x = x.to(self.W_enc.dtype)
        if self.normalize_activations != "none":
            x = row_scale(self.normalize_activations, x).z
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def decode(self, f: Float[Tensor, "... n"]) -> Float[Tensor, "... d"]:
        self._check_fixed_units()
        return self.decoded(f)

    def decode_sparse(self, codes: SparseCodes | Float[Tensor, "B n"]) -> Float[Tensor, "B d"]:
        self._check_fixed_units()
        return self.decoded_sparse(codes)

    def rebuild(self, codes: SparseCodes | Float[Tensor, "... n"], x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        found = self.decoded(codes) if isinstance(codes, Tensor) else self.decoded_sparse(codes)
        if self.info.is_centred:
            return found + x.to(found.dtype).mean(dim=-1, keepdim=True)
        if self.normalize_activations == "none":
            return found
        scale = row_scale(self.normalize_activations, x.to(found.dtype))
        return found * scale.unit + scale.shift

    def code_unit(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"] | float:
        kind = self.normalize_activations
        return 1.0 if kind == "none" else row_scale(kind, x.to(self.W_dec.dtype)).unit

    def decoded(self, f: Float[Tensor, "... n"]) -> Float[Tensor, "... d"]:
        """f W_dec + b_dec, in the units of what the encoder sees."""
        _check_last(f, self.n_features, "decode")
        return f @ self.W_dec + self.b_dec

    def decoded_sparse(self, codes: SparseCodes | Float[Tensor, "B n"]) -> Float[Tensor, "B d"]:
        """The same of what `encode_sparse` gives."""
        if isinstance(codes, Tensor):
            return self.decoded(codes)
        return decode_pairs(codes.pairs(), self.W_dec) + self.b_dec

    def _check_fixed_units(self) -> None:
        if not self.has_fixed_units:
            why = f"the SAE scales each activation by its own norm ({self.normalize_activations})"
            hint = "give the activations, too: sae.rebuild(codes, x), or sae(x)"
            raise UserError("decoding codes alone", why, hint)


def _check_last(given: object, width: int, what: str) -> None:
    """Raise a `UserError` unless something is a tensor whose last dimension has a width."""
    if not isinstance(given, Tensor) or given.shape[-1:] != (width,):
        shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else ""
        what = f"the {type(given).__name__}{shape} to {what}"
        raise UserError(what, f"a tensor [..., {width}] is needed", "give one")


def check_shapes(shapes: Mapping[str, str], weights: Mapping[str, Tensor], *, n: int, d: int, source: str = "") -> None:
    """Raise a `UserError` that names the first weight whose shape is not the one in `shapes`, and the file it is in."""
    sizes = {"n": n, "d": d}
    for name, dimensions in shapes.items():
        expected = [sizes[dimension] for dimension in dimensions.split()]
        if list(weights[name].shape) != expected:
            raise UserError(
                f"tensor {name} of shape {list(weights[name].shape)}" + (f" in {source}" if source else ""),
                f"a dictionary of {n} features of width {d} needs {expected}",
                "use weights and config of one and the same SAE",
            )


def columns(weight: Float[Tensor, "... n"], ids: Int[Tensor, " m"] | None) -> Float[Tensor, "... m"]:
    """The columns `ids` of an encoder weight or bias; all of them, without a copy, if `ids` is None."""
    return weight if ids is None else torch.index_select(weight, -1, ids.to(weight.device))

"""What every dictionary is: rows of unit direction that a residual can be read into and rebuilt from.

An SAE, a supervised dictionary and a set of flags are all dictionaries; steering, ranking and
evaluation see nothing but this interface.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.dictionaries.feature_examples import FeatureExamples
from trimtab.dictionaries.feature_stats import FeatureStats
from trimtab.dictionaries.sparse import ActivePairs, SparseCodes, list_codes, pairs_of
from trimtab.errors import UserError, did_you_mean
from trimtab.lm.sites import RESIDUAL_KINDS, Site
from trimtab.runs import whole_numbers

Codes = TypeVar("Codes", bound=Tensor | SparseCodes | ActivePairs)
"""Codes of activations in any form."""

FEATURE_NAMES = "feature_names"
"""Where a dictionary's metadata say what its features mean."""

LOADED_WITH = "model_from_pretrained_kwargs"
"""Where the metadata of SAELens's files say how the model was loaded."""
OTHER_WEIGHTS = ("checkpoint_index", "checkpoint_value", "revision")
"""Arguments there that name other weights under the same model's name."""


@dataclass(frozen=True, kw_only=True)
class DictionaryInfo:
    """Where a dictionary comes from."""

    architecture: str
    """The inference architecture: standard, gated, topk, jumprelu as SAELens names them, or supervised."""
    model: str = ""
    """Name of the model it was trained on; empty if the file does not say."""
    site: str = ""
    """Site it reads, in trimtab's notation (`resid_post.15`); empty if the file does not say."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever else the file says (training recipe, text, versions; `feature_names`, what each feature means)."""

    @property
    def is_centred(self) -> bool:
        """Whether it was trained on a residual stream without its mean; its encoder then does not see the mean."""
        loaded = self.metadata.get(LOADED_WITH)
        asked = isinstance(loaded, Mapping) and loaded.get("center_writing_weights") is True
        return asked and bool(self.site) and Site.parse(self.site).kind in RESIDUAL_KINDS


class Dictionary(nn.Module):
    """A dictionary of `n_features` directions in a `d_in`-dimensional activation space.

    Subclasses hold `W_dec [n, d]` and implement `encode`, `decode` and, where it pays, `encode_features`.
    Codes are in model units: `decode(encode(x))` approximates `x` without any scaling by the caller.

    Attributes:
        info: where it comes from.
        name: what it was loaded by, for results; empty for one that was built, until the user sets it.
        feature_stats: maxima and firing rates on some text, if there are any.
        examples_file: where `feature_examples` are read from when they are asked for, if there are any.
    """

    architecture: ClassVar[str]
    W_dec: nn.Parameter

    def __init__(self, info: DictionaryInfo) -> None:
        super().__init__()
        self.info = info
        self.name = ""
        self.feature_stats: FeatureStats | None = None
        self.examples_file: Path | None = None

    def __repr__(self) -> str:
        place = " of ".join(part for part in (self.info.site, self.info.model) if part)
        return f"<{type(self).__name__}: {self.n_features:,} features of width {self.d_in}{place and f', {place}'}>"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, beside the weights, what `encode` computes: constructor arguments, and fields of the config."""
        return {}

    @property
    def feature_names(self) -> tuple[str, ...]:
        """`[n]` what each feature means (`IO=Mary`), an empty text where that is unknown; none if nothing is known."""
        return tuple(self.info.metadata.get(FEATURE_NAMES, ()))

    def label(self, feature: int) -> str:
        """A feature's number, with what it means where that is known: `12 (IO=Mary)`."""
        names = self.feature_names
        return f"{feature} ({names[feature]})" if names and names[feature] else str(feature)

    def features_named(self, names: Sequence[str]) -> list[int]:
        """Ids of features by what they mean. Raises a `UserError` unless each name is that of one feature."""
        known, names = self.feature_names, [names] if isinstance(names, str) else names
        for name in names:
            if not known:
                raise UserError(
                    f"feature {name!r}", "the dictionary does not say what its features mean", "give its number"
                )
            times = known.count(name) if name else 0
            if times > 1:
                raise UserError(f"feature {name!r}", f"{times} features mean that", "give its number")
            if not times:
                fix = did_you_mean(name, known, "trimtab sae info --json says what they mean")
                raise UserError(f"feature {name!r}", "no feature means that", fix)
        return [known.index(name) for name in names]

    @cached_property
    def feature_examples(self) -> FeatureExamples | None:
        """Windows of text in which features fire, if there are any. Raises a `UserError` if they are another
        dictionary's."""
        if self.examples_file is None:
            return None
        found = FeatureExamples.read(self.examples_file, n_features=self.n_features)
        if found.dictionary not in ("", self.fingerprint) and self.W_dec.dtype == torch.float32:
            hint = "make examples of this SAE (trimtab examples), or remove the file"
            raise UserError(str(self.examples_file), "it holds examples of another SAE", hint)
        return found

    @property
    def n_features(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    def encode(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Codes of activations `x`, in model units (non-negative for every SAE here)."""
        raise NotImplementedError

    def decode(self, f: Float[Tensor, "... n"]) -> Float[Tensor, "... d"]:
        """The reconstruction of codes `f`."""
        raise NotImplementedError

    def encode_features(self, x: Float[Tensor, "... d"], ids: Int[Tensor, " m"]) -> Float[Tensor, "... m"]:
        """Codes of the features `ids` only. Where selection among features is joint (TopK), all are computed."""
        return self.encode(x)[..., ids]

    def encode_sparse(self, x: Float[Tensor, "B d"]) -> SparseCodes | Float[Tensor, "B n"]:
        """Codes of rows: a list of the active ones where few features fire, all of them otherwise."""
        return list_codes(self.encode(x))

    def encode_pairs(self, x: Float[Tensor, "B d"]) -> ActivePairs:
        """Codes of rows as a list of the positive ones, row after row."""
        return pairs_of(self.encode_sparse(x))

    def decode_sparse(self, codes: SparseCodes | Float[Tensor, "B n"]) -> Float[Tensor, "B d"]:
        """The reconstruction of what `encode_sparse` gives."""
        return self.decode(codes if isinstance(codes, Tensor) else codes.dense(self.n_features))

    def rebuild(self, codes: SparseCodes | Float[Tensor, "... n"], x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """What codes of activations `x`, changed or not, decode to in the place of `x`."""
        return self.decode(codes) if isinstance(codes, Tensor) else self.decode_sparse(codes)

    @property
    def has_fixed_units(self) -> bool:
        """Whether a code of 1 is as long at every activation. `rebuild` works either way, `decode` only if so."""
        return True

    def code_unit(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"] | float:
        """What a code of 1 at each of activations `x` comes to in model units, times the feature's decoder row."""
        return 1.0

    def in_model_units(self, codes: Codes, x: Float[Tensor, "... d"]) -> Codes:
        """Codes of activations `x` as whatever compares or adds up codes of several activations needs them: what they
        come to in model units, times the features' decoder rows."""
        unit = self.code_unit(x)
        if not isinstance(unit, Tensor):
            return codes
        return cast("Codes", codes * unit if isinstance(codes, Tensor) else codes.scaled(unit))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.rebuild(self.encode(x), x)

    @cached_property
    def decoder_norms(self) -> Float[Tensor, " n"]:
        """‖W_dec[i]‖ for every feature."""
        return self.W_dec.detach().norm(dim=-1)

    @cached_property
    def directions(self) -> Float[Tensor, "n d"]:
        """Unit decoder rows; a zero row stays zero."""
        return self.W_dec.detach() / self.decoder_norms.clamp_min(torch.finfo(self.W_dec.dtype).tiny)[:, None]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over architecture, settings and the names, shapes and values of all weights (16 hex characters)."""
        digest = hashlib.sha256(f"{self.architecture}{sorted(self.settings.items())}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the weights, and forget what was computed from them where they were before."""
        for name in ("decoder_norms", "directions", "fingerprint"):
            self.__dict__.pop(name, None)
        return super()._apply(fn, recurse)

    def check_features(self, ids: list[int]) -> None:
        """Raise a `UserError` if an id is not a feature of this dictionary."""
        for i in whole_numbers(ids, "feature"):
            if not 0 <= i < self.n_features:
                raise UserError(
                    f"feature {i}", f"the dictionary has features 0 to {self.n_features - 1}", "choose one of them"
                )

    def check_model(self, d_model: int, model_name: str, site: str | None = None) -> None:
        """Raise a `UserError` if the dictionary does not fit the width of a site or, where both are known, the site's
        name."""
        if self.d_in != d_model:
            raise UserError(
                f"dictionary of width {self.d_in}",
                f"{model_name} has width {d_model}"
                + (f" (it was trained on {self.info.model})" * bool(self.info.model)),
                "choose a dictionary trained on this model" + f", or model {self.info.model}" * bool(self.info.model),
            )
        if site and self.info.site and site != self.info.site:
            raise UserError(f"site {site}", f"the dictionary reads {self.info.site}", f"use --site {self.info.site}")

    def check_same_model(self, model_name: str, fingerprint: str = "") -> None:
        """Raise a `UserError` if the dictionary was trained on another model, as far as it says what it was trained on.

        Models are the same if their fingerprints agree or if their names do, owner, directory and case aside.
        """
        trained_on = self.info.model
        if fingerprint and fingerprint == self.info.metadata.get("model_fingerprint"):
            return
        if not trained_on or _bare(trained_on) == _bare(model_name):
            loaded = self.info.metadata.get(LOADED_WITH)
            named = {name: loaded.get(name) for name in OTHER_WEIGHTS} if isinstance(loaded, Mapping) else {}
            if other := ", ".join(f"{name} {value}" for name, value in named.items() if value not in (None, "main")):
                why = f"{model_name} has that name, but may be another one"
                hint = "allow any model (--any-model) if it is that one"
                raise UserError(f"dictionary trained on {trained_on or 'a model'} of {other}", why, hint)
            return
        raise UserError(
            f"dictionary trained on {trained_on}",
            f"the model is {model_name}",
            f"choose a dictionary trained on this model, or model {trained_on}, or allow any model (--any-model) if "
            "activations agree",
        )


def _bare(model_name: str) -> str:
    """A model's name without owner or directory; TransformerLens calls gpt2 gpt2-small."""
    bare = model_name.rstrip("/").split("/")[-1].lower()
    return "gpt2" if bare == "gpt2-small" else bare


def check_feature_names(metadata: Mapping[str, Any], n: int, source: str) -> None:
    """Raise a `UserError` if the metadata of n features say what features mean, but not what each of them does."""
    names = metadata.get(FEATURE_NAMES)
    if names is None and FEATURE_NAMES not in metadata:
        return
    if not isinstance(names, list | tuple) or len(names) != n or not all(isinstance(name, str) for name in names):
        what = f"field metadata.{FEATURE_NAMES} in {source}"
        raise UserError(what, f"it must be a list of {n} texts, one for each feature", "correct it, or leave it out")


def check_is_dictionary(given: object) -> None:
    """Raise a `UserError` unless what is given as a dictionary is one."""
    if isinstance(given, Dictionary):
        return
    if isinstance(given, str | os.PathLike):
        name = os.fspath(given)
        raise UserError(f"dictionary {name!r}", "it is a name, not a loaded one", f"give trimtab.load_sae({name!r})")
    what = f"the {type(given).__name__} that is given as the dictionary"
    hint = "give what trimtab.load_sae returns, which takes objects of SAELens and dictionary_learning, too"
    raise UserError(what, "it is no Dictionary of trimtab's", hint)

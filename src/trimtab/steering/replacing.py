"""Sources that put other activations in the place of the model's: another run's, a mean, a dictionary's reconstruction.

What they put there is there bit for bit. The log holds its norm and hash; with `keep_replacements` it holds the
activations too, and can be replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.dictionaries.base import Dictionary, check_is_dictionary
from trimtab.errors import UserError
from trimtab.lm import DecodeStart, Edit, EditRequest, PositionRule, Site
from trimtab.lm.sites import HEAD_KINDS
from trimtab.runs import known_arguments
from trimtab.steering.direction_table import as_vector
from trimtab.steering.sources import DirectionBlock, PerSite, by_site, check_heads, head_shapes


class ReplacingSource:
    """What sources that replace activations share. Subclasses implement `replacement`.

    Args:
        widths: of each site.
        positions: `generated`, `prompt`, `all`, `START:STOP`, positions such as `[3, 7]`, or a rule.
        keep_replacements: keep what takes activations' places in the log.
    """

    unit, operation = "activation", "replace"

    def __init__(
        self, widths: Mapping[Site, int], positions: PositionRule | str | Sequence[int], keep_replacements: bool
    ) -> None:
        self.sites, self.positions = tuple(widths), PositionRule.parse(positions)
        self.keep_replacements = keep_replacements
        self.hashes = dict.fromkeys(self.sites, "")
        # One direction that adds nothing, and moves no bit (−0 is what may be added to 0 and to −0): it names the edit.
        self._nothing = {site: torch.full((1, width), -0.0) for site, width in widths.items()}

    def __repr__(self) -> str:
        where = ", ".join(map(str, self.sites))
        return f"<{type(self).__name__}: {self.operation} at {where}, positions {self.positions}>"

    @property
    def dictionary_hash(self) -> str:
        return "+".join(dict.fromkeys(self.hashes.values()))

    def directions(self, site: Site) -> Float[Tensor, "1 d"]:
        return self._nothing[site]

    def blocks(self, site: Site) -> tuple[DirectionBlock, ...]:
        return (DirectionBlock(0, 1, self.unit, self.operation, self.hashes[site], replaces=True),)

    places: Int[Tensor, "N P"] | None = None
    """Each row's own positions, where they have them."""

    def start(self, start: DecodeStart) -> None:
        each = None if self.places is None else [[p for p in row if p != _NOWHERE] for row in self.places.tolist()]
        self.positions.check(start.prompts, start.n_inputs, each)
        self._nothing = {site: row.to(start.device) for site, row in self._nothing.items()}

    def choose(self, request: EditRequest) -> Edit | None:
        width = self.directions(request.site).shape[1]
        if request.x.shape[-1] != width:
            raise UserError(
                f"activations of width {width}",
                f"site {request.site} has width {request.x.shape[-1]}",
                "give those of this site",
            )
        replacement = self.replacement(request).to(request.x.dtype)
        kept = replacement.isnan().any(dim=1, keepdim=True)
        length = (replacement.float() - request.x.float()).norm(dim=-1, keepdim=True)
        return Edit(torch.where(kept, -1, 0), torch.where(kept, 0, length), replacement=replacement)

    def replacement(self, request: EditRequest) -> Float[Tensor, "R d"]:
        """What takes the place of each row's activation; NaN for what is to stay."""
        raise NotImplementedError


@known_arguments
class PatchSource(ReplacingSource):
    """Puts given activations in the place of the model's: another run's (patching), or one everywhere (mean ablation).

    Args:
        values: for each site what `capture` gives there, `[N, T, d]`, or `[N, T, heads, head_dim]` at attention sites
            without a head, for N decoded rows (copies of a prompt included) or 1 for all; or one activation for all
            places, `[d]` or `[heads, head_dim]`.
        positions: which are replaced, by what was captured at the same position: a rule, positions such as `[3, -1]`
            for all rows, or such a list for each row. `all` has generated tokens, too; `prompt` has not.
        lengths: `[N]` tokens of each row that was captured, padding on the left excluded; T by default. They must be
            given for several rows if the prompts that are decoded differ in length.
        keep_replacements: keep what was put into place in the log, so that it can be replayed.

    Raises:
        UserError: values are malformed or not finite; while decoding, if they do not fit the site or the rows, or end
            before a position that is to be replaced.
    """

    operation = "patch"

    def __init__(
        self,
        values: Mapping[Site | str, Tensor] | Mapping[Site, Tensor] | Mapping[str, Tensor],
        *,
        positions: PositionRule | str | Sequence[int] | Sequence[Sequence[int]] = "all",
        lengths: Sequence[int] | Int[Tensor, " N"] | None = None,
        keep_replacements: bool = False,
    ) -> None:
        given = by_site(values, None)
        self.values = {site: _captured(site, value, lengths) for site, value in given.items()}
        self.lengths_known, self.heads = lengths is not None, head_shapes(given)
        if not isinstance(positions, PositionRule | str):
            each = [list(place) if isinstance(place, Sequence) else [place] for place in positions]
            if any(isinstance(place, Sequence) for place in positions):
                self.places = pad_sequence(list(map(torch.tensor, each)), batch_first=True, padding_value=_NOWHERE)
            positions = [place for row in each for place in row]
        super().__init__(
            {site: value.shape[-1] for site, (value, _) in self.values.items()}, positions, keep_replacements
        )

    def start(self, start: DecodeStart) -> None:
        rows, device = len(start.prompts), start.device
        self.values = {site: _Values(*(column.to(device) for column in found)) for site, found in self.values.items()}
        given = [("values", len(value)) for value, _ in self.values.values() if len(value) > 1]
        given += [] if self.places is None else [("positions", len(self.places))]
        for name, n in given:
            if n != rows:
                raise UserError(f"{name} for {n} rows", f"{rows} rows are decoded", "give one each")
            if name == "values" and not self.lengths_known and len(set(map(len, start.prompts))) > 1:
                raise UserError(
                    f"values for {n} rows", "their prompts differ in length, so some may be padded", "give lengths"
                )
        check_heads(start.model, self.heads)
        super().start(start)
        length = torch.tensor([[len(prompt)] for prompt in start.prompts])
        if min(self.positions.places, default=0) < 0:
            self._check_ends(length[:, 0])
        self._at = None if self.places is None else (self.places + (self.places < 0) * length).to(device)

    def _check_ends(self, prompts: Int[Tensor, " N"]) -> None:
        """Positions from a prompt's end are where they are in what was captured only if both are equally long."""
        for site, (value, skip) in self.values.items():
            padding = skip.cpu().expand(len(prompts))
            length = value.shape[1] - padding
            wrong = ((padding >= 0) & (length != prompts)).nonzero()[:, 0]
            if len(wrong):
                row = int(wrong[0])
                raise UserError(
                    f"positions counted from the end of row {row}",
                    f"its prompt has {int(prompts[row])} tokens, the values of {site} are of {int(length[row])}",
                    "patch prompts of equal length, count from the start, or give the one activation to put there",
                )

    def replacement(self, request: EditRequest) -> Float[Tensor, "R d"]:
        value, skip = self.values[request.site]
        asked = torch.ones_like(request.row, dtype=torch.bool)
        if self._at is not None:
            asked = (self._at[request.row] == request.position[:, None]).any(dim=1)
        row, longest = request.row.clamp_max(len(value) - 1), value.shape[1]
        place = request.position + skip[row]
        late = (asked & (place >= longest)).nonzero()[:, 0]
        if len(late):
            row, at, skipped = (int(column[late[0]]) for column in (request.row, request.position, skip[row]))
            raise UserError(
                f"position {at} of row {row}",
                f"the values of {request.site} end at {longest - 1 - skipped}",
                "choose positions that they hold",
            )
        return torch.where(asked[:, None], value[row, place.clamp(0, longest - 1)], torch.nan)


_NOWHERE = 1 << 40
"""A position that no row has."""


class _Values(NamedTuple):
    """Activations of one site, and how much padding stands before each row's own."""

    value: Float[Tensor, "N T d"]
    skip: Int[Tensor, " N"]


def _captured(site: Site, value: Tensor, lengths: Sequence[int] | Tensor | None) -> _Values:
    own, value = 2 if site.kind in HEAD_KINDS and site.head is None else 1, as_vector(value)
    if value.ndim not in (own, own + 2):
        raise UserError(
            f"values of {site} of shape {tuple(value.shape)}",
            f"what is captured there has {own + 2} dimensions, and one activation {own}",
            "give what `capture` gives",
        )
    value = value.detach().flatten(-own)
    if value.ndim == 1:  # at every position the first place
        value, skip = value[None, None], torch.tensor([-_NOWHERE])
    else:
        longest = value.shape[1]
        skip = torch.zeros(len(value)).long() if lengths is None else longest - torch.as_tensor(lengths).cpu()
        if len(skip) != len(value) or int(skip.min()) < 0:
            given = f"values of {site} are {len(value)} rows of {longest} tokens"
            raise UserError(f"{len(skip)} lengths", given, "give the length of each row")
    real = torch.arange(value.shape[1]) >= skip[:, None]
    if not bool(torch.isfinite(value[real.to(value.device)]).all()):
        raise UserError(f"values of {site}", "some are not finite", "give finite numbers")
    return _Values(value, skip)


@known_arguments
class ReconstructionSource(ReplacingSource):
    """Puts a dictionary's reconstruction in the place of activations: all of it, or what some features contribute.

    Args:
        dictionary: encodes and decodes; or one for each of several sites.
        site: where; the site that the dictionary names by default.
        features: codes to keep; the others are 0. All by default.
        with_error: add what the dictionary does not reconstruct, x − decode(encode(x)).
        positions: `all` by default, otherwise as for every source.
        keep_replacements: keep the reconstructions in the log, so that it can be replayed.

    Raises:
        UserError: a feature does not exist, the site is unknown, or everything is kept, the error included.
    """

    operation = "reconstruct"

    def __init__(
        self,
        dictionary: PerSite[Dictionary],
        site: Site | str | None = None,
        *,
        features: Sequence[int] | None = None,
        with_error: bool = False,
        positions: PositionRule | str | Sequence[int] = "all",
        keep_replacements: bool = False,
    ) -> None:
        if with_error and features is None:
            raise UserError("with_error", "all features and the error are the activation itself", "name some features")
        self.dictionaries = by_site(dictionary, site)
        for found in self.dictionaries.values():
            check_is_dictionary(found)
        super().__init__({at: found.d_in for at, found in self.dictionaries.items()}, positions, keep_replacements)
        self.features, self.with_error = features, with_error
        for at, found in self.dictionaries.items():
            found.check_features(list(features or ()))
            self.hashes[at] = found.fingerprint

    def start(self, start: DecodeStart) -> None:
        super().start(start)
        for dictionary in self.dictionaries.values():
            dictionary.to(start.device)

    def join(self, start: DecodeStart) -> None:
        """What takes an activation's place depends on it alone."""
        self.positions.check(start.prompts, start.n_inputs)

    def replacement(self, request: EditRequest) -> Float[Tensor, "R d"]:
        dictionary = self.dictionaries[request.site]
        x = request.x.to(dictionary.W_dec.dtype)
        codes = dictionary.encode(x)
        kept = codes
        if self.features is not None:
            kept = torch.zeros_like(codes)
            kept[:, list(self.features)] = codes[:, list(self.features)]
        return dictionary.rebuild(kept, x) + (x - dictionary.rebuild(codes, x) if self.with_error else 0)

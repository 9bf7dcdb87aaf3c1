"""A steering to take away: directions, doses and positions in one small directory, with whose they are and the proof.

`steering.json` says everything but the directions, which are in `directions.safetensors`, a tensor `[n, d]` per site.
Operations that read a feature's code (`clamp`, `ablate`, `scale`) need its encoder: the SAE of those features alone
lies beside, in a directory named after the site.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from trimtab.dictionaries import SAE, load_dictionary, save_dictionary
from trimtab.dictionaries.checked_weights import read_safetensors
from trimtab.dictionaries.meanings import describe_features
from trimtab.errors import UserError, did_you_mean
from trimtab.lm import AppliedEdits, LanguageModel, PositionRule, Site, applied, site_width
from trimtab.lm.model import check_is_model
from trimtab.lm.weight_hashes import precision_name, weight_hash
from trimtab.runs import as_path, atomic_directory, atomic_path, json_safe, part_of, read_json, read_typed, write_json
from trimtab.runs.results import Result
from trimtab.runs.tables import INTERVAL, NUMBER, Column, Table, in_short
from trimtab.steering.direction_table import DirectionTable
from trimtab.steering.operations import operation_named
from trimtab.steering.sources import StaticSource
from trimtab.steering.steering_facts import Evidence, SteeredModel, SteeringFacts, SteeringPart
from trimtab.version import __version__

FORMAT = 1
FILE, DIRECTIONS = "steering.json", "directions.safetensors"
WITHIN = "steering"
"""What a run calls the directory of its steering."""
OF_DIRECTIONS = ("add", "overwrite")
"""Operations that need nothing of a feature but its direction."""
MOST = ".max_activation"
"""What a site's largest activations are called in the file, behind the site."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Steering(SteeringFacts, Result):
    """Directions with their doses, as data; `source` is what steers.

    Raises:
        UserError: there is no site or one is named twice, a dose or a direction is not finite, a direction is zero, or
            doses and directions are not equally many.
    """

    directions: Mapping[str, Float[Tensor, "n d"]]
    """Of each site, of any length: only where they point counts."""
    max_activation: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)
    """How far each ever moved an activation, in model units, where doses are multiples of it."""
    codes: Mapping[str, SAE] = field(default_factory=dict)
    """The SAE of these directions alone, where the operation reads their codes."""
    path: str = ""
    """Where it was loaded from."""

    def __post_init__(self) -> None:
        sites = [part.site for part in self.parts]
        if not sites or len(set(map(Site.parse, sites))) < len(sites):
            raise UserError("a steering", "it names no site, or one twice", "give one part for each site")
        for part in self.parts:
            rows = self.directions[part.site]
            what = f"directions at {part.site}" + f" of {self.path}" * bool(self.path)
            if rows.ndim != 2 or len(rows) != len(part.dose) or len(part.feature) not in (0, len(rows)):
                n = f"{len(part.dose)} doses" + f" and {len(part.feature)} features" * bool(part.feature)
                raise UserError(f"{what} of shape {tuple(rows.shape)}", f"there are {n}", "give [n, d], one dose each")
            if not bool(torch.isfinite(rows).all()):
                raise UserError(what, "some values are not finite", "make the steering again")
            if bool((rows == 0).all(dim=-1).any()):
                raise UserError(what, "one is zero, so it points nowhere", "make the steering again")
        self.source()  # the rest is checked by what steers

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        source: StaticSource,
        *,
        about: str = "",
        made_by: str = "",
        evidence: Sequence[Evidence] = (),
        norms: Mapping[str, float] | None = None,
        row: int = 0,
    ) -> Steering:
        """What a source of constant doses does, in a form that can be saved.

        Args:
            model: the model that it is for.
            source: features or vectors at constant doses: a `StaticSource`, such as `VectorSource` or `FlagSource`.
            about: what it is for, in words.
            made_by: the command or function that made it, behind trimtab's version.
            evidence: what speaks for it.
            norms: typical ‖x‖ by site, if known.
            row: whose features and doses, where the source has others for each row.

        Raises:
            UserError: the source decides anew at each token, or its operation reads codes that depend on all features
                of the SAE.
        """
        check_is_model(model)
        if wrong := [one for one in evidence if not isinstance(one, Evidence)]:
            hint = "give trimtab.steering.Evidence(name=…, value=…)"
            raise UserError(f"the {type(wrong[0]).__name__} among the evidence", "it is no Evidence", hint)
        if not isinstance(source, StaticSource):
            why = "it decides anew at each token, and only what is constant can be saved"
            raise UserError(f"the {type(source).__name__} that is to be saved", why, "give a StaticSource")
        parts: list[SteeringPart] = []
        directions, most, codes = dict[str, Tensor](), dict[str, Tensor](), dict[str, SAE]()
        for site, table in source.tables.items():
            feature, dose = (each[min(row, len(each) - 1)].cpu() for each in source.choices[site])
            dose, ids = dose[feature >= 0].double(), feature[feature >= 0].to(table.rows.device)
            if table.length is not None:
                dose = dose * table.length[ids].double().cpu()
            name, sae = str(site), table.dictionary
            directions[name] = table.rows[ids].detach().float().cpu().contiguous()
            if source.unit == "max_activation" and table.max_activation is not None:
                most[name] = table.max_activation[ids].float().cpu().contiguous()
            if isinstance(sae, SAE) and source.operation not in OF_DIRECTIONS:
                codes[name] = sae.part(ids.tolist()).cpu()
            about_sae = {} if sae is None else {
                "feature": tuple(ids.tolist()), "sae": sae.name, "sae_hash": sae.fingerprint,
                "words": tuple(map(str, describe_features(model, sae, ids.tolist()))),
            }  # fmt: skip
            parts.append(SteeringPart(site=name, dose=tuple(dose.tolist()), norm=(norms or {}).get(name), **about_sae))
        return cls(
            model=SteeredModel.of(model),
            parts=tuple(parts),
            operation=source.operation,
            unit=source.unit,
            combine=source.combine,
            positions=str(source.where),
            about=about,
            made_by=f"trimtab {__version__}" + f", {made_by}" * bool(made_by),
            evidence=tuple(evidence),
            directions=directions,
            max_activation=most,
            codes=codes,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What `steering.json` holds, as plain values."""
        return {"format": FORMAT, **json_safe(part_of(self, SteeringFacts))}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what it does, directions and doses (16 hex characters); not over where it comes from."""
        said = [self.operation, self.unit, self.combine, self.positions, [(p.site, p.dose) for p in self.parts]]
        hashes = {name: table.hash for name, table in self.direction_tables().items()}
        return hashlib.sha256(json.dumps([said, hashes], sort_keys=True).encode()).hexdigest()[:16]

    def direction_tables(self) -> dict[str, DirectionTable]:
        """The directions of each site as sources, traces and replays take them."""
        found: dict[str, DirectionTable] = {}
        for name, rows in self.directions.items():
            table = DirectionTable.of(self.codes[name]) if name in self.codes else DirectionTable(rows)
            table.max_activation = self.max_activation.get(name)
            found[name] = table
        return found

    def source(
        self,
        model: LanguageModel | None = None,
        *,
        any_model: bool = False,
        times: Sequence[float | None] = (1.0,),
    ) -> StaticSource:
        """What steers, for `decode`, `applied`, streams and whatever else takes a source.

        Args:
            model: the model that is to be steered, if it is to be checked that it is the steering's own.
            any_model: see `check_model`.
            times: multiplies all doses: one number, or for each row that is decoded its own, None for one that is left
                alone.

        Raises:
            UserError: as `check_model`; or operation, unit, dose or positions are not allowed.
        """
        if model is not None:
            self.check_model(model, any_model=any_model)
        steered = torch.tensor([one is not None for one in times])[:, None]
        factor = torch.tensor([[one or 0.0] for one in times])
        doses = {part.site: factor * torch.tensor(part.dose) for part in self.parts}
        features = {
            part.site: torch.where(steered, torch.arange(len(part.dose)), -1).expand_as(doses[part.site])
            for part in self.parts
        }
        return StaticSource(
            self.direction_tables(), features, doses, unit=self.unit, operation=self.operation,
            positions=PositionRule.parse(self.positions), combine=self.combine,
        )  # fmt: skip

    def check_model(self, model: LanguageModel, *, any_model: bool = False) -> None:
        """Raise a `UserError` unless a model is the one that the steering is for.

        Args:
            model: the model.
            any_model: accept other weights, where the model has the sites and their widths agree.
        """
        check_is_model(model)
        for part in self.parts:
            width, own = self.directions[part.site].shape[1], site_width(model, model.site(part.site))
            if width != own:
                why = f"{model.name} has width {own} there"
                raise UserError(f"directions of width {width} at {part.site}", why, f"steer {self.model.name}")
        known = self.model.fingerprint.get(precision_name(model.dtype))
        if not any_model and known != weight_hash(model.hf.state_dict(), model.dtype):
            why = f"{model.name} has other weights than {self.model.name or 'the model'} that it is for"
            hint = "steer that one, or allow any model (--any-model, any_model=True) if activations agree"
            raise UserError(f"steering {self.label}", why, hint)

    @contextmanager
    def applied(
        self, model: LanguageModel | transformers.PreTrainedModel, *, any_model: bool = False
    ) -> Iterator[AppliedEdits]:
        """Steer whatever the `transformers` model runs inside the block, `generate` included; see `lm.applied`.

            with trimtab.steering.load("sea").applied(hf_model):
                hf_model.generate(**tokenizer("Yesterday I went to the", return_tensors="pt"))

        Args:
            model: of `transformers`, or of `load_model`; its hooks are removed on leaving.
            any_model: accept other weights than those that the steering is for, if widths agree.

        Yields:
            What was done.

        Raises:
            UserError: as `check_model` and `lm.applied`.
        """
        own = LanguageModel.around(model) if isinstance(model, transformers.PreTrainedModel) else model
        check_is_model(own)
        with applied(own, self.source(own, any_model=any_model)) as edits:
            yield edits

    def save(self, path: Path | str) -> Path:
        """Write the directory, which appears whole.

        Raises:
            UserError: there is something at the path, or the disk refuses.
        """
        final = check_free(path)
        tensors = {**self.directions, **{f"{site}{MOST}": values for site, values in self.max_activation.items()}}
        with atomic_directory(final) as partial:
            with atomic_path(partial / DIRECTIONS) as file:
                save_file({name: values.contiguous() for name, values in tensors.items()}, file)
            for site, sae in self.codes.items():
                save_dictionary(sae, partial / site)
            write_json(partial / FILE, self.facts)
        return final

    @property
    def label(self) -> str:
        """What it is called in results: what it is for, or else where it lies."""
        return self.about or self.path or "without a name"

    def headline(self) -> str:
        known = operation_named(self.operation)
        unit = f", doses {self.unit}" if known.has_dose else ""
        sites = in_short([part.site for part in self.parts], "sites")
        what = f"{self.about}: " * bool(self.about)
        return f"{what}{self.operation} at {sites} of {self.model.name}{unit}, positions {self.positions}"

    def tables(self) -> dict[str, Table]:
        """What is done at each site, a row for each direction, and the evidence."""
        has_dose = operation_named(self.operation).has_dose
        rows = [
            {
                "site": part.site,
                "direction": f"feature {part.feature[i]}" if part.feature else f"vector {i}",
                "dose": dose if has_dose else None,
                "words": part.words[i] if part.words else "",
                "norm": part.norm,
                "sae": part.sae,
            }
            for part in self.parts
            for i, dose in enumerate(part.dose)
        ]
        columns = [
            Column("site", "site", whole=True),
            Column("direction", "direction"),
            Column("dose", "dose", NUMBER),
            *[Column("reads and writes", "words", spare=2)] * any(part.words for part in self.parts),
            Column("typical ‖x‖", "norm", NUMBER),
            Column("SAE", "sae", spare=1),
        ]
        found = {"directions": Table(columns=columns, rows=rows, caption=self.made_by)}
        if self.evidence:
            columns = [Column("evidence", "name"), Column("value", "value", INTERVAL)]
            columns += [Column(name, name) for name in ("unit", "note")]
            found["evidence"] = Table(columns=columns, rows=self.evidence)
        return found

    def to_json(self) -> dict[str, Any]:
        """What `steering.json` holds, and the hash of what it does."""
        return {**self.facts, "path": self.path, "hash": self.fingerprint}

    def __repr__(self) -> str:
        return f"<Steering: {self.headline()}>"


def check_free(path: Path | str) -> Path:
    """A path that a steering may be saved at. Raises a `UserError` unless nothing is there, or an empty directory."""
    final = as_path(path, "the steering's directory")
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise UserError(f"steering {final}", "it is there already", "choose another directory")
    return final


def load(path: Path | str) -> Steering:
    """A steering that was saved.

    Args:
        path: its directory, or that of a run that holds one.

    Raises:
        UserError: there is none, it is of another version, damaged, or says what cannot be done. The message names the
            file, and the field or site.
    """
    directory = as_path(path, "the steering")
    if not (directory / FILE).exists() and (directory / WITHIN / FILE).exists():
        directory = directory / WITHIN
    file = directory / FILE
    fields = read_json(file) if directory.is_dir() else None
    if fields is None:
        hint = "give a directory that trimtab find, steer --save or steering import wrote, or Steering.save"
        raise UserError(f"steering {path}", f"there is no {FILE}", hint)
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        why = f"its format is not {FORMAT}, which this version reads"
        raise UserError(str(file), why, "use the version of trimtab that wrote it, or make it again")
    facts = read_typed(SteeringFacts, fields, str(file))
    reads_codes = operation_named(facts.operation).name not in OF_DIRECTIONS
    tensors, _ = read_safetensors(directory / DIRECTIONS, "steering")
    known = [part.site for part in facts.parts]
    if missing := [site for site in known if site not in tensors]:
        raise UserError(f"site {missing[0]} in {file}", f"{DIRECTIONS} has no tensor of that name", "make it again")
    for name in sorted(tensors.keys() - set(known)):
        if name.removesuffix(MOST) not in known:
            hint = did_you_mean(name, known, f"leave it out, or name the site in {FILE}")
            raise UserError(f"tensor {name!r} in {directory / DIRECTIONS}", "it is of no site", hint)
    return Steering(
        **part_of(facts, SteeringFacts),
        directions={site: tensors[site] for site in known},
        max_activation={site: tensors[f"{site}{MOST}"] for site in known if f"{site}{MOST}" in tensors},
        codes={
            part.site: load_dictionary(directory / part.site) for part in facts.parts if part.feature and reads_codes
        },
        path=str(path),
    )

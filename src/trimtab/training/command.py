"""`trimtab train`: from a model's name and some text to one saved SAE or a bank of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from trimtab.activations.shards import read_index
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.precision import precision_on
from trimtab.distributed import Ranks
from trimtab.runs import config_dict, config_directory, json_safe, part_of
from trimtab.training.bank import NOT_THE_RESULT, Place, TrainedBank, open_run, train_members, unfinished
from trimtab.training.bank_file import read_bank_file
from trimtab.training.config import Recipe, TrainConfig
from trimtab.training.members import DEFAULT_SITE, MULTIPLIED, Member, chosen, expand
from trimtab.training.options import several, with_options
from trimtab.training.single import TrainedSAE, train_one
from trimtab.training.sources import SHARDS, RowsConfig, end_harvest, open_rows


@dataclass(frozen=True, kw_only=True)
class TrainTextConfig(RowsConfig, TrainConfig):
    """Training of one SAE by names and paths."""

    site: str = DEFAULT_SITE
    """Site to read."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config. The same command resumes it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        precision_on(self.device, self.precision)

    def directory(self) -> Path:
        """Where the run goes: the same config always finds its own run."""
        return self.run or config_directory("train", self, ignore=NOT_THE_RESULT)


@dataclass(frozen=True, kw_only=True)
class BankConfig(RowsConfig):
    """Training of a bank by names and paths."""

    members: tuple[Member, ...]
    """What to train; see `expand`."""
    workers: int | None = None
    """Members that are trained side by side; by default as many as there are threads."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after the rest."""

    def __post_init__(self) -> None:
        self.check()
        for member in self.members:
            if member.config is not None:
                precision_on(self.device, member.config.precision)

    @property
    def sites(self) -> tuple[str, ...]:
        """Every member's site, once."""
        return tuple(dict.fromkeys(member.site for member in self.members))

    def shared(self) -> dict[str, Any]:
        """What all members have in common."""
        return config_dict(RowsConfig(**part_of(self, RowsConfig))) | {"sites": list(self.sites)}

    def directory(self) -> Path:
        """Where the run goes: the same config always finds its own run."""
        named = {**self.shared(), "members": [member.name for member in self.members]}
        return self.run or config_directory("bank", named, ignore=NOT_THE_RESULT)


ArchitectureNames = Annotated[
    tuple[str, ...], Doc(f"Architecture: {', '.join(sorted(TRAINABLE))}; several make a bank.")
]


@with_options(several(TrainTextConfig, [name for name in MULTIPLIED if name != "arch"]))
@dataclass(frozen=True, kw_only=True)
class TrainCommand(RowsConfig, Recipe):
    """Train an SAE on a model's activations; or, with several values of some options or a bank file, a bank of them:
    all combinations, from one harvest."""

    bank: Path | None = None
    """TOML file with [defaults] and a [[member]] table for each SAE or product of SAEs. Options given beside it
    replace its defaults."""
    arch: ArchitectureNames = ("topk",)
    workers: int | None = None
    """Members of a bank that are trained side by side; by default as many as there are threads."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after the rest. The same command resumes it."""

    def expanded(self) -> TrainTextConfig | BankConfig:
        """One training, or the bank of all combinations. Raises a `UserError` if settings do not go together."""
        inherited: dict[str, Sequence[Any]] = {name: (value,) for name, value in chosen(self).items()}
        inherited |= {name: getattr(self, name) for name in MULTIPLIED if getattr(self, name)}
        file = read_bank_file(self.bank, TrainCommand) if self.bank else None
        shared = part_of(self, RowsConfig)
        members = expand(inherited, file.places() if file else (("", {}),))
        if len(members) > 1:
            return BankConfig(**shared, members=tuple(members), workers=self.workers, run=self.run)
        (member,) = members
        if member.error is not None:
            raise member.error
        fields = {name: value for name, value in member.values.items() if name != "site"}
        return TrainTextConfig(**shared, **fields, site=member.site, run=self.run)


def command_defaults(given: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the files among a command line's options say that it need not: a bank file, and a harvest of one site.

    Args:
        given: the options' words by name.

    Raises:
        UserError: there is something wrong with a file.
    """
    found: dict[str, Any] = {}
    for path in map(Path, given.get("bank", ())):
        found = {**read_bank_file(path, TrainCommand).defaults, "bank": path}
    harvests = given.get("activations") or found.get("activations")
    if harvests and "site" not in found:
        sites = {site for harvest in harvests for site in read_index(Path(harvest)).widths}
        found |= {"site": tuple(sites)} if len(sites) == 1 else {}
    return found


def run_train(command: TrainCommand) -> TrainedSAE | TrainedBank | None:
    """Train what the command says; under torchrun together with the other processes.

    Returns:
        What was trained; None on all ranks but the first.

    Raises:
        UserError: anything that the user named is wrong.
    """
    config = command.expanded()
    with Ranks.from_environment() as ranks:
        if isinstance(config, BankConfig):
            return train_bank(config, ranks)
        return train_text(config, ranks)


def train_text(config: TrainTextConfig, ranks: Ranks | None = None) -> TrainedSAE | None:
    """Harvest what the config names, train on it, save the SAE as `sae/` in the run.

    Args:
        config: what to train.
        ranks: processes that harvest together; the first one trains.

    Returns:
        What was trained; None on all ranks but the first.

    Raises:
        UserError: anything that the user named is wrong; see `load_model`, `read_documents`, `harvest`, `train`.
    """
    ranks = ranks or Ranks()
    path = config.directory()
    run = open_run(path, config, config.seed, config.device) if ranks.is_first else None
    if run is None:
        if not ranks.broadcast():
            open_rows(config, [config.site], path / SHARDS, ranks)
        return None
    with run:
        resumed = ranks.broadcast(run.done)
        if not resumed:
            rows = open_rows(config, [config.site], run.file(SHARDS), ranks)[config.site]
            train_one(run, config, rows, ranks.device(config.device))
        size = end_harvest(run.file(SHARDS), config.keep_harvest)
        return replace(TrainedSAE.of(run, resumed=resumed), harvest_bytes=size)


def train_bank(config: BankConfig, ranks: Ranks | None = None) -> TrainedBank | None:
    """Train the members of a bank that are not done yet, from one harvest of all their sites.

    A bank may be run again with more members: those that are done stay as they are.

    Args:
        config: what to train.
        ranks: processes that harvest together and share the members.

    Returns:
        What became of every member, failed ones included; None on all ranks but the first.

    Raises:
        UserError: anything that concerns all members; see `train_text`.
    """
    ranks = ranks or Ranks()
    path = config.directory()
    run = open_run(path, config.shared(), None, config.device, config) if ranks.is_first else None
    with run or nullcontext():
        place = Place(path, config.device, config.workers)
        left = ranks.broadcast(unfinished(config.members, place) if ranks.is_first else None)
        if run is not None:
            run.record(members={member.name: json_safe(member.values) for member in config.members})
        rows = open_rows(config, config.sites, path / SHARDS, ranks) if left else {}
        table = train_members(config.members, left, rows, place, ranks)
        if run is None or table is None:
            return None
        bank = TrainedBank(run=path, rows=tuple(table))
        size = end_harvest(path / SHARDS, config.keep_harvest or bank.problem is not None)
        bank = replace(bank, harvest_bytes=size)
        if bank.problem is None:
            run.finish({"members": [row.flat() for row in table]})
        else:
            run.fail(bank.problem.line)
        return bank

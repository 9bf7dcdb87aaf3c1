"""Configured comparisons with a verdict, composed of the rooms below."""

from trimtab.studies.demo import DemoConfig, run_demo
from trimtab.studies.demo_policy import run_whole_demo
from trimtab.studies.result import DemoResult

__all__ = ["DemoConfig", "DemoResult", "run_demo", "run_whole_demo"]

"""Configured comparisons with a verdict, composed of the rooms below."""

from trimtab.studies.demo import DemoConfig, run_demo
from trimtab.studies.demo_result import DemoResult

__all__ = ["DemoConfig", "DemoResult", "run_demo"]

"""Configured comparisons with a verdict, composed of the rooms below."""

from trimtab.studies.demo import DemoConfig, DemoResult, run_demo
from trimtab.studies.demo_policy import WholeDemo, run_whole_demo

__all__ = ["DemoConfig", "DemoResult", "WholeDemo", "run_demo", "run_whole_demo"]

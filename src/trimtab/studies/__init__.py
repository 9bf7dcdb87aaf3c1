"""Configured comparisons with a verdict, composed of the rooms below."""

from trimtab.studies.demo import DemoConfig, DemoResult, run_demo

__all__ = ["DemoConfig", "DemoResult", "run_demo"]

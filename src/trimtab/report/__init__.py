"""Runs as one HTML file each. Reads what a run left on disk; never imports torch."""

from trimtab.report.writing import write_report

__all__ = ["write_report"]

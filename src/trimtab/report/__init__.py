"""Runs as one HTML file. Reads what a run left on disk; never imports torch."""

from trimtab.report.demo_report import demo_page, write_demo_report
from trimtab.report.page import Page
from trimtab.report.policy_report import policy_page, write_policy_report

__all__ = ["Page", "demo_page", "policy_page", "write_demo_report", "write_policy_report"]

"""The version of trimtab, and nothing else, since importing `trimtab` itself leads to all rooms."""

__version__ = "0.1.0"

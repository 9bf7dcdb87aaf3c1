"""trimtab finds the features that control a language model, puts them to use, and proves what they do."""

__version__ = "0.1.0"

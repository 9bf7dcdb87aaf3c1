"""The path by which programs written for earlier versions import `Standard`."""

from trimtab.dictionaries.architectures.standard import Standard

__all__ = ["Standard"]

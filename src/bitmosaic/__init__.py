"""Fit a language model into a stated number of bytes."""

__version__ = "0.1.0.dev0"

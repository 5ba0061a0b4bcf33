"""The package's version, in a module of its own so that agents need nothing else to compare it."""

__version__ = "0.1.0"

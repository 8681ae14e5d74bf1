"""The version, for those parts of the package that may not import the whole."""

__version__ = "0.1.0"

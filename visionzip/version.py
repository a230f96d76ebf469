"""The toolkit's version, in a file that imports nothing: exports name it."""

__version__ = "0.1.0"

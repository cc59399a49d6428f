"""The version, in one place: setup.py, `lorasb.__version__` and every saved adapter read it here."""

__version__ = "0.2.0"

"""The version of the package, for setup.py and the code."""

__version__ = '0.2.0'

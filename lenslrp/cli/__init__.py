"""The command line."""

from lenslrp.cli.main import main

__all__ = ["main"]

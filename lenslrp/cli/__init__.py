"""The command line."""

from lenslrp.cli.commands import main

__all__ = ["main"]

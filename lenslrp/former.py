"""Modules under the names that they had in an earlier version."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any


class FormerModule(ModuleType):
    """What is taken from it comes, with a warning, from the module ``home``."""

    def __init__(self, name: str, home: str, since: str) -> None:
        super().__init__(name)
        self.__dict__.update(_home=home, _since=since)
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(import_module(self._home), name)
        warnings.warn(
            f"{self.__name__}.{name} is {self._home}.{name} since {self._since}",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

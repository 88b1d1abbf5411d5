"""What relevance means: units and their vocabulary, lenses, plots and reports.

Imported as ``lenslrp.analysis``; the folder is named ``analysis`` at the top of the repository.
Public names are imported when first used, as in :mod:`lenslrp`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lenslrp.analysis.coders import SparseCoder
    from lenslrp.analysis.units import Direction, Feature, Head, Neuron, Unit, parse_unit

_HOMES = {
    "coders": ("SparseCoder",),
    "units": ("Direction", "Feature", "Head", "Neuron", "Unit", "parse_unit"),
}

__all__ = [
    "Direction",
    "Feature",
    "Head",
    "Neuron",
    "SparseCoder",
    "Unit",
    "parse_unit",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"lenslrp.analysis.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'lenslrp.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""LensLRP: relevance at every hook of every transformer that TransformerLens can load.

AttnLRP (Achtibat et al., ICML 2024) on ``TransformerBridge``.

Public names are imported when first used: torch takes seconds, and ``lenslrp --help`` needs none
of it.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lenslrp.former import FormerModule
from lenslrp.version import VERSION

if TYPE_CHECKING:
    from lenslrp import targets
    from lenslrp.cache import RelevanceCache
    from lenslrp.defaults import recommended
    from lenslrp.embedding import embed
    from lenslrp.errors import (
        CoverageError,
        InputError,
        LensLRPError,
        LoadError,
        MissingExtraError,
        OutOfMemoryError,
        StorageError,
    )
    from lenslrp.explaining_file import explain_to
    from lenslrp.generation import Generation, explain_generation
    from lenslrp.hooks import (
        CPLRP,
        GIM,
        AttnLRP,
        AttnLRPViT,
        Composite,
        GradientTimesInput,
        RelP,
        relevance_rules,
    )
    from lenslrp.ledger import Ledger
    from lenslrp.models.doctor import examine
    from lenslrp.models.loading import load
    from lenslrp.models.surveying import survey
    from lenslrp.reductions import TopK
    from lenslrp.run import relevance_for_targets, run_with_relevance
    from lenslrp.sessions import Session, session
    from lenslrp.text.conversation import chat

_HOMES = {
    "cache": ("RelevanceCache",),
    "text.conversation": ("chat",),
    "defaults": ("recommended",),
    "embedding": ("embed",),
    "models.doctor": ("examine",),
    "errors": (
        "CoverageError",
        "InputError",
        "LensLRPError",
        "LoadError",
        "MissingExtraError",
        "OutOfMemoryError",
        "StorageError",
    ),
    "explaining_file": ("explain_to",),
    "generation": ("Generation", "explain_generation"),
    "hooks": (
        "CPLRP",
        "GIM",
        "AttnLRP",
        "AttnLRPViT",
        "Composite",
        "GradientTimesInput",
        "RelP",
        "relevance_rules",
    ),
    "ledger": ("Ledger",),
    "models.loading": ("load",),
    "reductions": ("TopK",),
    "run": ("relevance_for_targets", "run_with_relevance"),
    "sessions": ("Session", "session"),
    "models.surveying": ("survey",),
}

__all__ = [
    "CPLRP",
    "GIM",
    "AttnLRP",
    "AttnLRPViT",
    "Composite",
    "CoverageError",
    "Generation",
    "GradientTimesInput",
    "InputError",
    "Ledger",
    "LensLRPError",
    "LoadError",
    "MissingExtraError",
    "OutOfMemoryError",
    "RelP",
    "RelevanceCache",
    "Session",
    "StorageError",
    "TopK",
    "chat",
    "embed",
    "examine",
    "explain_generation",
    "explain_to",
    "load",
    "recommended",
    "relevance_for_targets",
    "relevance_rules",
    "run_with_relevance",
    "session",
    "survey",
    "targets",
]

__version__ = VERSION

if "ipykernel" in sys.modules:  # before another package imports tqdm, which then warns
    import_module("lenslrp.progress")

# A module that documentation of 0.1 imported from, and where it is now.
FormerModule("lenslrp.doctor", "lenslrp.models.doctor", since="0.2")


def __getattr__(name: str) -> Any:
    if name == "targets":
        return import_module("lenslrp.targets")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"lenslrp.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'lenslrp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

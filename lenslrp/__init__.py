"""LensLRP: relevance at every hook of every transformer that TransformerLens can load.

AttnLRP (Achtibat et al., ICML 2024) on ``TransformerBridge``.
"""

from importlib.metadata import PackageNotFoundError, version

from lenslrp import targets
from lenslrp.cache import RelevanceCache
from lenslrp.chat import chat
from lenslrp.doctor import examine
from lenslrp.errors import CoverageError, InputError, LensLRPError, LoadError
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
from lenslrp.loading import load
from lenslrp.reductions import TopK
from lenslrp.run import relevance_for_targets, run_with_relevance

try:
    __version__ = version("lenslrp")
except PackageNotFoundError:  # running from a checkout that is not installed
    __version__ = "0+checkout"

__all__ = [
    "CPLRP",
    "GIM",
    "AttnLRP",
    "AttnLRPViT",
    "Composite",
    "CoverageError",
    "GradientTimesInput",
    "InputError",
    "Ledger",
    "LensLRPError",
    "LoadError",
    "RelP",
    "RelevanceCache",
    "TopK",
    "chat",
    "examine",
    "load",
    "relevance_for_targets",
    "relevance_rules",
    "run_with_relevance",
    "targets",
]

"""All operations that programs are made of, by name."""

from __future__ import annotations

from tests.property.branch_operations import ATTENTIONS, BRANCHES
from tests.property.function_operations import ACTIVATIONS, FUNCTIONAL, FUNCTIONS, UNKNOWN
from tests.property.linear_operations import LINEAR, MOVES, RESHAPES
from tests.property.operation import Env, Op, key_of, rank
from tests.property.scan_operations import MIXERS, SCANNED
from tests.property.written_operations import EFFECTS, VIEWS, WRITTEN

OPS: dict[str, Op] = {**LINEAR, **FUNCTIONAL, **BRANCHES, **WRITTEN, **SCANNED}

__all__ = [
    "ACTIVATIONS",
    "ATTENTIONS",
    "EFFECTS",
    "FUNCTIONS",
    "MIXERS",
    "MOVES",
    "OPS",
    "RESHAPES",
    "UNKNOWN",
    "VIEWS",
    "Env",
    "Op",
    "key_of",
    "rank",
]

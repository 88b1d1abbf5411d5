"""The rules, as pure functions and tables, and the machinery that attaches them to a bridge."""

from lenslrp.hooks.assignment import Assignment, assign
from lenslrp.hooks.composites import (
    CPLRP,
    GIM,
    ROLES,
    AttnLRP,
    AttnLRPViT,
    Composite,
    GradientTimesInput,
    RelP,
)
from lenslrp.hooks.coverage import Coverage
from lenslrp.hooks.install import Rules, relevance_rules
from lenslrp.hooks.linear_rules import ZPLUS, AlphaBeta, Epsilon, Gamma
from lenslrp.hooks.rule_types import (
    CONSTANT,
    UNIFORM,
    Identity,
    Normalisation,
    Operations,
    Plain,
    Product,
    SoftCap,
    Softmax,
    SoftmaxTemperature,
)

__all__ = [
    "CONSTANT",
    "CPLRP",
    "GIM",
    "ROLES",
    "UNIFORM",
    "ZPLUS",
    "AlphaBeta",
    "Assignment",
    "AttnLRP",
    "AttnLRPViT",
    "Composite",
    "Coverage",
    "Epsilon",
    "Gamma",
    "GradientTimesInput",
    "Identity",
    "Normalisation",
    "Operations",
    "Plain",
    "Product",
    "RelP",
    "Rules",
    "SoftCap",
    "Softmax",
    "SoftmaxTemperature",
    "assign",
    "relevance_rules",
]

"""What a composite says about one model: the rule of each site, and what it leaves off the path."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from lenslrp.hooks.composites import Composite
from lenslrp.hooks.rule_types import product_shares
from lenslrp.hooks.sites import Accounts, Site
from lenslrp.hooks.structure import layer_of

FEEDS_PATTERN = re.compile(r"[._](q|k|qk)(_(layer)?norm|_a_layernorm|_[ab]_(proj|norm))?$")
"""Names of components that feed queries and keys, and nothing else."""

FEEDS_CONSTANT = {
    "recurrence": re.compile(
        r"(\.(dt|b|c)_layernorm|(hc|hc_head)\.input_norm"
        r"|\.altup.*\.(router_norm|modality_router|prediction_coefs|correction_coefs))$"
    ),
    "recurrence_gate": re.compile(r"(\.linear_y|\.linear_attn\.(in_proj_z|g_proj))$"),
    "attention_gate": re.compile(r"(\.receptance|\.attn\.gate)$"),
    "gate": re.compile(r"(?<!\.attn)\.gate$|\.dense_gate$"),
}
"""By the role of a product, names of components that feed its first factor, and nothing else."""


@dataclass(frozen=True)
class Context:
    """What an ``attach_*`` function needs besides its component."""

    composite: Composite
    accounts: Accounts | None
    attention: str
    copies: bool = False  #: keep values that something may write to in place
    queries: set[str] = field(default_factory=set)  #: norms that feed nothing but queries: paths
    #: mixture -> chosen experts [batch, pos, slot]
    routing: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)  #: mixture -> how many it has

    def site(self, hook: str, component: Any, role: str, rule: Any = None) -> Site:
        """The site of a rule, the composite's for its role unless one is given."""
        rule = self.composite[role] if rule is None else rule
        site = Site(hook, type(component).__name__, role, rule, layer_of(hook))
        site.accounts, site.copies = self.accounts, self.copies
        # An expert that no token was sent to does not run, nor do projections for global attention.
        site.optional = ".experts." in hook or hook.endswith("_global")
        return site

    @cached_property
    def _constant(self) -> dict[str, bool]:
        """By role, whether the first factor of a product is taken for a constant."""
        roles = ("attention_av", *FEEDS_CONSTANT)
        return {role: product_shares(self.composite[role])[0] == 0 for role in roles}

    def cuts(self, path: str) -> bool:
        """Whether the composite leaves a component off the path: what feeds a constant factor."""
        constant = self._constant
        if ".indexer." in path:  # which keys are seen: a choice, no relevance
            return True
        if path in self.queries or FEEDS_PATTERN.search(path):
            return constant["attention_av"]
        return any(constant[role] and name.search(path) for role, name in FEEDS_CONSTANT.items())

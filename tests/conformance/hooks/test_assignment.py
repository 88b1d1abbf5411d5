"""The table of rules is made without touching the model, and what is attached is what it says."""

from __future__ import annotations

import pytest
from torch import nn

import lenslrp
from lenslrp.hooks.assignment import Assignment, assign
from lenslrp.hooks.components import attach_position_gate
from lenslrp.hooks.linear_rules import Epsilon
from lenslrp.hooks.sites import Site
from lenslrp.hooks.structure import original
from tests.conformance.models.test_zoo import COVERED
from tests.conformance.zoo import build
from tests.unit.tiny import changes, snapshot

pytestmark = pytest.mark.filterwarnings("ignore")


def belongs(site: Site, row: Assignment) -> bool:
    """Whether a site is at the row's component, or at one of its hook points."""
    return site.hook == row.path or site.hook.startswith(f"{row.path}.")


@pytest.mark.parametrize("name", COVERED)
def test_what_is_attached_is_what_the_table_says(name: str) -> None:
    model = build(name)
    before = snapshot(model)
    for composite in (lenslrp.AttnLRP(), lenslrp.CPLRP(), lenslrp.AttnLRPViT()):
        rows = assign(model, composite).rows
        assert changes(before, model) == []
        with lenslrp.relevance_rules(model, composite, strict=False) as rules:
            sites = rules.sites
        for site in sites:
            assert any(belongs(site, row) for row in rows), site
        norms: set[int] = set()
        for row in rows:
            inner = original(row.module)
            if row.role == "norm" and (isinstance(inner, nn.Identity) or id(inner) in norms):
                continue  # nothing is normalised there, or one norm has a second name
            norms.add(id(inner) if inner is not None else id(row))
            own = [site for site in sites if belongs(site, row)]
            constant = row.attach is attach_position_gate  # no relevance, and no node
            if not isinstance(row.rule, Epsilon) and not constant:  # whose gradient is the layer's
                assert own, row
            assert all(site.rule == composite[site.role] for site in own if not site.optional)


def test_the_table_is_readable() -> None:
    table = assign(build("LlamaForCausalLM"), lenslrp.AttnLRP()).table()
    assert list(table.columns) == ["path", "component", "role", "rule", "share"]
    by_role = table.groupby("role").size()
    assert by_role["gate"] == by_role["activation"] == by_role["attention_av"]
    assert by_role["norm"] == 2 * by_role["gate"] + 1

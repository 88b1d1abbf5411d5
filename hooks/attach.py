"""Attach what :func:`~lenslrp.hooks.assignment.assign` has decided, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lenslrp.hooks.assignment import Assignment, assign
from lenslrp.hooks.components import attach_all_cycles
from lenslrp.hooks.constants import meter_edits, watch_gradients
from lenslrp.hooks.context import Context
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.leaf_modules import (
    attach_leaf,
    attach_patches,
    media_embedders,
    sites_before_sequence,
)
from lenslrp.hooks.scan_points import scan_points
from lenslrp.hooks.scans import KEPT_STATES, mixers
from lenslrp.hooks.structure import NamedModules

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def attach_all(
    model: TransformerBridge, modules: NamedModules, ctx: Context, at: Attached
) -> list[tuple[nn.Module, bool]]:
    """Attach the composite's rules to every component of a bridge; returns its embeddings.

    ``at`` learns the sites and how to undo them, as far as it went.
    """
    assigned = assign(model, ctx.composite, ctx.attention)
    at.edits = meter_edits(at, ctx, [*modules, *scan_points(mixers(modules)).items()])
    at.changed = watch_gradients(at, modules)
    at.wrapped, at.weights = assigned.wrapped, assigned.weights
    ctx.queries.update(assigned.queries)
    for inner, _ in assigned.embedded:
        attach_leaf(at, inner)
    for _, module in modules:
        if hasattr(module, "L_bp_cycles_padded"):
            attach_all_cycles(at, module)
        for name in KEPT_STATES & module.__dict__.keys():  # with a graph, under rules
            at.attribute(module, name, module.__dict__[name])
    for row in assigned.rows:
        attach_row(at, ctx, row)
    for place in media_embedders(modules):
        attach_patches(at, place.projection, sites_before_sequence(modules, at.sites))
    return assigned.embedded


def attach_row(at: Attached, ctx: Context, row: Assignment) -> None:
    """Attach what one row of the table says."""
    row.attach(at, ctx, row.path, row.module, *row.options)

"""PA-LRP: AttnLRP with the relevance that belongs to positions given to the token that is there.

Bakish et al. 2025 (arXiv:2506.02138), read together with the authors' code. Positions are inputs of
the model beside the tokens, and what an explanation leaves at them is lost. So what every layer's
position embedding absorbs is added to the tokens:

- rotary: ``q * cos`` and ``rot(q) * sin`` are products of two factors, so half of the relevance of
  each (Prop. 3.2 of AttnLRP) goes to cos and to sin, for queries and keys alike; q and k get the
  other half;
- learned: the embedding is one of two addends, and its relevance is what the epsilon rule gives it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.utilities.hf_utils import get_rotary_pct_from_config

from lenslrp.analysis.passes.problems import AttributionProblem
from lenslrp.edits import edit_gradient
from lenslrp.errors import InputError
from lenslrp.graph_check import conditional
from lenslrp.hooks.composites import AttnLRP
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.structure import components
from lenslrp.running import architecture, undone

ADJACENT = ("rotary_adjacent_pairs", "rotary_interleaved_cos_sin")
"""Settings of the bridge under which neighbouring features are rotated, not halves."""


def pa_lrp(problem: AttributionProblem, *, seed: int, absolute: bool = True) -> Tensor:
    """AttnLRP relevance of the tokens plus that of their positions, in units of the target.

    Args:
        absolute: take the magnitude of what each absorbed, as the authors' code does; ``False``
            keeps its sign, as their formula does.

    Raises:
        InputError: the model has neither learned positions nor rotary ones that can be read here.
    """
    model = problem.model
    absorbed: dict[str, Tensor] = {}
    with undone(Attached()) as at, conditional(model):  # absorbed: not in the relevance accounting
        for path, module in components(model):
            if hasattr(module, "hook_rot_q") and hasattr(module, "hook_rot_k"):
                _attach(at, path, module, absorbed)
        cache = problem.relevance(AttnLRP())
    units = problem.mask.shape[1]
    learned = [] if cache.positions is None else [cache.positions[:, -units:]]
    positional = [*absorbed.values(), *learned]
    if not positional:
        raise InputError(
            f"pa_lrp: {architecture(model)} has no learned positions, and no rotary ones that are "
            "applied where they can be read (hook_rot_q, hook_rot_k)"
        )
    total = torch.stack([part.abs() if absolute else part for part in positional]).sum(dim=0)
    return (cache.tokens if cache.pixels is None else problem.summed(cache.pixels)) + total


def _attach(at: Attached, path: str, attn: Any, absorbed: dict[str, Tensor]) -> None:
    """Halve the gradient of one attention's rotated queries and keys; the rest is ``absorbed``."""
    tables: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings = kwargs.get("position_embeddings")
        tables[:] = [] if embeddings is None else [embeddings]

    def rotated(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if not tables or not y.requires_grad:
            return  # a layer without rotation
        adjacent = any(getattr(attn.config, name, False) for name in ADJACENT)
        if adjacent or not isinstance(tables[0], tuple):  # DeepSeek V2's are complex numbers
            raise InputError(f"pa_lrp: {path} rotates neighbouring features, which is not offered")
        cos, sin = (_table(table, attn, y) for table in tables[0])
        width = cos.shape[-1]
        rotated_part = y.detach()[..., :width]
        # The rotation undone: y = x cos + rot(x) sin.
        x = (rotated_part * cos - _rot(rotated_part) * sin) / (cos**2 + sin**2)
        parts = {"cos": x * cos, "sin": _rot(x) * sin}

        def halve(g: Tensor) -> Tensor:
            half = g[..., :width] / 2
            for name, part in parts.items():
                taken = (part * half).sum(dim=(1, -1))
                absorbed[f"{path}.{name}"] = absorbed.get(f"{path}.{name}", 0.0) + taken
            return torch.cat([half, g[..., width:]], dim=-1)

        edit_gradient(y, halve)

    at.pre_hook(attn, before, with_kwargs=True)
    at.hook(attn.hook_rot_q, rotated)
    at.hook(attn.hook_rot_k, rotated)


def _table(
    table: Float[Tensor, "rows pos width"], attn: Any, y: Float[Tensor, "batch head pos d_head"]
) -> Float[Tensor, "rows 1 pos rotated"]:
    """cos or sin for every rotated feature; GPT-OSS has one for the two halves of all of them."""
    halves = 2 * table.shape[-1] == y.shape[-1] and get_rotary_pct_from_config(attn.config) == 1
    wide = torch.cat([table, table], dim=-1) if halves else table
    return wide.unsqueeze(1).to(y.dtype)


def _rot(x: Float[Tensor, "*shape features"]) -> Float[Tensor, "*shape features"]:
    """``(x1, x2) -> (-x2, x1)``, halves of the features."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)

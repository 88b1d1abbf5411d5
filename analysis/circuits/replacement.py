"""The local replacement model: sparse coders in the place of what they reconstruct, for one prompt.

Where a coder writes, what the model has there is taken apart (Ameisen et al. 2025)::

    y = scale * (a W_dec + b_dec) + mean + x W_skip + error

(mean 0 and scale 1, but for an autoencoder that normalises; of a cross-layer transcoder ``a W_dec``
is the sum of what features of this layer and of earlier ones write here). The values stay those of
the model to the last bit; the graph below ``y`` is another. Relevance goes to the features ``a``,
through the skip connection, and to the error, which is a constant of this prompt and ends there;
``b_dec`` and ``mean`` absorb theirs (the ledger's ``biases``). So what the model itself computes
``y`` with, an MLP for a transcoder, is off the path.

A feature that is active passes its relevance on through its column of ``W_enc``: its gate (ReLU,
JumpReLU, the k largest) is open and has the identity rule, the column the epsilon rule, and what is
added to it is a bias. One that is not active has no relevance. Which are active is a constant of
the prompt, as are the mean and the scale of a normalization. With attention and norms constant as
well, the replacement model is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenslrp.analysis.circuits.nodes import Node
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.locations import known_hook
from lenslrp.edits import require_on_stream
from lenslrp.errors import InputError
from lenslrp.hooks.functions import apply, set_site
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.linear_rules import Epsilon
from lenslrp.hooks.readers import converted, reverted
from lenslrp.hooks.sites import Accounts, Site, row_sums
from lenslrp.hooks.structure import layer_of
from lenslrp.unused import require_used

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Cut = Callable[[str, Tensor], Tensor]
"""Given a key and its tensor, what goes on in the tensor's place."""


@dataclass(frozen=True, order=True)
class FeatureNode(Node):
    """One feature of a sparse coder at one position."""

    def __str__(self) -> str:
        return f"{self.hook.removesuffix(']')} {self.unit}]@{self.position}"


@dataclass(frozen=True, order=True)
class ErrorNode(Node):
    """What a sparse coder leaves out at one position."""

    def __str__(self) -> str:
        return f"{self.hook}@{self.position}"


def features_key(coder: SparseCoder) -> str:
    """Under which a coder's features are kept, as hook points are under their names."""
    return f"{coder.hook}[{coder.name}]"


def error_key(coder: SparseCoder) -> str:
    """Under which what a coder leaves out is kept."""
    return f"{coder.hook}[{coder.name} error]"


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """Which features of a coder are active in a prompt, and where.

    Attributes:
        coder: the coder.
        positions, features: [entry], in order of position, then of feature.
    """

    coder: SparseCoder
    positions: Int[Tensor, " entry"]
    features: Int[Tensor, " entry"]

    @cached_property
    def entries(self) -> Mapping[tuple[int, int], int]:
        """(position, feature) -> entry."""
        pairs = zip(self.positions.tolist(), self.features.tolist(), strict=True)
        return {pair: entry for entry, pair in enumerate(pairs)}

    @classmethod
    def of(cls, coder: SparseCoder, x: Tensor) -> ActiveFeatures:
        """Those that are active in the first row of ``x``, as at the coder's hook point."""
        with torch.no_grad():
            positions, features = (coder.encode(x[:1])[0] != 0).nonzero(as_tuple=True)
        return cls(coder, positions, features)


class Encode(torch.autograd.Function):
    """The activations of given features, [row, entry], of what a coder reads, [row, pos, d_in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, active: ActiveFeatures, site: Site) -> Tensor:
        set_site(ctx, site)
        coder, at = active.coder, (slice(None), active.positions, active.features)
        mean, scale = coder.normalizer(x)
        weight, shift = coder.W_enc.to(x), -mean / scale
        if coder.subtract_b_dec:
            shift = shift - coder.b_dec.to(x)
        a: Tensor = ((x / scale + shift) @ weight + coder.b_enc.to(x))[at]
        ctx.active, ctx.scale, ctx.shape, ctx.bias = active, scale, x.shape, None
        if site.accounts is not None:
            ctx.bias = (shift.expand_as(x) @ weight + coder.b_enc.to(x))[at]
        return a

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        site, active = ctx.site, ctx.active
        site.backward += 1
        if ctx.bias is not None:
            site.report("biases", row_sums(ctx.bias, g))
        weight = active.coder.W_enc.to(g)
        dense = g.new_zeros(*ctx.shape[:2], weight.shape[1])
        dense[:, active.positions, active.features] = g
        return (dense @ weight.T) / ctx.scale, None, None


class Write(torch.autograd.Function):
    """``y`` [row, pos, d_out], on a graph of what the coder reads, of the error and of features.

    ``active`` are the coder's own, then those that write there from earlier layers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        error: Tensor,
        active: Sequence[ActiveFeatures],
        site: Site,
        *features: Tensor,
    ) -> Tensor:
        set_site(ctx, site)
        coder = active[0].coder
        mean, scale = coder.denormalizer(x)
        ctx.active, ctx.scale, ctx.bias = active, scale, None
        if site.accounts is not None:
            ctx.bias = scale * coder.b_dec.to(y) + mean
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        site, active = ctx.site, ctx.active
        site.backward += 1
        if ctx.bias is not None:
            site.report("biases", row_sums(ctx.bias, g))
        scaled, coder = g * ctx.scale, active[0].coder
        features = [
            (scaled @ of.coder.decoders[coder.written_at].to(g).T)[:, of.positions, of.features]
            for of in active
        ]
        skip = None if coder.W_skip is None else g @ coder.W_skip.to(g).T
        return None, skip, g, None, None, *features


def written(
    active: Sequence[ActiveFeatures], features: Sequence[Float[Tensor, "row _"]], x: Tensor
) -> Tensor:
    """What is written where a coder reads ``x``: [row, pos, d_out].

    Args:
        active: the coder's own features, then those that write there from earlier layers.
        features: the activations of each.
        x: what the coder reads.
    """
    coder, y = active[0].coder, None
    for of, a in zip(active, features, strict=True):
        dense = a.new_zeros(*x.shape[:2], of.coder.W_enc.shape[1])
        dense[:, of.positions, of.features] = a
        rows = of.coder.decoders[coder.written_at]
        y = coder.decode(dense, x) if y is None else y + dense @ rows.to(dense)
    assert y is not None
    return y


def require_coders(model: TransformerBridge, coders: Sequence[SparseCoder]) -> None:
    """Refuse coders that cannot stand in a model together.

    Raises:
        InputError: an unknown hook point, two coders that write to one, one whose tensor nothing
            uses, a transcoder that does not say where it writes, a cross-layer one without the
            layers that its features write.
    """
    names: dict[str, str] = {}
    homes = {coder.hook_out for coder in coders}
    for coder in coders:
        if coder.hook_out is None and not coder.writes_back:
            raise InputError(
                f"{coder.name} reads {coder.W_enc.shape[0]} values a position at {coder.hook} and "
                f"writes {coder.W_dec.shape[1]}: give hook_out, where it writes"
            )
        if alone := [hook for hook in coder.later if hook not in homes]:
            raise InputError(
                f"{coder.name} writes at {alone[0]}, too, and no transcoder of that layer is "
                "there: give all layers of the cross-layer transcoder"
            )
        known_hook(model, coder.hook)
        out = known_hook(model, coder.written_at)
        require_on_stream(model, out, model.hook_dict)
        for key in (out, features_key(coder)):
            if key in names:
                raise InputError(
                    f"{names[key]} and {coder.name} both stand at {key}; give one of them, or "
                    "names of their own"
                )
            names[key] = coder.name
    require_used(model, [coder.written_at for coder in coders])


def stand_in(
    at: Attached,
    points: Mapping[str, Any],
    coder: SparseCoder,
    known: ActiveFeatures | None,
    earlier: dict[str, list[tuple[ActiveFeatures, Tensor]]],
    *,
    accounts: Accounts | None,
    found: Callable[[ActiveFeatures], None],
    cut: Cut,
) -> None:
    """Put a coder in its place for the pass that is made.

    Args:
        at: where its hooks are attached.
        points: every hook point.
        coder: the coder.
        known: which of its features are active; if `None`, those that are in the first row.
        earlier: hook point -> which features of earlier layers write there in this pass, and their
            activations: one dictionary for all coders.
        accounts: where what it absorbs is reported.
        found: is told which are active.
        cut: what goes on in the place of its features, [row, entry, 1, 1], and of its error,
            [row, pos, 1, d_out].
    """
    hook, out = coder.hook, coder.written_at
    held: dict[str, Tensor] = {}

    site = Site(out, "SparseCoder", "linear", Epsilon(), layer_of(out), accounts=accounts)

    def reading(point: Any, _: Any, x: Tensor) -> None:
        held["x"] = converted(point, x)

    def writing(point: Any, _: Any, y: Tensor) -> Tensor:
        if "x" not in held:
            raise InputError(
                f"{coder.name} writes at {out}, which runs before {hook}, that it reads"
            )
        x, shown = held.pop("x"), converted(point, y.detach())
        read = coder.flat(x)
        flat = coder.flat(shown) if coder.writes_back else shown
        if flat.shape != (*x.shape[:2], coder.W_dec.shape[1]):
            raise InputError(
                f"{coder.name} writes {coder.W_dec.shape[1]} values a position, {out} is "
                f"{list(shown.shape)}"
            )
        active = ActiveFeatures.of(coder, x) if known is None else known
        found(active)
        a = apply(Encode, read, active, site)
        a = cut(features_key(coder), a[..., None, None])[..., 0, 0]
        for there in coder.later:
            earlier.setdefault(there, []).append((active, a))
        sources, features = zip((active, a), *earlier.get(out, ()), strict=True)
        with torch.no_grad():
            error = (flat - written(sources, features, x)).unsqueeze(-2)
        error = cut(error_key(coder), error).squeeze(-2)
        skips = read if coder.W_skip is not None else read.detach()
        whole = apply(Write, flat, skips, error, sources, site, *features)
        if isinstance(coder.heads, int):  # of one head: the others stay on the graph
            others = converted(point, y).unbind(-2)
            heads = [*others[: coder.heads], whole, *others[coder.heads + 1 :]]
            return reverted(point, torch.stack(heads, dim=-2)).reshape(y.shape)
        return reverted(point, whole.view_as(shown)).reshape(y.shape)

    at.hook(points[hook], reading)
    at.hook(points[out], writing)

"""What is read at a hook point for many units at once: their activations and their relevance.

A neuron is a component: activation x_i, relevance x_i g_i. A head is a vector of them: activation
its length, relevance the sum. A direction v has activation a = x . v and relevance a (g . v). A
feature of a sparse autoencoder has activation a_j and writes a_j d_j, so its relevance is
a_j (g . d_j), as for any summand of the residual stream (times the scale of a coder that
normalises).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.kinds import Direction
from lenslrp.errors import InputError

Sites = str | SparseCoder | Direction | Sequence["str | SparseCoder | Direction"]


@runtime_checkable
class UnitReader(Protocol):
    """Units of one kind at one hook point: [row, pos, ...] -> [row, pos, unit]."""

    @property
    def kind(self) -> str: ...

    def activation(self, x: Tensor) -> Float[Tensor, "row pos unit"]: ...

    def relevance(self, x: Tensor, g: Tensor) -> Float[Tensor, "row pos unit"]: ...


@dataclass(frozen=True)
class ComponentReader:
    """Each component of the last axis is a unit: neurons, or the basis of any hook point."""

    kind: str = "neuron"

    def activation(self, x: Tensor) -> Float[Tensor, "row pos unit"]:
        return x

    def relevance(self, x: Tensor, g: Tensor) -> Float[Tensor, "row pos unit"]:
        return x * g


@dataclass(frozen=True)
class HeadReader:
    """[row, pos, head, d_head]: each head is a unit."""

    kind: str = "head"

    def activation(self, x: Tensor) -> Float[Tensor, "row pos unit"]:
        norms: Tensor = x.norm(dim=-1)
        return norms

    def relevance(self, x: Tensor, g: Tensor) -> Float[Tensor, "row pos unit"]:
        sums: Tensor = torch.einsum("bphd,bphd->bph", x, g)
        return sums


@dataclass(frozen=True, eq=False)
class DirectionReader:
    """Rows of ``vectors`` are units."""

    vectors: Float[Tensor, "unit features"]
    kind: str = "direction"

    def activation(self, x: Tensor) -> Float[Tensor, "row pos unit"]:
        return x @ self.vectors.to(x).T

    def relevance(self, x: Tensor, g: Tensor) -> Float[Tensor, "row pos unit"]:
        return self.activation(x) * self.activation(g)


@dataclass(frozen=True, eq=False)
class FeatureReader:
    """Each feature of a sparse autoencoder is a unit."""

    coder: SparseCoder
    kind: str = "feature"

    def activation(self, x: Tensor) -> Float[Tensor, "row pos unit"]:
        return self.coder.encode(x)

    def relevance(self, x: Tensor, g: Tensor) -> Float[Tensor, "row pos unit"]:
        _, scale = self.coder.denormalizer(self.coder.flat(x))
        return self.coder.encode(x) * scale * (self.coder.flat(g) @ self.coder.W_dec.to(g).T)


@dataclass(frozen=True, eq=False)
class SearchedHook:
    """Units that are searched: a reader at a hook point, or at that hook point of every block.

    Attributes:
        name: the user's name for it: ``"mlp.hook_post"``, or a coder's name and hook.
        hook: a hook point's name, or its end, which stands for every block.
        reader: reads the units' activations and relevance there.
        fingerprint: of its weights, empty for none.
    """

    name: str
    hook: str
    reader: UnitReader
    fingerprint: str = ""


def searched_hooks(sites: Sites) -> list[SearchedHook]:
    """The units to search, from hook names, sparse coders and directions.

    Args:
        sites: hook names, `SparseCoder`, `Direction`, or a list of these. The directions at one
            hook point are searched together.

    Raises:
        InputError: nothing, something else, or one site twice.
    """
    items: list[Any] = [sites] if isinstance(sites, str | SparseCoder | Direction) else list(sites)
    searched: list[SearchedHook] = []
    directions: dict[str, list[Direction]] = {}
    for item in items:
        if isinstance(item, str):
            searched.append(
                SearchedHook(
                    item,
                    item,
                    HeadReader()
                    if item.endswith(("hook_z", "hook_scan_out"))
                    else ComponentReader("channel" if item.endswith("hook_scan_in") else "neuron"),
                )
            )
        elif isinstance(item, SparseCoder):
            if not item.writes_back:
                raise InputError(
                    f"{item.name} is a transcoder: it reads one hook point and writes another; its "
                    "features can be explained one by one, not searched"
                )
            weights = (item.W_enc, item.b_enc, item.W_dec, item.b_dec, item.threshold)
            how = (item.subtract_b_dec, item.normalization, item.heads)
            extra = f"{item.k}" if how == (False, "none", None) else f"{item.k} {how}"
            mark = _fingerprint([w for w in weights if w is not None], extra)
            searched.append(
                SearchedHook(f"{item.hook}[{item.name}]", item.hook, FeatureReader(item), mark)
            )
        elif isinstance(item, Direction):
            directions.setdefault(item.at, []).append(item)
        else:
            raise InputError(
                "sites are hook names, sparse coders (SparseCoder) or directions (Direction), not "
                f"{item!r}"
            )
    for hook, together in directions.items():
        vectors = torch.stack([d.vector.detach() for d in together])
        mark = _fingerprint([vectors])
        searched.append(SearchedHook(f"{hook}[directions]", hook, DirectionReader(vectors), mark))
    names = [site.name for site in searched]
    if not names or len(set(names)) < len(names):
        raise InputError(f"sites must be one or more different ones, not {names}")
    if any(name.endswith("hook_expert_post") for name in names):
        raise InputError(
            "experts' neurons cannot be searched yet: a position reaches only some of them; search "
            "the mixture's output, or a dense layer"
        )
    return searched


def _fingerprint(tensors: list[Tensor], extra: str = "") -> str:
    digest = hashlib.sha256(extra.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

"""What is read at a hook point for many units at once: their activations and their relevance.

A neuron is a component: activation x_i, relevance x_i g_i. A head is a vector of them: activation
its length, relevance the sum. A direction v has activation a = x . v and relevance a (g . v). A
feature of a sparse coder has activation a_j and writes a_j d_j (times the scale of a coder that
normalises), so its relevance is a_j (g . d_j) with the g of where it writes, as for any summand
there. Of many features few are active at a position, so relevance is computed for those alone, from
what the forward pass kept of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.kinds import Direction
from lenslrp.errors import InputError

Sites = str | SparseCoder | Direction | Sequence["str | SparseCoder | Direction"]


@runtime_checkable
class UnitReader(Protocol):
    """Units of one kind at one hook point of ``axes`` axes: [row, pos, ...] -> [row, pos, unit]."""

    @property
    def kind(self) -> str: ...

    @property
    def axes(self) -> int: ...

    def activation(self, x: Tensor) -> Float[Tensor, "row pos unit"]: ...

    def relevance(self, x: Tensor, g: Tensor) -> Float[Tensor, "row pos unit"]: ...


@dataclass(frozen=True)
class ComponentReader:
    """Each component of the last axis is a unit: neurons, or the basis of any hook point."""

    kind: str = "neuron"
    axes: int = 3

    def activation(self, x: Tensor) -> Float[Tensor, "row pos unit"]:
        return x

    def relevance(self, x: Tensor, g: Tensor) -> Float[Tensor, "row pos unit"]:
        return x * g


@dataclass(frozen=True)
class HeadReader:
    """[row, pos, head, d_head]: each head is a unit."""

    kind: str = "head"
    axes: int = 4

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
    axes: int = 3

    def activation(self, x: Tensor) -> Float[Tensor, "row pos unit"]:
        return x @ self.vectors.to(x).T

    def relevance(self, x: Tensor, g: Tensor) -> Float[Tensor, "row pos unit"]:
        return self.activation(x) * self.activation(g)


@dataclass(frozen=True, eq=False)
class Written:
    """How much of its vector each active feature writes: an entry a position and feature.

    Attributes:
        rows, length: how many rows, and how many positions each has.
        position: row and position as one number.
        feature: which feature.
        amount: not zero; in units of the vector.
    """

    rows: int
    length: int
    position: Int64[Tensor, " entry"]
    feature: Int64[Tensor, " entry"]
    amount: Float[Tensor, " entry"]


@dataclass(frozen=True, eq=False)
class FeatureReader:
    """Each feature of a sparse coder is a unit."""

    coder: SparseCoder
    kind: str = "feature"

    @property
    def axes(self) -> int:
        return 3 if self.coder.heads is None else 4

    def activation(self, x: Tensor) -> Float[Tensor, "row pos unit"]:
        return self.coder.encode(x)

    def written(self, activation: Float[Tensor, "row pos unit"], x: Tensor) -> Written:
        """What `relevance` needs of the forward pass: ``activation`` is that of ``x``."""
        flat = activation.flatten(0, 1)
        position, feature = flat.nonzero(as_tuple=True)
        _, scale = self.coder.denormalizer(self.coder.flat(x))
        amount = flat[position, feature] * scale.flatten()[position]
        rows, length, _ = activation.shape
        return Written(rows, length, position, feature, amount)

    def relevance(self, written: Written, g: Tensor) -> Float[Tensor, "row pos unit"]:
        """Zero where a feature is not active; ``g`` is of where the coder writes."""
        g = self.coder.flat_output(g).flatten(0, 1)
        features, column = written.feature.unique(return_inverse=True)
        along = g @ self.coder.W_dec[features].to(g).T
        found = written.amount * along[written.position, column]
        relevance = found.new_zeros(len(g), len(self.coder.W_dec))
        relevance[written.position, written.feature] = found
        return relevance.view(written.rows, written.length, -1)


@dataclass(frozen=True, eq=False)
class SearchedHook:
    """Units that are searched: a reader at a hook point, or at that hook point of every block.

    Attributes:
        name: the user's name for it: ``"mlp.hook_post"``, or a coder's name and hook.
        hook: a hook point's name, or its end, which stands for every block.
        reader: reads the units' activations and relevance there.
        fingerprint: of its weights, empty for none.
        hook_out: the hook point where they write, and where their relevance is read, if another.
    """

    name: str
    hook: str
    reader: UnitReader | FeatureReader
    fingerprint: str = ""
    hook_out: str | None = None


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
            if item.hook_out is None and not item.writes_back:
                raise InputError(
                    f"{item.name} is a transcoder: it writes another width than it reads; give it "
                    "hook_out, the hook point that it writes"
                )
            weights = (item.W_enc, item.b_enc, item.W_dec, item.b_dec, item.threshold)
            how = (item.subtract_b_dec, item.normalization, item.heads)
            extra = f"{item.k}" if how == (False, "none", None) else f"{item.k} {how}"
            extra += f" {item.hook_out}" if item.hook_out else ""
            mark = _fingerprint([w for w in weights if w is not None], extra)
            name = f"{item.hook}[{item.name}]"
            searched.append(SearchedHook(name, item.hook, FeatureReader(item), mark, item.hook_out))
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

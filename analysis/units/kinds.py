"""The units that can be explained: neurons, heads, directions, features of a sparse coder.

A unit is a small frozen value. It knows the hook point where it lives in a given bridge, how its
activation is read from the tensor there, which vectors of the residual stream it reads and writes,
and its text, such as ``blocks.5.mlp.hook_post[17]``, which `parse_unit` turns back into the unit.

Reads and writes are the rows and columns of the weights as they stand, without norms; what they
mean in the vocabulary is for `lenslrp.analysis.units.projection`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import MoEBridge

from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.locations import (
    Side,
    Vectors,
    batched_experts,
    block_of,
    blocks_name,
    expert_reads,
    experts_down,
    known_hook,
    shared_name,
    weight,
)
from lenslrp.errors import InputError
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.structure import components

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Routing = Int[Tensor, "batch pos slot"]
"""Which expert is in which slot."""


class Unit:
    """A part of a model that can be explained: the methods that all kinds have."""

    def hook(self, model: TransformerBridge) -> str:
        """The name of the hook point where it lives in ``model``.

        Raises:
            InputError: the model has no such unit; the message names the range.
        """
        raise NotImplementedError

    def activation(self, value: Tensor, routing: Routing | None = None) -> Tensor:
        """Its activation, from the tensor at its hook point. Differentiable.

        Args:
            value: [batch, pos, ...]; one that the model flattened over batch and positions (OPT's
                MLPs) gives a flat result.
            routing: which expert is in which slot (``R.routing``), for experts' neurons.

        Returns:
            [batch, pos].

        Raises:
            InputError: a tensor of another shape than at the unit's hook point.
        """
        raise NotImplementedError

    def writes(self, model: TransformerBridge) -> Vectors:
        """The vectors that it adds to the residual stream: ``"out"``, [vectors, d_model].

        Raises:
            InputError: the model has no such unit, or it writes something else.
        """
        raise NotImplementedError

    def reads(self, model: TransformerBridge) -> Vectors:
        """The vectors with which it multiplies its (normed) input: name -> [vectors, d_model].

        Raises:
            InputError: the model has no such unit, or it reads something else.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Neuron(Unit):
    """One MLP neuron.

    Attributes:
        layer: block index, from 0.
        index: into the last axis of its hook.
        expert: of a mixture: which routed expert, or ``"shared"``.
        side: ``"encoder"`` or ``"decoder"``, of an encoder-decoder.

    Examples:
        >>> str(Neuron(5, 17, expert=3))  # of a mixture; of a dense MLP blocks.5.mlp.hook_post[17]
        'blocks.5.mlp.hook_expert_post[3, 17]'
    """

    layer: int
    index: int
    expert: int | Literal["shared"] | None = None
    side: Side = "decoder"

    def __str__(self) -> str:
        stack = "encoder_blocks" if self.side == "encoder" else "blocks"
        if isinstance(self.expert, int):
            return f"{stack}.{self.layer}.mlp.hook_expert_post[{self.expert}, {self.index}]"
        shared = "" if self.expert is None else "shared_experts."
        return f"{stack}.{self.layer}.mlp.{shared}hook_post[{self.index}]"

    def hook(self, model: TransformerBridge) -> str:
        self._weights(model)
        path = f"{blocks_name(model, self.side)}.{self.layer}.mlp"
        if self.expert is None:
            return f"{path}.hook_post"
        if self.expert == "shared":
            return f"{path}.{shared_name(block_of(model, self.layer, self.side).mlp)}.hook_post"
        name = f"{path}.hook_expert_post"
        if name not in hook_points(model, components(model)):
            raise InputError(f"{self}: the experts of this architecture have no hook point")
        return name

    def activation(self, value: Tensor, routing: Routing | None = None) -> Tensor:
        """0 where a position was not sent to the neuron's expert."""
        if isinstance(self.expert, int):
            if routing is None or value.ndim != 4:
                raise InputError(
                    f"{self}: an expert's neuron needs [batch, pos, slot, neuron] and the routing "
                    f"(R.routing[{f'blocks.{self.layer}.mlp'!r}]); got {list(value.shape)}"
                )
            return (value[..., self.index] * (routing == self.expert)).sum(dim=-1)
        return value[..., self.index]

    def writes(self, model: TransformerBridge) -> Vectors:
        return {"out": self._weights(model)["out"]}

    def reads(self, model: TransformerBridge) -> Vectors:
        """``"in"``, and for a gated MLP also ``"gate"``, whose activation multiplies it."""
        return {k: v for k, v in self._weights(model).items() if k != "out"}

    def _weights(self, model: TransformerBridge) -> Vectors:
        block = block_of(model, self.layer, self.side)
        mlp = getattr(block, "mlp", None)
        if mlp is None:
            raise InputError(f"{self}: this block has no MLP")
        dense = isinstance(mlp, MoEBridge) and mlp.bound_dense
        if self.expert == "shared":
            mlp = getattr(mlp, shared_name(mlp))
        elif isinstance(mlp, MoEBridge) and not dense:
            return self._expert_weights(model)
        elif self.expert is not None:
            raise InputError(f"{self}: this block is no mixture of experts; leave expert out")
        matrices = {k: weight(mlp, w) for k, w in (("gate", "W_gate"), ("in", "W_in"))}
        out = weight(mlp, "W_out")
        if out is None or matrices["in"] is None:
            raise InputError(f"{self}: {type(mlp).__name__} has no single W_in and W_out")
        _require_index(self, "neuron", self.index, out.shape[0])
        reads = {k: w[:, self.index][None] for k, w in matrices.items() if w is not None}
        return {**reads, "out": out[self.index][None]}

    def _expert_weights(self, model: TransformerBridge) -> Vectors:
        if self.expert is None:
            raise InputError(f"{self}: this block is a mixture of experts; give expert=")
        experts = batched_experts(model, f"{blocks_name(model, self.side)}.{self.layer}.mlp")
        if experts is None:
            raise InputError(f"{self}: the experts of this architecture are not batched matrices")
        down = experts_down(experts)
        _require_index(self, "expert", int(self.expert), down.shape[0])
        _require_index(self, "neuron", self.index, down.shape[1])
        reads = expert_reads(experts, int(self.expert), self.index, down.shape[1])
        return {**reads, "out": down[int(self.expert), self.index][None]}


@dataclass(frozen=True)
class Head(Unit):
    """One attention head.

    Its activation is the length of its value mixture ``z``: how much it moves, whatever it moves.

    Attributes:
        layer: block index, from 0.
        index: which (query) head.
        cross: of a decoder that attends to an encoder: the head that does.
        side: ``"encoder"`` or ``"decoder"``, of an encoder-decoder.

    Examples:
        >>> str(Head(5, 2))
        'blocks.5.attn.hook_z[2]'
        >>> Head(5, 2).writes(model)["out"].shape  # W_O of the head
        torch.Size([64, 576])
    """

    layer: int
    index: int
    cross: bool = False
    side: Side = "decoder"

    def __str__(self) -> str:
        stack = "encoder_blocks" if self.side == "encoder" else "blocks"
        name = "cross_attn" if self.cross else "attn"
        return f"{stack}.{self.layer}.{name}.hook_z[{self.index}]"

    def hook(self, model: TransformerBridge) -> str:
        name, attention = self._attention(model)
        out = weight(attention, "W_O", dims=3)
        size = int(model.cfg.n_heads) if out is None else out.shape[0]
        _require_index(self, "head", self.index, size)
        return f"{blocks_name(model, self.side)}.{self.layer}.{name}.hook_z"

    def activation(self, value: Tensor, routing: Routing | None = None) -> Tensor:
        if value.ndim < 3 or not 0 <= self.index < value.shape[-2]:
            raise InputError(
                f"{self}: hook_z is [batch, pos, head, d_head] with this head in it, "
                f"not {list(value.shape)}"
            )
        norms: Tensor = value[..., self.index, :].norm(dim=-1)
        return norms

    def writes(self, model: TransformerBridge) -> Vectors:
        """``"out"``: W_O of the head, [d_head, d_model]."""
        return {"out": self._matrix(model, "W_O", self.index)}

    def reads(self, model: TransformerBridge) -> Vectors:
        """``"q"``, ``"k"`` and ``"v"``, each [d_head, d_model].

        With grouped queries, ``k`` and ``v`` are those of the head's group.
        """
        _, attention = self._attention(model)
        out = weight(attention, "W_O", dims=3)
        vectors: Vectors = {}
        for name, matrix in (("q", "W_Q"), ("k", "W_K"), ("v", "W_V")):
            index = self.index
            value = weight(attention, matrix, dims=3)
            if out is not None and value is not None:
                _require_index(self, "head", self.index, out.shape[0])
                index //= out.shape[0] // value.shape[0]
            vectors[name] = self._matrix(model, matrix, index).T
        return vectors

    def _attention(self, model: TransformerBridge) -> tuple[str, Any]:
        block = block_of(model, self.layer, self.side)
        for name in ("cross_attn",) if self.cross else ("attn", "self_attn"):
            if getattr(block, "_modules", {}).get(name) is not None:
                return name, getattr(block, name)
        kind = "cross-attention" if self.cross else "attention"
        raise InputError(f"{self}: this block has no {kind} heads ({type(block).__name__})")

    def _matrix(self, model: TransformerBridge, name: str, index: int) -> Tensor:
        _, attention = self._attention(model)
        heads = weight(attention, name, dims=3)
        if heads is None:
            raise InputError(
                f"{self}: {type(attention).__name__} has no {name} of a single head "
                "(latent attention, or a projection that is not a matrix)"
            )
        size = heads.shape[0] if name in ("W_Q", "W_O") else self.index + 1
        _require_index(self, "head", self.index, size)
        return heads[index]


@dataclass(frozen=True, eq=False)
class Direction(Unit):
    """A direction of the residual stream, or of the activations at any hook point.

    Its activation is the dot product with ``vector``, as given: normalise it if you want a
    projection. It reads and writes the vector itself.

    Attributes:
        at: the hook point.
        vector: [features], of the width of the activations there.
        name: its name; without one, eight digits of the vector's SHA-256.

    Examples:
        >>> str(Direction("blocks.5.hook_resid_post", vector, "sentiment"))
        'blocks.5.hook_resid_post[direction sentiment]'
    """

    at: str
    vector: Float[Tensor, " features"] = field(repr=False)
    name: str | None = None

    def __str__(self) -> str:
        if self.name is not None:
            return f"{self.at}[direction {self.name}]"
        raw = self.vector.detach().cpu().double().numpy().tobytes()
        return f"{self.at}[direction {hashlib.sha256(raw).hexdigest()[:8]}]"

    def hook(self, model: TransformerBridge) -> str:
        return known_hook(model, self.at)

    def activation(self, value: Tensor, routing: Routing | None = None) -> Tensor:
        if value.shape[-1] != self.vector.shape[0]:
            raise InputError(
                f"{self}: the direction has {self.vector.shape[0]} components, "
                f"{self.at} has {value.shape[-1]}"
            )
        return value @ self.vector.to(value)

    def writes(self, model: TransformerBridge) -> Vectors:
        return {"out": _of_width(model, self, self.vector.detach())}

    def reads(self, model: TransformerBridge) -> Vectors:
        return {"in": _of_width(model, self, self.vector.detach())}


@dataclass(frozen=True)
class Feature(Unit):
    """One feature of a sparse autoencoder or transcoder.

    Its activation is the coder's; it reads a column of ``W_enc`` and writes a row of ``W_dec``.

    Attributes:
        coder, index: the `SparseCoder`, and which of its features.

    Raises:
        InputError: the coder has no such feature.

    Examples:
        >>> str(Feature(coder, 40))
        'blocks.5.hook_resid_post[sae 40]'
    """

    coder: SparseCoder
    index: int

    def __post_init__(self) -> None:
        size = self.coder.W_enc.shape[1]
        if not 0 <= self.index < size:
            raise InputError(f"feature is {self.index}, but {self.coder.name} has 0 to {size - 1}")

    def __str__(self) -> str:
        return f"{self.coder.hook}[{self.coder.name} {self.index}]"

    def hook(self, model: TransformerBridge) -> str:
        return known_hook(model, self.coder.hook)

    def activation(self, value: Tensor, routing: Routing | None = None) -> Tensor:
        return self.coder.encode(value)[..., self.index]

    def writes(self, model: TransformerBridge) -> Vectors:
        """``"out"``, its row of ``W_dec``; of a cross-layer transcoder, the sum over layers."""
        return {"out": _of_width(model, self, self.coder.writes(self.index))}

    def reads(self, model: TransformerBridge) -> Vectors:
        return {"in": _of_width(model, self, self.coder.W_enc[:, self.index])}


def require_unit(unit: Any) -> None:
    """Refuse what is no unit, such as its text or a node of a circuit.

    Raises:
        InputError: saying how a unit is made of it.
    """
    if not isinstance(unit, Unit):
        raise InputError(
            f"{unit!r} is no unit, such as Neuron(5, 17) or Head(5, 2): parse_unit(text) makes one "
            "of a text, and node.as_unit() of a node"
        )


def _require_index(unit: Neuron | Head, what: str, index: int, size: int) -> None:
    if not 0 <= index < size:
        raise InputError(f"{what} is {index}, but layer {unit.layer} has {what}s 0 to {size - 1}")


def _of_width(model: TransformerBridge, unit: Unit, vector: Tensor) -> Tensor:
    """[1, d_model], a vector of the residual stream, or an error."""
    if isinstance(unit, Feature) and unit.coder.heads is not None:
        raise InputError(f"{unit} is of heads' values, which are not the residual stream's")
    if len(vector) != (d_model := int(model.cfg.d_model)):
        raise InputError(f"{unit} has {len(vector)} components; the residual stream has {d_model}")
    return vector[None]

"""Steering: units scaled, added to, set, bounded or projected out while a model reads and writes.

Example:
    >>> happy = mean_difference(model, glad, sad, "blocks.12.hook_resid_post")
    >>> operations = [Scale(Neuron(17, 40), 0.0), Add(happy, 4.0, units="resid_rms")]
    >>> with steer(model, operations, prompt=[-1], generation="all"):
    ...     text = model.generate("I think that", max_new_tokens=20)

An operation moves the activation `a` of one unit (`lenslrp.analysis.units.kinds`), nothing else:
`x -> x + change(a) * step`, where `step` is a neuron's or channel's own entry, v / |v|^2 of a
direction v, z / |z| of a head, or a feature's decoder row times its coder's scale; so that the
activation (a feature's: what its decoder writes) is what it says. Each acts on what was left.
A transcoder's feature is read where its coder reads, and ``x`` is where the coder writes.

Positions are those of the text (`lenslrp.followed`), never of the pass: the same tokens are steered
with a KV cache and without, in a padded batch and alone, in every generation and every plain
forward pass anew. Padding is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.steering.encoded import FeatureMove, encoded_of
from lenslrp.analysis.steering.moves import moved, require_movable, step_length
from lenslrp.analysis.units.kinds import Direction, Feature, Unit
from lenslrp.analysis.units.locations import known_hook
from lenslrp.edits import Edit, edit_units
from lenslrp.errors import InputError
from lenslrp.followed import Positions, TrackedPasses, follow, positions
from lenslrp.inputs import is_encoder_decoder

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where an operation acts, if elsewhere than `steer` says.

    Attributes:
        rows: of the batch that the model sees; `None` for all.
        prompt, generation: as in `steer`; `None` for what is said there.
    """

    rows: tuple[int, ...] | None = None
    prompt: str | Sequence[int] | None = None
    generation: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for what in ("prompt", "generation"):
            chosen = getattr(self, what)
            if chosen is not None:
                object.__setattr__(self, what, positions(chosen, what))
        if self.rows is not None:
            object.__setattr__(self, "rows", tuple(self.rows))


class Operation(Scope):
    """What all operations can do."""

    def hook(self, model: TransformerBridge) -> str:
        """The hook point where it acts.

        Raises:
            InputError: a unit that the model lacks or that cannot be moved.
        """
        raise NotImplementedError

    def apply(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """The new activations at n positions, [n, ...]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Moving(Operation):
    """An operation on one unit's activation.

    Attributes:
        unit: a neuron, head, direction or feature.
    """

    unit: Unit

    def hook(self, model: TransformerBridge) -> str:
        require_movable(self.unit)
        if isinstance(self.unit, Feature):
            return known_hook(model, self.unit.coder.written_at)
        return self.unit.hook(model)

    def apply(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        a = self.unit.activation(x)
        return moved(self.unit, x, a, self.change(a, x))

    def change(self, a: Tensor, x: Tensor) -> Tensor:
        """What is added to the activation `a` that was read from `x`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Scale(Moving):
    """The activation times `factor`: 0 switches off, 1 changes nothing, to the last bit.

    Attributes:
        factor: of the activation.

    Examples:
        >>> neuron = Neuron(0, 1)
        >>> Scale(neuron, 0.5).apply(torch.tensor([[1.0, 4.0, 2.0]]))
        tensor([[1., 2., 2.]])
    """

    factor: float

    def change(self, a: Tensor, x: Tensor) -> Tensor:
        return (self.factor - 1) * a


@dataclass(frozen=True)
class Add(Moving):
    """`amount` added; 0 changes nothing, to the last bit.

    Attributes:
        amount: how much.
        units: `"raw"`: to the activation of a neuron, head or feature; of a direction, `amount`
            times its vector is added. `"resid_rms"`, for directions and features: a step along the
            vector, whatever its length, of `amount` times the root mean square of the entries of
            `x` at that position. (The length of `x` is sqrt(d_model) times that.)

    Raises:
        InputError: other units, or `"resid_rms"` of a unit whose hook point is not the stream.

    Examples:
        >>> direction = Direction("blocks.0.hook_resid_post", torch.tensor([0.0, 2.0]))
        >>> Add(direction, 3.0).apply(torch.tensor([[1.0, 1.0]]))
        tensor([[1., 7.]])
    """

    amount: float
    units: str = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units not in ("raw", "resid_rms"):
            raise InputError(f"units is 'raw' or 'resid_rms', not {self.units!r}")
        if self.units == "resid_rms" and not isinstance(self.unit, Direction | Feature):
            raise InputError(
                f"units='resid_rms' is for directions and features, not for {self.unit}, whose "
                "hook point is not the residual stream: written_by(model, neuron) is a direction"
            )

    def change(self, a: Tensor, x: Tensor) -> Tensor:
        if self.units == "resid_rms":
            scale: Tensor | float = 1.0
            if isinstance(self.unit, Feature):
                x = self.unit.coder.flat_output(x)
                scale = self.unit.coder.denormalizer(x)[1][..., 0]
            rms = x.detach().float().square().mean(dim=-1).sqrt().to(x)
            return self.amount * rms / (scale * step_length(self.unit))
        direction = isinstance(self.unit, Direction)
        return torch.full_like(
            a, self.amount / step_length(self.unit) ** 2 if direction else self.amount
        )


@dataclass(frozen=True)
class Ablate(Moving):
    """The activation set to `value`.

    Attributes:
        value: 0, or the unit's mean over a text (`mean_activation`).

    Examples:
        >>> Ablate(Neuron(0, 1), 5.0).apply(torch.tensor([[1.0, 4.0, 2.0]]))
        tensor([[1., 5., 2.]])
    """

    value: float = 0.0

    def change(self, a: Tensor, x: Tensor) -> Tensor:
        return self.value - a


@dataclass(frozen=True)
class Clamp(Moving):
    """The activation kept between `low` and `high`.

    Attributes:
        low, high: bounds of the activation; `None` leaves that end open.

    Raises:
        InputError: no bound, or `low` above `high`.

    Examples:
        >>> Clamp(Neuron(0, 1), high=3.0).apply(torch.tensor([[1.0, 4.0, 2.0]]))
        tensor([[1., 3., 2.]])
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low is None and self.high is None:
            raise InputError("Clamp needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InputError(f"Clamp from {self.low} to {self.high}: low is above high")

    def change(self, a: Tensor, x: Tensor) -> Tensor:
        bound = a.detach().clamp(self.low, self.high)
        return torch.where(bound == a, 0.0, -a + bound)


@dataclass(frozen=True)
class ProjectOut(Operation):
    """What lies in the span of some directions of one hook point, removed (Arditi et al. 2024).

    Attributes:
        directions: one or several.

    Raises:
        InputError: no directions, or directions of several hook points.

    Examples:
        >>> direction = Direction("blocks.0.hook_resid_post", torch.tensor([0.0, 2.0]))
        >>> ProjectOut((direction,)).apply(torch.tensor([[1.0, 1.0]]))
        tensor([[1., 0.]])
    """

    directions: tuple[Direction, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.directions
        directions = (given,) if isinstance(given, Direction) else tuple(given)
        if not directions or not all(isinstance(d, Direction) for d in directions):
            raise InputError("ProjectOut takes one Direction or several")
        if len({d.at for d in directions}) > 1:
            raise InputError(
                f"ProjectOut takes directions of one hook point, not of "
                f"{', '.join(sorted({d.at for d in directions}))}"
            )
        object.__setattr__(self, "directions", directions)

    def hook(self, model: TransformerBridge) -> str:
        for direction in self.directions:
            require_movable(direction)
        return self.directions[0].hook(model)

    def apply(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        basis = self._basis.to(x)
        if x.shape[-1] != len(basis):
            self.directions[0].activation(x)  # which says what is wrong
        return x - (x @ basis) @ basis.mT

    @cached_property
    def _basis(self) -> Float[Tensor, "features rank"]:
        vectors = torch.stack([d.vector.detach().double() for d in self.directions], dim=1)
        left, sizes, _ = torch.linalg.svd(vectors, full_matrices=False)
        basis: Tensor = left[:, sizes > sizes[0] * 1e-6]
        return basis


@dataclass(frozen=True)
class Steering:
    """Operations, and where they act: what `steer` takes and what files hold.

    Attributes:
        operations: in the order in which they act.
        prompt: positions of the prompt: `"all"`, `"none"`, or integers; negative ones count from
            its end, padding is not counted.
        generation: positions after the prompt, the first generated token being 0.
    """

    operations: tuple[Operation, ...]
    prompt: str | Sequence[int] = "all"
    generation: str | Sequence[int] = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))
        object.__setattr__(self, "prompt", positions(self.prompt, "prompt"))
        object.__setattr__(self, "generation", positions(self.generation, "generation"))


@contextmanager
def steer(
    model: TransformerBridge,
    operations: Steering | Operation | Iterable[Operation],
    *,
    prompt: str | Sequence[int] = "all",
    generation: str | Sequence[int] = "all",
) -> Iterator[None]:
    """Steer every forward pass inside the context; leave nothing behind, however it ends.

    Works with `forward`, `run_with_cache`, `generate`, `generate_stream`, `hf_generate` and
    `lenslrp.run_with_relevance`, in batches padded on either side. A generation begins with the
    first pass of these methods; outside them, a pass with a cache goes on with the text whose cache
    it is given. A pass without is a prompt.

    Args:
        model: a `TransformerBridge` of a decoder.
        operations: one, several, or a `Steering`, whose positions then hold.
        prompt, generation: see `Steering`. Note that the *first* generated token is chosen at the
            last position of the prompt: with `prompt="none"` it is that of the base model.

    Raises:
        InputError: what is no operation; units that the model lacks or that cannot be moved; in
            the forward pass, rows or positions out of range; at the end, a hook point that never
            fired.

    Examples:
        >>> with steer(model, [Scale(Neuron(17, 40), 0.0)]):
        ...     logits = model("I think that")
    """
    if not isinstance(operations, Steering):
        given = tuple(operations) if isinstance(operations, Iterable) else (operations,)
        for each in given:
            if not isinstance(each, Operation):
                raise InputError(f"{each} is no operation, such as Scale(unit, 0.0)")
        operations = Steering(given, prompt, generation)
    elif (prompt, generation) != ("all", "all"):
        raise InputError("a Steering says where it acts: give prompt and generation there")
    if is_encoder_decoder(model):
        raise InputError("steering is of decoders' texts; this model is an encoder-decoder")
    by_hook: dict[str, list[tuple[Operation, Step]]] = {}
    read = set[str]()
    encoded = encoded_of(model)
    for operation in operations.operations:
        hooks = [operation.hook(model)]
        step: Step = partial(_apply, operation)
        if isinstance(operation, Moving) and isinstance(feature := operation.unit, Feature):
            if not feature.coder.writes_back:
                step = FeatureMove(operation, feature, encoded).apply
                read.add(feature.hook(model))
            hooks += [known_hook(model, hook) for hook in feature.coder.later]
        for hook in hooks:
            by_hook.setdefault(hook, []).append((operation, step))
    with follow(model) as passes:
        edits = [
            Edit(hook, function=_changed(hook, at_hook, operations, passes))
            for hook, at_hook in by_hook.items()
        ]
        with edit_units(model, edits), encoded.reading(model, read):
            yield


Step = Callable[[Tensor, Tensor, str], Tensor]
"""Of a tensor, the positions where an operation acts, and the hook point: what is there after."""


def _apply(operation: Operation, y: Tensor, where: Tensor, hook: str) -> Tensor:
    return operation.apply(y[where])


def _changed(
    hook: str,
    steps: list[tuple[Operation, Step]],
    steering: Steering,
    passes: TrackedPasses,
) -> Callable[[Tensor], Tensor]:
    def chosen_by(what: str, operation: Operation) -> Positions:
        scope = getattr(operation, what)
        return positions(getattr(steering, what) if scope is None else scope, what)

    places = [
        (chosen_by("prompt", each), chosen_by("generation", each), each.rows) for each, _ in steps
    ]

    def change(x: Tensor) -> Tensor:
        chosen = [passes.chosen(*place) for place in places]
        batch, length = chosen[0].shape
        flat = x.ndim == 2 and len(x) == batch * length  # OPT's MLPs
        if not flat and (x.ndim < 3 or x.shape[:2] != (batch, length)):
            raise InputError(
                f"{hook} is {list(x.shape)}; steering needs [batch={batch}, pos={length}, ...]"
            )
        y = x.clone()
        for (_, step), where in zip(steps, chosen, strict=True):
            where = where.flatten() if flat else where
            y[where] = step(y, where, hook)
        return y

    return change

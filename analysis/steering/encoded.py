"""Features that are read at one hook point and moved at others: those of transcoders.

The activation is that of the pass itself, of what the coder reads once everything else that changes
it has acted. What an operation adds to it is written where the coder writes: at its own layer and,
of a cross-layer transcoder, at every later one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.kinds import Feature
from lenslrp.errors import InputError
from lenslrp.forward import reading

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.steering.operations import Moving


class Encoded:
    """Activations in the pass that is going on: nested contexts act on what others left."""

    def __init__(self) -> None:
        self._hooks: set[str] = set()  # where coders of the contexts that are open read
        self._read: dict[str, Tensor] = {}
        self._activations: dict[SparseCoder, Tensor] = {}
        self._moved: dict[Feature, Tensor] = {}

    def of(self, feature: Feature) -> Tensor:
        """The activation so far, [batch, pos], or flat where the model flattens what is read.

        Raises:
            InputError: the coder writes before it reads.
        """
        coder = feature.coder
        if coder.hook not in self._read:
            raise InputError(
                f"{coder.name} writes at {coder.written_at}, which runs before {coder.hook}, that "
                "it reads"
            )
        if coder not in self._activations:
            self._activations[coder] = coder.encode(self._read[coder.hook])
        return self._moved.get(feature, self._activations[coder][..., feature.index])

    def moved(self, feature: Feature, activation: Tensor) -> None:
        """Say what an operation has made of it."""
        self._moved[feature] = activation

    @contextmanager
    def reading(self, model: TransformerBridge, hooks: set[str]) -> Iterator[None]:
        """Read what coders are given in every pass: after this context's edits, and the outer's."""
        around, self._hooks = self._hooks, self._hooks | hooks
        try:
            if self._hooks:
                read = {hook: partial(self._note, hook) for hook in self._hooks}
                with reading(model, read):
                    yield
            else:
                yield
        finally:
            self._hooks = around
            self._forget(self._hooks | hooks)

    def _note(self, hook: str, x: Tensor) -> None:
        self._forget({hook})
        self._read[hook] = x

    def _forget(self, hooks: set[str]) -> None:
        self._read = {hook: x for hook, x in self._read.items() if hook not in hooks}
        self._activations = {c: a for c, a in self._activations.items() if c.hook not in hooks}
        self._moved = {f: a for f, a in self._moved.items() if f.coder.hook not in hooks}


_encoded: WeakKeyDictionary[TransformerBridge, Encoded] = WeakKeyDictionary()


def encoded_of(model: TransformerBridge) -> Encoded:
    """What the contexts of one model share."""
    return _encoded.setdefault(model, Encoded())


@dataclass(eq=False)
class FeatureMove:
    """One operation on a feature, wherever the feature is written.

    Attributes:
        operation, encoded: what is done, and to which activations.
        change: [batch, pos], what it adds to the activation in this pass.
    """

    operation: Moving
    feature: Feature
    encoded: Encoded
    change: Tensor = field(init=False)

    def apply(self, y: Tensor, where: Tensor, hook: str) -> Tensor:
        """The new tensor at a hook point, where ``where`` says.

        Args:
            y: [..., d_out], all of it.
            where: which positions, in the shape of ``y`` but for its last axis.
            hook: one of those where the coder writes, its own layer's first.
        """
        coder = self.feature.coder
        if hook == coder.written_at:
            a = self.encoded.of(self.feature).reshape(where.shape)
            self.change = torch.zeros_like(a)
            self.change[where] = self.operation.change(a[where], y[where])
            self.encoded.moved(self.feature, a + self.change)
        change = self.change.reshape(where.shape)[where]
        return coder.moved(y[where], self.feature.index, change, hook)

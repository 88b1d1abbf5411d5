"""A target inside the model: one unit's activation, from which relevance goes down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lenslrp.batch import PAIRED
from lenslrp.errors import InputError
from lenslrp.logits import Outputs


@dataclass(frozen=True)
class Activation:
    """A latent unit: the activation at a hook point, instead of an output.

    Its value, and the relevance of everything below it, are in the unit of that activation.

    Args:
        hook: hook point name, such as ``"blocks.5.mlp.hook_post"``.
        unit: index into the features, or a tuple of them (head, feature). At ``attn.hook_pattern``
            and ``attn.hook_attn_scores``: (head, key), where the key is a position, too.
        position: which token, of the hook point's own sequence: an encoder's hook counts what the
            encoder read. At a pattern or scores: the query.

    Examples:
        >>> neuron = targets.Activation("blocks.5.mlp.hook_post", 17, position=-1)
        >>> weight = targets.Activation("blocks.5.attn.hook_pattern", (3, 0))  # head 3, key 0
        >>> lenslrp.run_with_relevance(model, text, neuron)[1].target.text
        'activation of blocks.5.mlp.hook_post[17] at position -1'
    """

    hook: str
    unit: int | tuple[int, ...]
    position: int = -1

    def columns(self, outputs: Outputs) -> Int[Tensor, "batch n"]:
        """It reads no logits; the last position's are as good as any."""
        return outputs.at(-1)[:, None]

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The unit's activation in each row.

        Raises:
            InputError: a unit or a position that the hook point does not have.
        """
        x = outputs.activation(self.hook)
        unit = self.unit if isinstance(self.unit, tuple) else (self.unit,)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in unit):
            raise InputError(f"unit is an index or a tuple of them, not {self.unit!r}")
        if x.ndim == 4 and self.hook.endswith(PAIRED):
            return self._entry(outputs, x, unit)
        if x.ndim > 2 or len(unit) != x.ndim - 1:  # what is pooled has no positions
            x = outputs.batch.of(self.hook, x).picked(x, self.position)
        elif self.position != -1:
            raise InputError(f"{self.hook} is pooled and has no position {self.position}")
        if len(unit) != x.ndim - 1:
            raise InputError(
                f"{self.hook} has features of shape {tuple(x.shape[1:])}; unit {self.unit!r} does "
                "not pick one of them"
            )
        for index, size in zip(unit, x.shape[1:], strict=True):
            if not -size <= index < size:
                raise InputError(f"unit {self.unit!r} is outside {self.hook}, {tuple(x.shape[1:])}")
        picked: Any = (slice(None), *unit)
        return x[picked]

    def _entry(self, outputs: Outputs, x: Tensor, unit: tuple[int, ...]) -> Tensor:
        """One entry of a pattern or of scores [batch, head, query, key]."""
        if len(unit) != 2:
            raise InputError(
                f"{self.hook} is [batch, head, query, key]: unit is (head, key) and position the "
                f"query; unit {self.unit!r} does not pick one entry"
            )
        head, key = unit
        if not -x.shape[1] <= head < x.shape[1]:
            raise InputError(f"unit {self.unit!r}: {self.hook} has {x.shape[1]} heads")
        queries = outputs.batch.of(self.hook, x, axis=2).picked(x[:, head], self.position)
        return outputs.batch.of(self.hook, x, axis=3).picked(queries, key)

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        return f"activation of {self.hook}[{self.unit}] at position {self.position}"

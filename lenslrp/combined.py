"""Targets made of targets: a sum of several, and one for each row of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenslrp.errors import InputError
from lenslrp.latent import Activation
from lenslrp.logits import Outputs, Target, columns_read


@dataclass(frozen=True)
class Sum:
    """The sum of several targets on the logits: a span, by its start and its end.

    Args:
        targets: two or more, each as it would be given alone.
        weights: a factor for each, if not all are 1; then one target is enough.

    Raises:
        InputError: fewer, something that is no target, or one that is not on logits at positions
            of the text as it is (``Activation``, ``Custom``, ``Sequence``, ``PerRow``); weights
            that are not one finite number a target.

    Examples:
        >>> span = targets.Sum((targets.Logit("start", 3), targets.Logit("end", 5)))
        >>> lenslrp.run_with_relevance(question_answerer, tokens, span)[1].target.text
        "logit of 'start' at position 3 + logit of 'end' at position 5"
    """

    targets: tuple[Target, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        fewest = 2 if self.weights is None else 1
        if not isinstance(self.targets, tuple | list) or len(self.targets) < fewest:
            raise InputError(f"a Sum is of two targets or more, not {self.targets!r}")
        for part in self.targets:
            other = isinstance(part, Activation | PerRow | type) or hasattr(part, "ids")
            if other or not isinstance(part, Target) or not hasattr(part, "columns"):
                raise InputError(f"a Sum is of targets on logits at a position, not {part!r}")
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.weights is None:
            return
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.weights) != len(self.targets) or not all(map(math.isfinite, self.weights)):
            raise InputError(
                f"weights of a Sum are one finite number for each of its {len(self.targets)} "
                f"targets, not {self.weights!r}"
            )

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """The (weighted) sum of the targets' values in each row."""
        values = torch.stack([part.values(outputs) for part in self.targets])
        if self.weights is not None:
            values = values * values.new_tensor(self.weights)[:, None]
        return values.sum(dim=0)

    def columns(self, outputs: Outputs) -> Int[Tensor, "batch n"]:
        """Where its parts read the logits."""
        columns = [columns_read(part, outputs) for part in self.targets]
        return torch.cat([part for part in columns if part is not None], dim=1)

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        texts = [part.text(outputs) for part in self.targets]
        if self.weights is not None:
            texts = [f"{w:.4g} x {text}" for w, text in zip(self.weights, texts, strict=True)]
        return " + ".join(texts)


@dataclass(frozen=True)
class PerRow:
    """One target for each batch row, which sees that row only; a list of targets becomes one.

    Args:
        targets: one for each row.
    """

    targets: tuple[Target, ...]

    def values(self, outputs: Outputs) -> Float[Tensor, " batch"]:
        """Each target's value in its own row."""
        values = [target.values(outputs.row(row))[0] for row, target in enumerate(self.targets)]
        return torch.stack([value.to(values[0].device) for value in values])

    def columns(self, outputs: Outputs) -> Int[Tensor, "batch n"] | None:
        """Where its parts read the logits; ``None`` where one of them reads them all."""
        rows = [columns_read(part, outputs.row(row)) for row, part in enumerate(self.targets)]
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):
            return None
        most = max(row.shape[1] for row in known)
        alike = [torch.cat([row, row[:, -1:].expand(-1, most - row.shape[1])], 1) for row in known]
        return torch.cat(alike)

    def text(self, outputs: Outputs) -> str:
        """What a cache says was explained."""
        return "; ".join(t.text(outputs.row(row)) for row, t in enumerate(self.targets))


def parts_of(target: Target) -> tuple[Target, ...]:
    """The targets of the single rows; a target for all rows is its own only part."""
    return target.targets if isinstance(target, PerRow) else (target,)

"""Whether there is a behaviour to explain: warnings where the model does not do the task."""

from __future__ import annotations

import warnings

from jaxtyping import Bool
from torch import Tensor


class TaskWarning(UserWarning):
    """The clean run does not prefer the answer: in these pairs there is no behaviour to explain."""


def warn_of_failures(correct: Bool[Tensor, " pair"], *, stacklevel: int = 3) -> None:
    """Say in how many pairs the clean run does not prefer the answer, if in any."""
    failed = int((~correct).sum())
    if failed:
        warnings.warn(
            f"the model does not do the task in {failed} of {len(correct)} pairs: the clean run "
            "does not prefer the answer there. Keep the others with pairs[pairs.correct(model)]",
            TaskWarning,
            stacklevel=stacklevel,
        )

"""Joint projections (queries, keys and values; gate and up) that are no plain weight.

TransformerLens splits the weight of a joint projection and calls the parts. There is no weight to
split where it is packed, or where an adapter adds to it. Then the parts are rows of what the joint
layer returns: q, k, v, gate and in keep their hook points, and the joint layer runs once for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lenslrp.hooks.adapted import base_of
from lenslrp.hooks.packed import is_packed_linear


class JointRows(nn.Module):
    """Some rows of the output of a joint linear layer, which is kept past ``nn.Module``."""

    rows: Tensor

    def __init__(self, joint: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.__dict__["joint"] = joint
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        joint: Any = self.joint
        y: Tensor = joint(x)
        return y.index_select(-1, self.rows.to(y.device))


def splits(joint: Any) -> bool:
    """Whether a joint layer has a plain weight, which can be split."""
    return base_of(joint) is None and not is_packed_linear(joint)


class _StandIn(nn.Module):
    weight: nn.Parameter
    bias: nn.Parameter


def stand_in(joint: nn.Module) -> nn.Module:
    """A plain layer of the same shape, each of whose rows holds its number; [out, in] or [in, out].

    What is split from it says which rows are whose.
    """
    base: Any = base_of(joint) or joint
    # bitsandbytes' layers say what they were made of.
    transposed = isinstance(base, Conv1D) or getattr(base, "source_cls", None) is Conv1D
    out, into = (base.nf, base.nx) if hasattr(base, "nf") else (base.out_features, base.in_features)
    rows = torch.arange(out, dtype=torch.float32)
    made = _StandIn()
    weight = rows.expand(into, out) if transposed else rows[:, None].expand(out, into)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = nn.Parameter(rows.clone(), requires_grad=False)
    return made


def rows_of(parts: Any, joint: nn.Module) -> tuple[JointRows, ...]:
    """The parts that were split from a stand-in, as rows of the joint layer itself.

    Raises:
        ValueError: a part is no selection of rows.
    """
    made = []
    for part in parts:
        numbers = part.weight[:, 0]
        if not torch.equal(numbers[:, None].expand_as(part.weight), part.weight):
            raise ValueError("a part of this joint projection is not made of whole rows of it")
        made.append(JointRows(joint, numbers.detach().long()))
    return tuple(made)

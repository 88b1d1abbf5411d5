"""Convolutions under a rule for linear layers: gamma, z+, alpha-beta, or a user's own.

A convolution is one linear layer applied to every window of its input. So the input is unfolded
into windows, [batch, *places, channel * kernel], the rule of the linear layer is applied to each,
and what it hands to the windows is folded back. Unfolding is linear: autograd's way back through it
sums over the windows in which an input lies, as relevance does ([A] Eq. 24, window by window).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lenslrp.hooks import functions as F
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.linear_rules import LinearRule
from lenslrp.hooks.sites import Site

CONVOLUTION_CLASSES: tuple[type, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def unfold_windows(x: Tensor, module: Any) -> Tensor:
    """What each place of a convolution's output looks at.

    Args:
        x: [batch, channel, *size].
        module: an ``nn.Conv1d``, ``Conv2d`` or ``Conv3d``.

    Returns:
        [batch, *places, channel, *kernel].
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    rank = len(module.kernel_size)
    for axis, size in enumerate(module.kernel_size):
        step, spread = module.stride[axis], module.dilation[axis]
        x = x.unfold(2 + axis, spread * (size - 1) + 1, step)[..., ::spread]
    return x.movedim(1, 1 + rank)


def attach_convolution(at: Attached, module: Any, rule: LinearRule, site: Site) -> None:
    """Put ``rule`` in the place of a convolution, group by group."""
    rank = len(module.kernel_size)

    def apply(x: Tensor, y: Tensor) -> Tensor:
        unfolded = unfold_windows(x, module)
        places = tuple(unfolded.shape[: 1 + rank])
        outputs = y.movedim(1, -1)
        groups = []
        ins, outs = module.in_channels // module.groups, module.out_channels // module.groups
        for group in range(module.groups):
            into = unfolded.narrow(1 + rank, group * ins, ins).reshape(*places, -1)
            out = slice(group * outs, (group + 1) * outs)
            weight = module.weight[out].flatten(1)
            bias = None if module.bias is None else module.bias[out]
            part = F.apply(F.Linear, into, outputs[..., out], weight, bias, rule, site)
            groups.append(part.movedim(-1, 1))  # the layout in memory stays the convolution's own
        return groups[0] if len(groups) == 1 else torch.cat(groups, dim=1)

    at.wrap(module, apply)

"""Linear layers whose weight is not there to be read: quantised ones, and ones made of parts.

A quantised layer keeps its weight packed (integers and scales, 4 bits to a number) and unpacks it
where it multiplies; some also round what they multiply it by. Its backward pass is the package's
own, if there is one. Every linear layer is ``y = x W^T + b``, though, and that is all that a rule
needs. So the layer runs as it is, apart from the graph, and the rule stands in its place: W is
unpacked in the backward pass, for one layer at a time, and dropped again.

W is what the package says it is, as far as the layer agrees: columns of it are compared with what
the layer gives for unit vectors. Where nobody says, or the layer disagrees, it is read off a whole
identity matrix. A layer that then is something else than ``x W^T + b`` for its real input is
refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lenslrp.errors import InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.checks import TOLERANCE
from lenslrp.hooks.constants import measure_bias
from lenslrp.hooks.context import Context
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.linear_rules import LinearRule
from lenslrp.hooks.sites import has_values, state_of

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

PACKING_PACKAGES = ("bitsandbytes.", "torchao.")
"""Packages whose layers compute what they say, up to rounding of their own."""

PROBES = 8
"""How many columns of an unpacked weight are compared with what the layer computes."""

Run = Callable[[Tensor], Tensor]


def unpacks_itself(weight: Tensor) -> bool:
    """Whether a weight is a tensor of another class, which knows what it stands for."""
    return type(weight).dequantize is not Tensor.dequantize


def is_packed(weight: Any) -> bool:
    """Whether the numbers of a weight are not those that it stands for."""
    return isinstance(weight, Tensor) and (
        weight.dtype not in FLOATING
        or hasattr(weight, "quant_state")  # bitsandbytes may keep 4-bit numbers in a float type
        or unpacks_itself(weight)
    )


def stored_numbers(weight: Tensor) -> Tensor:
    """What tells a weight from another: its numbers, unpacked where a tensor unpacks itself."""
    return weight.dequantize() if unpacks_itself(weight) else weight.detach()


def is_packed_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one with a packed weight, and can say how it is unpacked."""
    if not isinstance(layer, nn.Linear | Conv1D):
        return False
    return unpacks_itself(layer.weight) or type(layer).__module__.startswith(PACKING_PACKAGES)


def rounds_its_input(layer: nn.Module) -> bool:
    """Whether a packed layer computes in fewer digits than its input has."""
    weight: Any = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    return (
        type(layer).__name__ == "Linear8bitLt"
        or getattr(layer, "compute_dtype", None) in (torch.bfloat16, torch.float16)
        or bool(getattr(state, "packing_format_for_cpu", False))
        or getattr(weight, "act_quant_kwargs", None) is not None
    )


def attach_unpacked(
    at: Attached,
    ctx: Context,
    path: str,
    layer: nn.Module,
    role: str,
    rule: Any,
    *,
    meters: bool = True,
) -> None:
    """Put a rule in the place of a linear layer whose weight has to be unpacked for it.

    ``meters``: account for the bias under epsilon; otherwise the layer around it does.

    Raises (when the layer runs):
        InputError: the layer is not linear.
    """
    site = ctx.site(path, layer, role, rule)
    site.cut = ctx.cuts(path.removesuffix(".base_layer"))
    at.sites.append(site)
    known = is_packed_linear(layer) and any(
        type(of).__module__.startswith(PACKING_PACKAGES) for of in (layer, layer.weight)
    )
    packed = PackedLayer(path, layer, layer.forward, known)
    ruled = isinstance(rule, LinearRule)

    def apply(x: Tensor, y: Tensor) -> Tensor:
        rounded = packed.rounds(x, y)
        keeps = ruled or (rounded and site.accounts is not None)
        bias = packed.bias(x)
        out = F.apply(F.Unpacked, x, y, packed.weight, bias, rule, keeps, meters, site)
        if meters and not keeps and site.accounts is not None:
            measure_bias(out, bias, site)
        return out

    at.wrap(layer, apply)


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A linear layer seen from outside.

    Attributes:
        path: its name, for messages.
        layer: the module.
        run: its forward pass, past any rule.
        known: its code is one of `PACKING_PACKAGES`, tried once and trusted afterwards.
    """

    path: str
    layer: Any
    run: Run
    known: bool

    def bias(self, x: Tensor) -> Tensor | None:
        """What it gives for an input of zeros, [out]; ``None`` where it has no bias."""
        if self.known:
            bias: Tensor | None = self.layer.bias
            return None if bias is None else bias.detach().to(x.dtype)
        with torch.no_grad():
            return self.run(x.new_zeros(1, x.shape[-1]))[0]

    def weight(self, x: Tensor) -> Tensor:
        """[out, in], in the type of an input ``x`` [..., in]."""
        with torch.no_grad():
            weight = _unpacked(self.layer, x.dtype) if _forms[self.layer].unpacks else None
            if weight is not None:
                return weight.to(x.dtype)
            return self._columns(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))

    def rounds(self, x: Tensor, y: Tensor) -> bool:
        """Whether ``y`` is the product only up to a rounding that its type does not ask for.

        Raises:
            InputError: it is no product.
        """
        if not has_values(x):
            return False
        state = (x.dtype, *_state(self.layer))
        form = _forms.get(self.layer)
        if self.known and form is not None and form.state == state:
            return form.rounds
        if getattr(self.layer, "out_features", y.shape[-1]) != y.shape[-1]:
            raise self._refusal()  # a layer of groups, each with a weight of its own
        with torch.no_grad():
            x, y = x.detach(), y.detach()
            _forms[self.layer] = form = _Form(state, self._agrees(x))
            weight, bias = self.weight(x), self.bias(x)
            product = x @ weight.T if bias is None else x @ weight.T + bias.to(x.dtype)
            exact = _apart(product, y) <= TOLERANCE[y.dtype]
        if not exact and not self.known:
            raise self._refusal()
        form.rounds = not exact
        return form.rounds

    def _refusal(self) -> InputError:
        return InputError(
            f"{self.path} is a {type(self.layer).__name__}, which does not compute x W^T + b: "
            "no rule for linear layers holds for it"
        )

    def _agrees(self, x: Tensor) -> bool:
        """Whether the layer computes with the weight that its package unpacks."""
        weight = _unpacked(self.layer, x.dtype) if is_packed_linear(self.layer) else None
        if weight is None or weight.shape[-1] != x.shape[-1]:
            return False
        size = x.shape[-1]
        chosen = torch.linspace(0, size - 1, min(PROBES, size), device=x.device).long()
        units = nn.functional.one_hot(chosen, size).to(x.dtype)
        columns = self._columns(units)
        # The layer may compute in bfloat16.
        return _apart(columns, weight[:, chosen].to(x.dtype)) <= TOLERANCE[torch.bfloat16]

    def _columns(self, units: Tensor) -> Tensor:
        """The columns of the weight for unit vectors, [out, n]."""
        return (self.run(units) - self.run(torch.zeros_like(units[:1]))).T


@dataclass
class _Form:
    """What was seen of a layer: with which weight, whether its package unpacks that, and whether
    it rounds."""

    state: tuple[Any, ...]
    unpacks: bool
    rounds: bool = False


_forms: WeakKeyDictionary[nn.Module, _Form] = WeakKeyDictionary()


def _state(layer: Any) -> tuple[int, ...]:
    weight = getattr(layer, "weight", None)
    return () if weight is None else (id(weight), *state_of(weight))


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    difference = (a - b).abs().nan_to_num().max()  # what a padded row computes is nobody's input
    return float(difference / b.abs().nan_to_num().max().clamp_min(torch.finfo(b.dtype).tiny))


def _unpacked(layer: Any, dtype: torch.dtype) -> Tensor | None:
    """The weight as its package unpacks it; ``None`` where that does not hold for this layer."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        if getattr(state, "packing_format_for_cpu", False):
            return None  # repacked for a kernel of inference, which has no way back
        state = copy.copy(state)
        state.dtype = layer.compute_dtype or dtype  # in which the layer unpacks it
        four_bits: Tensor = dequantize_4bit(weight.data, state)
        return four_bits
    if type(layer).__name__ == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        packed, scale = (
            getattr(weight, name, None) if getattr(weight, name, None) is not None
            else getattr(layer.state, name, None)
            for name in ("CB", "SCB")
        )  # fmt: skip
        if packed is None or scale is None:
            return None
        eight_bits: Tensor = int8_vectorwise_dequant(packed, scale)
        return eight_bits
    if unpacks_itself(weight):
        unpacked: Tensor = weight.dequantize()
        return unpacked
    return None

"""Raw operations inside a module that has no component for each of them: a rule for every one.

Mixtures of experts, routers and gated modules multiply, activate and normalise in plain Python,
with no hook point between. While a module that is *declared* runs (by :mod:`lenslrp.hooks.experts`,
by :mod:`lenslrp.hooks.declared`, or by a user's ``composite.extended({Class: Operations()})``),
each such operation is intercepted where it happens:

* a product of two factors that both carry relevance: a share to each ([A] Prop. 3.2-3.3), by the
  role ``router`` where one factor is a single number for each position (``recurrence`` where the
  numbers mix residual streams), by the module's own role otherwise;
* an element-wise activation, or a clip that leaves 0 as it is: the identity rule ([A] Eq. 9);
* a softmax, sigmoid, softplus or division of a router or gate: the plain gradient, whose leak is
  the ledger's ``softmax`` term;
* a matrix product of two factors: the rules for the products of attention;
* a constant that is added: its share is a bias's.

Only the module's own code is intercepted. What its sub-modules compute has rules of their own, or
none: an unknown one stays on the graph and is refused there. The arithmetic is the module's own,
call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lenslrp.errors import InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.attention_functions import Pattern
from lenslrp.hooks.constants import measure_bias
from lenslrp.hooks.context import Context
from lenslrp.hooks.declared import ROUTER_SPEC
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.intercept import MATRIX_PRODUCT_FUNCTIONS, SUM_FUNCTIONS, Intercept
from lenslrp.hooks.linear_rules import Epsilon, LinearRule
from lenslrp.hooks.rule_types import (
    Operations,
    Softmax,
    SoftmaxRule,
    SoftmaxTemperature,
    product_shares,
)
from lenslrp.hooks.sites import Site, row_sums
from lenslrp.hooks.view_writes import note_write

ACTIVATION_FUNCTIONS = frozenset(
    {"silu", "gelu", "relu", "leaky_relu", "elu", "tanh", "mish", "hardswish"}
)
ACTIVATION_MODULES = frozenset({"torch.nn.modules.activation", "transformers.activations"})
PRODUCT_FUNCTIONS = frozenset({"mul", "__mul__", "__rmul__", "multiply"})
DIVISIONS = frozenset({"div", "__truediv__", "true_divide"})
IN_PLACE_FUNCTIONS = {
    **{f"{name}_": name for name in sorted(ACTIVATION_FUNCTIONS | {"div", "mul"})},
    "__imul__": "mul",
    "__itruediv__": "div",
}
"""Functions that write their result to their first argument -> those that give it."""
DIFFERENCE_FUNCTIONS = frozenset({"sub", "__sub__", "sub_", "__isub__"})
CONVOLUTION_FUNCTIONS = frozenset({"conv1d", "conv2d"})
JOIN_FUNCTIONS = frozenset({"cat", "concat", "concatenate"})
LEAKING_FUNCTIONS = frozenset({"softmax", "sigmoid", "softplus", "sqrt"})
CLIPS = frozenset({"clamp"})
OWN_CODE = frozenset({"SqrtSoftplusActivation"})
"""Classes of sub-modules that are but a function, which is no activation: 0 is not 0 there."""


class OperationIntercept(Intercept):
    """Intercepts the raw operations of one module while it runs.

    Args:
        sites: the module's sites by role, see :func:`sites_of`.
        spec: which kinds of operation have a rule here.
        depth: how many sub-modules are running; only at 0 is the code the module's own.
    """

    def __init__(self, sites: Mapping[str, Site], spec: Operations, depth: list[int]) -> None:
        super().__init__()
        self.sites, self.spec, self.depth = sites, spec, depth

    def intercepts(self) -> bool:
        """Whether the code that runs is the module's own, and on the graph."""
        return self.depth[0] == 0 and torch.is_grad_enabled()

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and on_graph(args[0]) and (name in IN_PLACE_FUNCTIONS or kwargs.get("inplace")):
            return self.written(func, name, args, kwargs)
        if name in PRODUCT_FUNCTIONS and count_on_graph(args) == 2:
            a, b = args[0], args[1]
            return self.product(a, b)
        squared = name == "square" and _comes_from_activation(args[0])  # ReLU, squared
        if squared or (name in ACTIVATION_FUNCTIONS and on_graph(args[0])):
            return self.activation(lambda x: func(x, *args[1:], **kwargs), args[0])
        if name in CLIPS and self.spec.product == "gate" and _clips_around_zero(*args, **kwargs):
            return self.activation(lambda x: func(x, *args[1:], **kwargs), args[0], gate=False)
        if name in self.spec.leaks and name in LEAKING_FUNCTIONS and args and on_graph(args[0]):
            return self.leak(lambda x: func(x, *args[1:], **kwargs), args[0])
        if name in DIVISIONS and "div" in self.spec.leaks and len(args) == 2 and on_graph(args[1]):
            return self.leak(torch.div, *args)
        if name == "einsum" and count_on_graph(args) == 2 and not _contracts(args[0]):
            return self.product(args[1], args[2], lambda a, b: func(args[0], a, b))
        if name in MATRIX_PRODUCT_FUNCTIONS and count_on_graph(args) == 2:
            if self.spec.streams is not None and name != "einsum":
                return self.mixed(args[0], args[1], func)
            if self.spec.attention:
                return self.matrix_product(func, args, kwargs)
        out = func(*args, **kwargs)
        note_write(name, args, kwargs)
        if name in SUM_FUNCTIONS or name in DIFFERENCE_FUNCTIONS:
            return self.sum(out, args, -1.0 if name in DIFFERENCE_FUNCTIONS else 1.0)
        if name in ("matmul", "__matmul__") and on_graph(args[0]) and args[1].ndim == 2:
            return self.weighted(out, args[0], args[1].T, None)
        if name == "linear":
            return self.linear(out, args, kwargs)
        if name in CONVOLUTION_FUNCTIONS and self.sites["linear"].accounts is not None:
            bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
            measure_bias(out, bias, self.sites["linear"], 1 - out.ndim)
        if name in JOIN_FUNCTIONS:
            return self.joined(out, *args, **kwargs)
        return out

    def written(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same operation with its rule on a copy, and its values written where they belong."""
        apart = {key: value for key, value in kwargs.items() if key != "inplace"}

        def on_copy(x: Tensor, *rest: Any, **options: Any) -> Any:
            return func(
                x.clone(), *rest, **options, **dict.fromkeys(kwargs.keys() & {"inplace"}, True)
            )

        name = IN_PLACE_FUNCTIONS.get(name, name)
        out = self.intercept(on_copy, name, (args[0].clone(), *args[1:]), apart)
        return args[0].copy_(out)

    def product(
        self, a: Tensor, b: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = torch.mul
    ) -> Tensor:
        """A share to each factor; a router's weight, one number a position, is the first."""
        narrow = [x.shape[-1] == 1 for x in (a, b)] if a.ndim and b.ndim else [False, False]
        routes = narrow[0] != narrow[1] and self.spec.product != "attention_gate"
        role = self.spec.weights if routes else self.spec.product
        at_first = 1 if narrow[1] and not narrow[0] else 0
        if role != self.spec.weights:
            gates = [i for i, x in enumerate((a, b)) if _comes_from_activation(x) or _from_leak(x)]
            at_first = next(iter(gates), 0)
        return self.split(role, [a, b], at_first, multiply)

    def mixed(self, a: Tensor, b: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A matrix product of weights, one for each two streams, and the streams."""
        square = [x.shape[-1] == x.shape[-2] for x in (a, b)]
        if square[0] == square[1]:
            raise InputError(
                f"{self.sites['recurrence'].hook}: as many residual streams as features, so that "
                f"the weights that mix them cannot be told from them ({tuple(a.shape)} times "
                f"{tuple(b.shape)})"
            )
        return self.split("recurrence", [a, b], square.index(True), multiply)

    def split(
        self,
        role: str,
        factors: list[Tensor],
        at_first: int,
        multiply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """A product under the rule of its role; ``at_first``: which factor is the first."""
        site = self.sites[role]
        first, second = product_shares(site.rule)
        if not (
            role == "gate" and _comes_from_activation(factors[at_first])
        ):  # which has its share already
            factors[at_first] = F.shared(factors[at_first], first / second, site)
        y = multiply(*factors)
        if first == 0:
            return F.apply(F.Mark, y, site)
        if self.spec.streams == 0 and multiply is torch.mul and role == self.spec.weights:
            y = y.movedim(0, -2)  # a ledger goes by rows
            return F.apply(F.ProductOutput, y, first, second, site).movedim(-2, 0)
        return F.apply(F.ProductOutput, y, first, second, site)

    def activation(
        self, act: Callable[[Tensor], Tensor], x: Tensor, *, gate: bool = True
    ) -> Tensor:
        """An element-wise function; ``gate``: it feeds the first factor of a gated product."""
        site = self.sites["activation"]
        self.depth[0] += 1  # what it is made of is not intercepted
        y = F.activated(act, x, site)
        self.depth[0] -= 1
        first, second = product_shares(self.sites["gate"].rule)
        return F.shared(y, first / second, site) if gate and self.spec.gated else y

    def leak(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """The plain gradient between its measured inputs and output."""
        site = self.sites["softmax"]
        if isinstance(site.rule, SoftmaxRule):
            raise InputError(f"{site.hook}: {site.rule.name} needs an attention with hook_pattern")
        inside = [F.apply(F.RegionInput, x, "softmax", site) if on_graph(x) else x for x in inputs]
        y = function(*inside)
        if isinstance(site.rule, SoftmaxTemperature) and len(inputs) == 1:
            scores = inputs[0].detach()
            y = F.apply(Pattern, y, scores, 1.0, replace(site, accounts=None))
        return F.apply(F.RegionOutput, y, None, "softmax", site)

    def matrix_product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Pattern times values if a factor comes from a softmax, queries times keys otherwise."""
        carrying = [i for i, x in enumerate(args) if on_graph(x)]
        pattern = [i for i in carrying if _from_leak(args[i])]
        site = self.sites["attention_av" if pattern else "attention_qk"]
        first, second = product_shares(site.rule)
        factors = list(args)
        first_at = (pattern or carrying)[0]
        factors[first_at] = F.shared(factors[first_at], first / second, site)
        y = func(*factors, **kwargs)
        if first == 0:
            return F.apply(F.Mark, y, site)
        return F.apply(F.ProductOutput, y, first, second, site)

    def sum(self, y: Any, args: tuple[Any, ...], sign: float) -> Any:
        """A constant that is added takes its share, as a bias does."""
        site = self.sites["linear"]
        if site.accounts is None or not (isinstance(y, Tensor) and y.requires_grad):
            return y
        constants = [
            (i, c) for i, c in enumerate(args[:2]) if not on_graph(c) and not isinstance(c, bool)
        ]
        if len(constants) == 1:
            index, constant = constants[0]
            sign = sign if index == 1 else 1.0
            value = torch.as_tensor(constant, dtype=y.dtype, device=y.device).detach()
            y.register_hook(
                lambda g: site.report("biases", sign * row_sums(value.expand(g.shape), g))
            )
        return y

    def joined(self, y: Tensor, tensors: Any, dim: int = 0) -> Tensor:
        """Constants (learned tokens) that are concatenated report the relevance that they take."""
        site, start = self.sites["linear"], 0
        for part in tensors:
            if not part.numel():  # a cache that is empty yet, of one axis
                continue
            size = part.shape[dim]
            if site.accounts is not None and y.requires_grad and not part.requires_grad:
                self.meter_part(y, part.detach(), dim, start)
            start += size
        return y

    def meter_part(self, y: Tensor, part: Tensor, dim: int, start: int) -> None:
        site = self.sites["linear"]
        size = part.shape[dim]
        y.register_hook(lambda g: site.report("biases", row_sums(part, g.narrow(dim, start, size))))

    def linear(self, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        ruled = self.weighted(y, args[0], weight, bias)
        if ruled is y and self.sites["linear"].accounts is not None:
            measure_bias(y, bias, self.sites["linear"])
        return ruled

    def weighted(self, y: Tensor, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        """A product with a weight under a rule other than epsilon; ``y`` as it is otherwise."""
        site = self.sites["linear"]
        if not isinstance(site.rule, LinearRule) or not on_graph(x) or on_graph(weight):
            return y
        # `y` was computed on the graph, which the rule's own node takes the place of.
        return F.apply(F.Linear, x, y.detach(), weight, bias, site.rule, site)


def on_graph(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def count_on_graph(args: tuple[Any, ...]) -> int:
    return sum(on_graph(x) for x in args)


def _contracts(equation: Any) -> bool:
    """Whether an einsum sums over an index; one that does not is a product, number by number."""
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    return not arrow or bool(set(inputs) - set(output) - set(",."))


def _clips_around_zero(x: Any, min: Any = None, max: Any = None) -> bool:
    """Whether a clip leaves 0 as it is, as the identity rule asks."""
    return on_graph(x) and (min is None or min <= 0) and (max is None or max >= 0)


def _node(x: Tensor) -> Any:
    return getattr(x.grad_fn, "_forward_cls", None)


def _comes_from_activation(x: Tensor) -> bool:
    """Whether a factor comes straight from an activation, which has given it a gate's share."""
    return _node(x) in (F.Elementwise, F.Share) or (
        _node(x) is F.RegionOutput and x.grad_fn.site.role == "activation"  # type: ignore[union-attr]
    )


def _from_leak(x: Tensor, steps: int = 3) -> bool:
    """Whether a factor is a softmax's output, as it is, cast or reshaped."""
    node = x.grad_fn
    for _ in range(steps):
        if node is None:
            return False
        if getattr(node, "_forward_cls", None) is F.RegionOutput:
            return bool(node.site.role == "softmax")  # type: ignore[attr-defined]
        node = node.next_functions[0][0] if node.next_functions else None
    return False


def sites_of(ctx: Context, path: str, module: nn.Module, spec: Operations) -> dict[str, Site]:
    """One site a role. Which of them the module needs is seen when it runs."""
    roles = {spec.product, "gate", "activation", spec.weights, "linear"}
    if spec.attention:
        roles |= {"attention_qk", "attention_av"}
    sites = {role: ctx.site(path, module, role) for role in sorted(roles)}
    if spec == ROUTER_SPEC or spec.streams is not None:  # what weighs has no weighted rule
        sites["linear"].rule = Epsilon()
    # GIM's temperature is for attention; a router's softmax keeps its plain gradient.
    sites["softmax"] = ctx.site(path, module, "softmax", None if spec.attention else Softmax())
    # What a softmax or sigmoid feeds; under a constant factor nothing passes it.
    above = spec.weights if spec.product == "gate" else spec.product
    above = "attention_av" if spec.attention else above
    sites["softmax"].cut = product_shares(ctx.composite[above])[0] == 0
    fed = spec.weights if spec.streams is not None else "gate" if spec.gated else None
    if fed:  # what is activated feeds a constant factor
        sites["activation"].cut = product_shares(ctx.composite[fed])[0] == 0
    if spec.attention:  # queries and keys feed the pattern
        sites["attention_qk"].cut = sites["softmax"].cut
    for site in sites.values():
        site.optional = True
    return sites


def attach_operations(
    at: Attached,
    ctx: Context,
    path: str,
    module: nn.Module,
    spec: Operations,
    *,
    mode: type[OperationIntercept] = OperationIntercept,
    **options: Any,
) -> None:
    """Run ``module`` with its raw operations intercepted.

    Args:
        spec: which kinds of operation have a rule.
        mode, options: a sub-class of :class:`OperationIntercept` and what it takes besides.
    """
    sites = sites_of(ctx, path, module, spec)
    if any(type(child).__module__ in ACTIVATION_MODULES for child in module.children()):
        spec = replace(spec, gated=False)  # the gate is what that module activates
    at.sites.extend(site for role, site in sites.items() if role != "linear")
    if isinstance(sites["linear"].rule, LinearRule):
        at.sites.append(sites["linear"])
    depth = [0]

    def enter(*_: Any) -> None:
        depth[0] += 1

    def leave(*_: Any) -> None:
        depth[0] -= 1

    for part in module.modules():
        if part is not module and type(part).__name__ not in OWN_CODE:
            at.pre_hook(part, enter)
            at.hook(part, leave, always_call=True)
    run = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        depth[0] = 0
        with mode(sites, spec, depth, **options):
            return run(*args, **kwargs)

    at.attribute(module, "forward", forward)

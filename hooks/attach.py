"""How a rule is attached to one component of a bridge, and how all of it is undone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lenslrp.hooks import functions as F
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.sites import Books, Site

FEEDS_PATTERN = re.compile(r"[._](q|k|qk)(_(layer)?norm|_a_layernorm|_[ab]_proj)?$")
"""Names of components that feed queries and keys, and nothing else."""

Undo = Callable[[], None]


@dataclass(frozen=True)
class Context:
    """What an ``attach_*`` function needs besides its component."""

    composite: Composite
    books: Books | None
    attention: str
    queries: set[str] = field(default_factory=set)  #: norms that feed nothing but queries: paths
    routing: dict[str, Tensor] = field(
        default_factory=dict
    )  #: mixture -> chosen [batch, pos, slot]
    experts: dict[str, int] = field(default_factory=dict)  #: mixture -> how many it has

    def site(self, hook: str, component: Any, role: str, rule: Any = None) -> Site:
        rule = self.composite[role] if rule is None else rule
        site = Site(hook, type(component).__name__, role, rule, layer_of(hook), books=self.books)
        # An expert that no token was sent to does not run, nor do projections for global attention.
        site.optional = ".experts." in hook or hook.endswith("_global")
        return site

    def cuts(self, path: str) -> bool:
        """Whether the composite leaves a component off the path: what feeds a constant factor."""
        roles = ("attention_av", "attention_gate", "gate")
        constant = {role: F.product_shares(self.composite[role])[0] == 0 for role in roles}
        if ".indexer." in path:  # which keys are seen: a choice, no relevance
            return True
        if path in self.queries or FEEDS_PATTERN.search(path):
            return constant["attention_av"]
        if path.endswith((".gate", ".dense_gate")):
            return constant["attention_gate" if path.endswith(".attn.gate") else "gate"]
        return False


def layer_of(name: str) -> int | None:
    """The block index in a hook or component name, ``None`` outside the blocks."""
    found = re.search(r"(?:^|\.)\w*blocks\.(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def original(component: nn.Module) -> Any:
    """The Hugging Face module that a bridge component wraps, or ``None``."""
    return getattr(component, "original_component", None)


class Attached:
    """Sites created so far and how to undo them, in order."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.undo: list[Undo] = []
        self.weights: dict[int, str] = {}  # of layers with a linear rule: address -> path
        self.wrapped: set[int] = set()  # modules that a norm's bridge wraps: their ids

    def hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self.undo.append(module.register_forward_hook(hook).remove)

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self.undo.append(module.register_forward_pre_hook(hook).remove)

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Shadow an attribute of one instance, past nn.Module's and the bridge's own setters."""
        had, old = name in module.__dict__, module.__dict__.get(name)
        module.__dict__[name] = value

        def restore() -> None:
            if had:
                module.__dict__[name] = old
            else:
                module.__dict__.pop(name, None)

        self.undo.append(restore)

    def wrap(self, module: nn.Module, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Cut the graph through ``module``; ``apply(x, y)`` puts a rule in its place."""
        inputs: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs.append(args[0])
            return (args[0].detach(), *args[1:])

        def after(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            return apply(inputs.pop(), y)

        self.pre_hook(module, before)
        self.hook(module, after)

    def region(
        self, module: nn.Module, site: Site, bias: Callable[[Tensor], Tensor | None]
    ) -> None:
        """Mark a module as plain: its inside is on the graph, and its in and out are measured.

        ``bias`` of the output is the constant in it, in a shape that the output broadcasts.
        """
        self.sites.append(site)

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (F.apply(F.RegionInput, args[0], "plain", site), *args[1:])

        def after(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            return F.apply(F.RegionOutput, y, bias(y), "plain", site)

        self.pre_hook(module, before)
        self.hook(module, after)


def components(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, under the first of its names that is not a wrapped module's own."""
    seen: set[int] = set()
    named = list(model.named_modules(remove_duplicate=False))
    # What the bridge has no component for (a head's activation, a stack's embedding) runs as well.
    inner = getattr(model, "original_model", None)
    if isinstance(inner, nn.Module):
        named += [
            (f"original_model.{name}", module) for name, module in inner.named_modules() if name
        ]
    named.sort(
        key=lambda item: (
            item[0].startswith("original_model."),
            item[0].count("_original_component"),
            "original_" in item[0],
        )
    )
    for name, module in named:
        if id(module) not in seen:
            seen.add(id(module))
            yield name.replace("._original_component", ""), module

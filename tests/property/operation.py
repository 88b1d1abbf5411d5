"""What an operation of a program is: what runs in the model, and what is right.

Each has three forms. ``run`` is what the module in the model does, with views, writes in place and
sub-modules. ``real`` computes the same values in another way, without either; ``rule`` is a
surrogate with the same values whose gradient hands relevance out by the operation's rule. A
``status`` says what may be expected where the operation stands in code that nobody declared
(``bare``) and in a module declared as ``Operations()`` (``taught``):

- ``sure``: a rule is known, so relevance should be given, and be right;
- ``may``: right or refused;
- ``none``: nothing says what is right, so it must be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.property.program import Node

Form = Callable[..., Tensor]


class Env:
    """Constants of nodes, in the type of the model, and the modules of a part."""

    def __init__(
        self,
        dtype: torch.dtype,
        modules: dict[str, nn.Module] | None = None,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.dtype, self.modules = dtype, modules
        self.rounded = rounded or dtype
        self.composite = "AttnLRP"
        self.uniform = False  # the rule of recurrent scans
        self.owned = False  # whether the node that runs is the only one to read its input

    def const(self, node: Node, *shape: int, which: int = 0, scale: float = 1.0) -> Tensor:
        """The same numbers at every call; rounded to the model's type in the reference as well."""
        generator = torch.Generator().manual_seed(node.seed * 7 + which)
        made = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return made.to(self.rounded).to(self.dtype)

    def weight(self, node: Node, out: int, into: int) -> Tensor:
        return self.const(node, out, into, scale=1.2 / into**0.5)

    def module(self, node: Node) -> Any:
        assert self.modules is not None
        return self.modules[key_of(node)]


def key_of(node: Node) -> str:
    """The name of a node's sub-module."""
    name = next((a for a in node.args if isinstance(a, str) and a.startswith("@")), "")
    text = f"{node.op}_{node.seed}_{'_'.join(str(a) for a in node.args)}"
    return name[1:] or text.replace(".", "_").replace("@", "")


@dataclass(frozen=True)
class Op:
    """One operation; see the module's docstring.

    ``status`` gets the node, whether each input is live, and the mode: ``bare`` code of a module,
    ``taught`` code of one declared as ``Operations()``, or a ``hook``.
    """

    run: Form
    real: Form | None = None
    rule: Form | None = None
    arity: int = 1
    width: Callable[[Node, list[int]], int] = lambda node, widths: widths[0]
    status: Callable[[Node, list[bool], str], str] = lambda node, live, mode: "sure"
    make: Callable[[Env, Node, list[int]], nn.Module] | None = None
    tags: frozenset[str] = frozenset()

    def form(self, name: str) -> Form:
        if name == "run":
            return self.run
        real = self.real or self.run
        return real if name == "real" else self.rule or real


def rank(statuses: list[str]) -> str:
    """The worst of several statuses."""
    return next((s for s in ("none", "may") if s in statuses), "sure")


def always(status: str) -> Callable[[Node, list[bool], str], str]:
    return lambda node, live, mode: status


def constant(node: Node, live: list[bool], mode: str) -> str:
    """The graph of bare code shows no constant that is added: only the account does."""
    return "may" if mode == "bare" else "sure"


def of_the_model(node: Node, live: list[bool], mode: str) -> str:
    """A module that only a hook knows of is no part of the model, and gets no rule."""
    return "may" if mode == "hook" and live[0] else "sure"


def tagged(*names: str) -> frozenset[str]:
    return frozenset(names)

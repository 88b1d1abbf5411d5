"""A program run as a module of the model, and what may be expected of its relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.property.operations import OPS, Env, key_of, rank
from tests.property.program import Node, Part

FRESH = frozenset({"linear", "raw_linear", "scale", "tokens"})
"""Operations that return a tensor of their own, which may be written into."""


def widths(code: Sequence[Node], width: int) -> list[int]:
    """The width of each node's value."""
    found: list[int] = []
    for node in code:
        given = [found[i] for i in node.inputs]
        found.append(width if node.op == "input" else OPS[node.op].width(node, given))
    return found


def run_code(
    code: Sequence[Node], env: Env, inputs: Sequence[Tensor], form: str, *, owns: bool = False
) -> Tensor:
    """The value of the last node. ``owns``: the input belongs to the code alone."""
    readers = [sum(i in node.inputs for node in code) for i in range(len(code))]
    values: list[Tensor] = []
    for i, node in enumerate(code):
        if node.op == "input":
            values.append(inputs[i])
            continue
        first = node.inputs[0]
        fresh = code[first].op in FRESH or (owns and code[first].op == "input")
        env.owned = fresh and readers[first] == 1
        run = OPS[node.op].form(form)
        values.append(run(env, node, *(values[j] for j in node.inputs)))
    return values[-1]


def live(code: Sequence[Node]) -> list[bool]:
    """Which nodes carry relevance from an input."""
    found: list[bool] = []
    for node in code:
        carries = node.op == "input" or any(found[i] for i in node.inputs)
        found.append(carries and node.op != "detach")
    return found


def status(code: Sequence[Node], mode: str) -> str:
    """What may be expected of code: the worst that stands between its inputs and its output."""
    alive = live(code)
    wanted = {len(code) - 1} if alive[-1] else set()
    found = ["sure" if alive[-1] else "may"]
    for i in reversed(range(len(code))):
        node = code[i]
        if node.op == "detach" and any(alive[j] for j in node.inputs):
            found.append("may")
        if i not in wanted or node.op == "input":
            continue
        given = [alive[j] for j in node.inputs]
        found.append(OPS[node.op].status(node, given, mode))
        wanted.update(j for j in node.inputs if alive[j])
    return rank(found)


def modules(code: Sequence[Node], env: Env, width: int) -> dict[str, nn.Module]:
    """The sub-modules that code calls, by name."""
    found: dict[str, nn.Module] = {}
    wide = widths(code, width)
    for node in code:
        make = None if node.op == "input" else OPS[node.op].make
        if make is not None and key_of(node) not in found:
            found[key_of(node)] = make(env, node, [wide[i] for i in node.inputs])
    return found


def bias_of(part: Part, env: Env) -> Tensor | None:
    """What a module declared as a norm shows as its ``bias``: the last thing that it adds."""
    last = part.code[-1]
    if not part.declared.startswith("norm") or last.op != "shift" or last.args != ("feature", "+"):
        return None
    return env.const(last, part.width)


def make_unit(part: Part, dtype: torch.dtype, bases: dict[str, type], like: Any) -> nn.Module:
    """A module of a new class whose forward is a part's code.

    Args:
        bases: classes that a part may inherit from, by name.
        like: the module that it replaces, whose arguments its base may need.
    """
    made: dict[str, nn.Module] = {}
    env = Env(dtype, made)
    made.update(modules(part.code, env, part.width))
    returns_pair = part.place == "attn"

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = run_code(part.code, env, [hidden_states], "run", owns=part.place == "act")
        return (y, None) if returns_pair else y

    base = bases[part.base] if part.base else nn.Module
    own = type(part.cls, (base,), {} if part.form == "instance" else {"forward": forward})
    if part.form == "instance":
        unit = base() if part.place == "act" else base(part.width)
        unit.__dict__["forward"] = forward.__get__(unit)
    else:
        unit = own.__new__(own)
        nn.Module.__init__(unit)
        if isinstance(like, nn.Module):
            for name in ("head_dim", "config", "layer_idx", "num_key_value_groups", "scaling"):
                if hasattr(like, name) and part.place == "attn":
                    setattr(unit, name, getattr(like, name))
    for name, module in made.items():
        unit.add_module(name, module)
    bias = bias_of(part, env)
    if bias is not None and part.form == "class":
        unit.register_parameter("bias", nn.Parameter(bias))
    unit.eval()
    return unit

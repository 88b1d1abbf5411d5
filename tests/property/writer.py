"""Writes random code: one node after another, of the widths that the next ones need."""

from __future__ import annotations

import random
from typing import Any

from tests.property.interpreter import widths
from tests.property.operations import (
    ACTIVATIONS,
    EFFECTS,
    FUNCTIONS,
    MIXERS,
    MOVES,
    OPS,
    RESHAPES,
    UNKNOWN,
    VIEWS,
)
from tests.property.program import Node, without_dead

LINEAR = ("linear", "raw_linear", "scale", "add", "reduce", "move", "slice", "cat", "tokens",
          "reshape", "where", "convolution", "guard", "checkpoint")  # fmt: skip
FLAVOURS: dict[str, dict[str, float]] = {
    "linear": {**dict.fromkeys(LINEAR, 1.0), "linear": 3.0, "activation": 3.0, "norm": 0.3},
    "product": {"linear": 3, "product": 3, "activation": 2, "scale": 1, "add": 1, "move": 1,
                "reshape": 1, "cat": 0.7, "slice": 0.7, "function": 0.5},
    "inplace": {"linear": 2, "write": 3, "assign": 2, "activation": 1, "add": 1, "move": 0.5,
                "reshape": 1, "slice": 0.7, "scale": 0.5, "function": 0.5},
    "function": {"linear": 2, "function": 3, "product": 1, "scale": 1, "add": 1, "move": 0.5},
    "unknown": {**dict.fromkeys(LINEAR, 0.5), "linear": 2, "unknown": 2, "ratio": 0.5,
                "product": 0.5, "raw_norm": 0.5},
    "constant": {**dict.fromkeys(LINEAR, 0.5), "linear": 2, "shift": 2, "detach": 1, "add": 1.5,
                 "activation": 1.5},
}  # fmt: skip
FLAVOURS["mixed"] = {op: 1.0 for op in OPS if op not in ("attend", "input", "scan")}
SCANNING = "scan"
FLAVOURS[SCANNING] = {
    "scan": 4,
    "linear": 2,
    "activation": 1,
    "add": 1,
    "move": 0.5,
    "scale": 0.5,
    "product": 0.3,
    "convolution": 0.5,
    "norm": 0.3,
    "unknown": 0.1,
}
ELEMENTWISE = {"function": 2.0, "scale": 1.0, "product": 1.0, "activation": 1.0, "unknown": 0.5,
               "shift": 0.3, "add": 0.7, "write": 0.3, "move": 0.15, "linear": 0.1}  # fmt: skip
WIDEST = 24


class Writer:
    """Adds random nodes to the code of one part."""

    def __init__(self, rng: random.Random, width: int, inputs: int = 1) -> None:
        self.rng, self.width = rng, width
        self.code = [Node("input") for _ in range(inputs)]

    def wide(self, i: int) -> int:
        return widths(self.code, self.width)[i]

    def add(self, op: str, inputs: tuple[int, ...], *args: Any, seed: int | None = None) -> int:
        chosen = self.rng.randrange(1 << 20) if seed is None else seed
        self.code.append(Node(op, inputs, args, chosen))
        return len(self.code) - 1

    def linear(self, i: int, out: int, name: str = "") -> int:
        bias = int(self.rng.random() < 0.5)
        return self.add("linear", (i,), out, bias, *([f"@{name}"] if name else []))

    def fit(self, i: int, width: int) -> int:
        """A node of the width that is wanted."""
        return i if self.wide(i) == width else self.linear(i, width)

    def other(self, i: int) -> int:
        """A second value of the width of node ``i``."""
        wide = widths(self.code, self.width)
        alike = [j for j, w in enumerate(wide) if w == wide[i] and j != i]
        if alike and self.rng.random() < 0.75:
            return self.rng.choice(alike)
        return self.linear(self.rng.randrange(len(self.code)), wide[i])

    def step(self, i: int, weights: dict[str, float]) -> int:
        """One random operation on node ``i``."""
        rng, n = self.rng, self.wide(i)
        op = rng.choices(list(weights), list(weights.values()))[0]
        kind = rng.choice(["scalar", "feature", "full"])
        dim = rng.choice([-1, -2])
        if op == "linear":
            again = [node for node in self.code if node.op == "linear" and node.args[0] == n]
            again = [node for node in again if self.wide(node.inputs[0]) == n]
            if again and rng.random() < 0.2:  # one module, used twice
                node = rng.choice(again)
                return self.add("linear", (i,), *node.args, seed=node.seed)
            return self.linear(i, rng.choice([8, 12]))
        if op == "raw_linear":
            style = rng.choice(["linear", "matmul", "einsum", "rows", "biased"])
            return self.add(op, (i,), rng.choice([8, 12]), style)
        if op == "scale":
            styles = ["*", "rmul", "div", "neg", "number", "mul_", "out"]
            return self.add(op, (i,), kind, rng.choice(styles))
        if op == "shift":
            return self.add(op, (i,), kind, rng.choice(["+", "sub", "rsub", "add_", "number"]))
        if op == "add":
            styles = ["+", "sub", "add_", "alpha", "stack"]
            return self.add(op, (i, self.other(i)), rng.choice(styles))
        if op == "cat":
            j = rng.randrange(len(self.code))
            return self.add(op, (i, j)) if n + self.wide(j) <= WIDEST else i
        if op == "reduce":
            kinds = ["mean", "sum", "cumsum", "max", "centre", "amax"]
            return self.add(op, (i,), rng.choice(kinds), dim)
        if op == "move":
            return self.add(op, (i,), rng.choice(MOVES), dim, rng.choice([1, 2, 3]))
        if op == "slice":
            spans = [(0, 4, 1), (4, 8, 1), (0, 8, 2), (0, 8, 1)]
            spans += [(4, 12, 1), (0, 12, 1)] if n >= 12 else []
            return self.add(op, (i,), *rng.choice([s for s in spans if s[1] <= n]))
        if op == "tokens":
            return self.add(op, (i,), rng.choice(["matmul", "tril", "rows"]))
        if op == "reshape":
            return self.add(op, (i,), rng.choice(RESHAPES))
        if op == "where":
            return self.add(op, (i, self.other(i)), rng.choice(["mask", "value"]))
        if op == "convolution":
            return self.add(op, (i,), rng.choice([0, 1]))
        if op == "checkpoint":
            return self.add(op, (i,), rng.choice(["plain", "plain", "reentrant"]))
        if op == "activation":
            forms = ["plain", "plain", "plain", "clone", "inplace"]
            return self.add(op, (i,), rng.choice(list(ACTIVATIONS)), rng.choice(forms))
        if op == "function":
            name = rng.choice(list(FUNCTIONS))
            styles = ["call", "call", "call", "written", "vmap", "checkpoint"]
            style = rng.choice(styles)
            return self.add(
                op, (i,), name, "call" if (name, style) == ("gelu", "written") else style
            )
        if op == "unknown":
            return self.add(op, (i,), rng.choice(list(UNKNOWN)))
        if op == "product":
            j = i if rng.random() < 0.1 else self.other(i)
            style = rng.choice(["*", "*", "*", "mul_", "einsum", "addcmul", "column"])
            return self.add(op, (i, j), style)
        if op == "ratio":
            return self.add(op, (i, self.other(i)), rng.choice(["square", "abs"]))
        if op == "norm":
            return self.add(op, (i,), rng.choice(["layer", "rms"]))
        if op == "raw_norm":
            over = rng.choice(["features", "features", "tokens", "all", "l1", "max"])
            return self.add(op, (i,), rng.choice([0, 1]), over, rng.choice([0, 1]))
        if op == "scan":
            return self.add(op, (i,), rng.choice(list(MIXERS)))
        if op == "write":
            return self.add(
                op, (i,), rng.choice(list(VIEWS)), rng.choice(list(EFFECTS)), rng.choice([0, 1])
            )
        if op == "assign":
            hows = ["copy_", "set", "add_", "sub_", "mul_"]
            return self.add(op, (i, self.other(i)), rng.choice(list(VIEWS)), rng.choice(hows))
        return self.add(op, (i,))  # detach, guard

    def grow(self, i: int, steps: int, weights: dict[str, float]) -> int:
        """Several operations after node ``i``, mostly one on the other."""
        for _ in range(steps):
            at = i if self.rng.random() < 0.8 else self.rng.randrange(len(self.code))
            i = self.step(at, weights)
        return i

    def done(self, i: int) -> tuple[Node, ...]:
        """The code that returns node ``i``."""
        inputs = sum(node.op == "input" for node in self.code)
        if i < inputs:
            i = self.add("scale", (i,), "scalar", "number")
        return without_dead(tuple(self.code[: i + 1]), inputs)

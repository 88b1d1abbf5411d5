"""A program: what is put into a tiny model, as data that can be printed, stored and made smaller.

A :class:`Program` names a host and what is put into it: parts. The code of a part is a graph of
nodes in order; each names an operation of :mod:`tests.property.operations`, the earlier nodes that
it reads, its options and the seed of its constants. The first nodes are inputs, the last one is
what the part returns. All values are [batch, pos, width].
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

SIZES = {"llama": (8, 12, 4), "gpt2": (8, 12, 4), "vit": (8, 12, 5)}
"""Width, width of the MLP, number of positions of each host."""

UNIFORM = "uniform recurrence"
"""The option that gives the operators of scans a share of relevance."""


@dataclass(frozen=True)
class Node:
    """One operation; ``args`` are its options, ``seed`` that of its constants.

    Nodes of one operation, options and seed share their module, if they have one.
    """

    op: str
    inputs: tuple[int, ...] = ()
    args: tuple[Any, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """What is put in one place.

    Attributes:
        kind: ``module`` (in the place of one), ``edit`` (a hook at a hook point), ``after``,
            ``before`` and ``backward`` (a native hook on a module of the model; the last node of a
            backward hook's code says what it does to the gradient).
        place: a module of a block (``act``, ``ln1``, ``mlp``, ...), or a hook point's name in it.
        layers: the blocks; several share one module.
        width: of the input, and of what is returned.
        code: the nodes.
        cls: name of the module's class.
        base: what the class inherits from, or whose instance gets another ``forward``.
        form: ``class``, or ``instance`` for a forward that is replaced on one object.
        declared: the rule that the user gives for the class, or ``""``.
        other: a hook point whose tensor the code reads as its second input, or ``""``.
    """

    kind: str
    place: str
    layers: tuple[int, ...]
    width: int
    code: tuple[Node, ...]
    cls: str = "Unit"
    base: str = ""
    form: str = "class"
    declared: str = ""
    other: str = ""

    @property
    def inputs(self) -> int:
        return 2 if self.other else 1


@dataclass(frozen=True)
class Program:
    """A host, what it reads, and the parts that are put into it.

    Attributes:
        weights: seed of the host's weights and of what it reads.
        target: the token (class) that is explained, or the unit of ``latent``.
        read: hook points whose relevance is compared; ``all`` for every one.
        flavour: which operations the generator preferred.
        composite: the rules, by name.
        options: how it is run: ``no ledger``, ``checkpoint``, ``fused``, ``uniform recurrence``.
        latent: a hook point whose unit is explained instead of a logit.
        batch: how many rows.
    """

    host: str
    parts: tuple[Part, ...]
    weights: int = 0
    target: int = 3
    dtype: str = "float64"
    read: tuple[str, ...] = ()
    flavour: str = ""
    composite: str = "AttnLRP"
    options: tuple[str, ...] = ()
    latent: str = ""
    batch: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Program:
        raw = json.loads(text)
        raw["parts"] = tuple(_part(part) for part in raw["parts"])
        raw.update({name: tuple(raw.get(name, ())) for name in ("read", "options")})
        return cls(**raw)

    def __str__(self) -> str:
        head = (
            f"{self.host}, {self.dtype}, weights {self.weights}, target {self.target}, reads "
            f"{', '.join(self.read) or 'tokens only'}; {self.composite}"
            f"{''.join(f', {option}' for option in self.options)}"
            f"{f', explains {self.latent}' if self.latent else ''}"
            f"{f', {self.batch} rows' if self.batch > 1 else ''}"
        )
        return "\n".join([head, *(_text(part) for part in self.parts)])


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


def _part(raw: dict[str, Any]) -> Part:
    code = tuple(Node(**{k: _tuple(v) for k, v in node.items()}) for node in raw.pop("code"))
    return Part(code=code, **{k: _tuple(v) for k, v in raw.items()})


def _text(part: Part) -> str:
    where = " and ".join(f"block {i}" for i in part.layers)
    what = {
        "module": f"{part.place} is",
        "edit": f"hook at {part.place}:",
        "after": f"native hook after {part.place}:",
        "before": f"native hook before {part.place}:",
        "backward": f"native backward hook on {part.place}:",
    }[part.kind]
    kind = ""
    if part.kind == "module":
        base = f"({part.base})" if part.base else ""
        kind = f" {part.cls}{base}" if part.form == "class" else f" {part.base} with forward set"
        kind += f", declared {part.declared}" if part.declared else ""
    lines = [f"  {where}: {what}{kind}"]
    for i, node in enumerate(part.code):
        if node.op == "input":
            name = part.other if i else "the input"
            lines.append(f"    v{i} = {name}")
            continue
        given = ", ".join([*(f"v{j}" for j in node.inputs), *(repr(a) for a in node.args)])
        lines.append(f"    v{i} = {node.op}({given})  # seed {node.seed}")
    return "\n".join([*lines, f"    return v{len(part.code) - 1}"])


def without_dead(code: tuple[Node, ...], inputs: int) -> tuple[Node, ...]:
    """The code without nodes that the last one does not need; inputs stay."""
    needed = {len(code) - 1, *range(inputs)}
    for i in reversed(range(len(code))):
        if i in needed:
            needed.update(code[i].inputs)
    order = sorted(needed)
    number = {old: new for new, old in enumerate(order)}
    return tuple(replace(code[i], inputs=tuple(number[j] for j in code[i].inputs)) for i in order)

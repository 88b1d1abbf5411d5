"""Makes a failing program smaller while it fails in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.property.interpreter import widths
from tests.property.judge import Verdict, judge
from tests.property.program import Node, Part, Program, without_dead


def shrink(program: Program, verdict: Verdict, tries: int = 400) -> tuple[Program, Verdict]:
    """The smallest program found whose verdict is of the same kind and for the same reason."""
    while tries > 0:
        for smaller in _smaller(program):
            tries -= 1
            found = judge(smaller)
            if (found.kind, found.reason) == (verdict.kind, verdict.reason):
                program, verdict = smaller, found
                break
            if tries <= 0:
                break
        else:
            return program, verdict
    return program, verdict


def _smaller(program: Program) -> Iterator[Program]:
    for i in range(len(program.parts)):
        if len(program.parts) > 1:
            yield replace(program, parts=(*program.parts[:i], *program.parts[i + 1 :]))
    for i, part in enumerate(program.parts):
        for other in _smaller_parts(part):
            yield replace(program, parts=(*program.parts[:i], other, *program.parts[i + 1 :]))
    if program.read:
        yield replace(program, read=())
        for name in program.read:
            if len(program.read) > 1:
                yield replace(program, read=(name,))
    if program.latent:
        yield replace(program, latent="")
    if program.options:
        yield replace(program, options=())
    if program.composite != "AttnLRP":
        yield replace(program, composite="AttnLRP")
    if program.batch > 1:
        yield replace(program, batch=1)
    if program.weights:
        yield replace(program, weights=0)
    if program.target != 3:
        yield replace(program, target=3)


def _smaller_parts(part: Part) -> Iterator[Part]:
    if len(part.layers) > 1:
        for layer in part.layers:
            yield replace(part, layers=(layer,))
    if part.base and part.form == "class":
        yield replace(part, base="")
    if part.cls != "Unit":
        yield replace(part, cls="Unit")
    if part.other:
        code = tuple(
            replace(node, inputs=tuple(0 if i == 1 else i - (i > 1) for i in node.inputs))
            for j, node in enumerate(part.code)
            if j != 1
        )
        yield replace(part, other="", code=without_dead(code, 1))
    for code in () if part.kind == "backward" else _smaller_codes(part):
        yield replace(part, code=code)


def _smaller_codes(part: Part) -> Iterator[tuple[Node, ...]]:
    """A node gives way to one of its inputs of the same width, or is the last one."""
    code, wide, inputs = part.code, widths(part.code, part.width), part.inputs
    for i in range(len(code) - 1, inputs - 1, -1):
        if i < len(code) - 1 and wide[i] == part.width:
            yield without_dead(code[: i + 1], inputs)
        for j in code[i].inputs:
            if wide[j] != wide[i]:
                continue
            if i == len(code) - 1:
                if j >= inputs:
                    yield without_dead(code[: j + 1], inputs)
                continue
            moved = tuple(
                replace(node, inputs=tuple(j if k == i else k for k in node.inputs))
                for node in code
            )
            yield without_dead(moved, inputs)
    for i in range(inputs, len(code)):
        for simpler in _simpler(code[i]):
            yield (*code[:i], simpler, *code[i + 1 :])


def _simpler(node: Node) -> Iterator[Node]:
    if node.op == "linear" and node.args[1]:
        yield replace(node, args=(node.args[0], 0, *node.args[2:]))
    if node.op == "raw_linear" and node.args[1] != "linear":
        yield replace(node, args=(node.args[0], "linear"))
    if node.op in ("scale", "shift") and node.args[0] != "feature":
        yield replace(node, args=("feature", *node.args[1:]))
    if node.op in ("add", "product") and node.args[0] not in ("+", "*"):
        yield replace(node, args=("+" if node.op == "add" else "*",))
    if node.op in ("move", "tokens", "reshape", "reduce", "convolution"):
        yield Node("scale", node.inputs, ("feature", "*"), node.seed)

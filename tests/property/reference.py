"""What is right for a program: its host written out, every rule a surrogate, none of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.oracles import explicit_hosts as rules
from tests.oracles.explicit_hosts import Function, Host, World, run_host
from tests.property.interpreter import bias_of, run_code, status
from tests.property.operations import Env, rank
from tests.property.program import UNIFORM, Part, Program

Status = tuple[str, Tensor]
"""What may be expected of a part, and a number whose gradient says that it is on the path."""

MODES = {"": "bare", "operations": "taught", "operations gated": "taught"}
EXACT, NEAR = 1e-12, 1e-5


@dataclass(frozen=True)
class Reference:
    """Right relevance, by the rules alone.

    Attributes:
        logits: [batch, pos or 1, vocabulary].
        tokens: relevance of each token, [batch, pos].
        at: relevance at hook points, by name.
        status: ``sure``, ``may`` or ``none``: see :mod:`tests.property.operations`.
        size: the largest relevance at any hook point.
    """

    logits: Tensor
    tokens: Tensor
    at: dict[str, Tensor]
    status: str
    size: float


def refer(
    program: Program, host: Host, given: Tensor, dtype: torch.dtype, *, narrow: bool
) -> Reference:
    """Run the reference in ``dtype``; the program's constants are rounded to its own type."""
    rounded = getattr(torch, program.dtype)
    world = World(narrow=narrow, composite=program.composite)
    statuses: list[Status] = []
    kept: dict[str, Tensor] = {}
    for part in program.parts:
        env = Env(dtype, rounded=rounded)
        env.composite = program.composite
        env.uniform = UNIFORM in program.options
        _put(world, part, env, statuses, kept, _layers(part, program))
    logits, leaves = run_host(host, given, world)
    if program.latent:
        values = world.seen[program.latent].flatten(2)
        target = values[:, -1, program.target % values.shape[-1]].sum()
    else:
        target = logits[:, -1, program.target].sum()
    seen = {name: x for name, x in world.seen.items() if x.requires_grad}
    asked = [*leaves, *seen.values(), *(mark for _, mark in statuses)]
    gradients: tuple[Tensor | None, ...] = (None,) * len(asked)
    if target.requires_grad:  # a program may cut everything off
        gradients = torch.autograd.grad(target, asked, allow_unused=True)
    at = {
        name: x.detach() * (torch.zeros_like(x) if g is None else g)
        for (name, x), g in zip(seen.items(), gradients[len(leaves) :], strict=False)
        if g is not None or not program.latent  # what is above a latent unit has no relevance
    }
    marks = gradients[len(leaves) + len(seen) :]
    met = [said for (said, _), g in zip(statuses, marks, strict=True) if g is not None]
    first = torch.zeros_like(leaves[0]) if gradients[0] is None else gradients[0]
    tokens = (leaves[0] * first).detach().sum(-1)
    size = max((float(r.abs().max()) for r in at.values()), default=0.0)
    said = rank(met)
    if world.plain and said == "none":  # the gradient of calculus is right for anything
        said = "may"
    return Reference(logits.detach(), tokens, at, said, size)


def _layers(part: Part, program: Program) -> tuple[int, ...]:
    """The blocks where a part acts: a native hook is on the module, wherever it stands."""
    native = part.kind in ("after", "before", "backward")
    for other in program.parts if native else ():
        if other.kind == "module" and other.place == part.place and part.layers[0] in other.layers:
            return other.layers
    return part.layers


def _put(
    world: World,
    part: Part,
    env: Env,
    statuses: list[Status],
    kept: dict[str, Tensor],
    layers: tuple[int, ...],
) -> None:
    for layer in layers:
        if part.kind == "module":
            world.modules[part.place, layer] = partial(_module, part, env, statuses)
            continue
        if part.other:
            _keep(world, part.other, kept)
        run = partial(_hook, part, env, kept, statuses)
        if part.kind == "edit":
            whole = part.place.startswith(("ln_final", "embed"))
            _then(world.edits, part.place if whole else f"blocks.{layer}.{part.place}", run)
        else:
            table = world.before if part.kind == "before" else world.after
            _then(table, (part.place, layer), run)


def _then(table: dict[Any, Function], key: Any, run: Function) -> None:
    """One hook after the other."""
    first = table.get(key)
    table[key] = run if first is None else lambda x: run(first(x))


def _marked(y: Tensor, said: str, statuses: list[Status]) -> Tensor:
    """``y``, with a note of what may be expected where it is on the path."""
    mark = torch.zeros((), dtype=y.dtype, requires_grad=True)
    statuses.append((said, mark))
    return y + mark


def _keep(world: World, name: str, kept: dict[str, Tensor]) -> None:
    def keep(x: Tensor) -> Tensor:
        kept[name] = x
        return x

    _then(world.edits, name, keep)


def _hook(
    part: Part, env: Env, kept: dict[str, Tensor], statuses: list[Status], x: Tensor
) -> Tensor:
    if part.kind == "backward":  # one that changes the gradient is refused, or changed nothing
        return _marked(x, "sure" if part.code[-1].args[0] == "looks" else "may", statuses)
    inputs = [x, kept[part.other]] if part.other else [x]
    form = "real" if env.composite == "GradientTimesInput" else "rule"
    return _marked(run_code(part.code, env, inputs, form), status(part.code, "hook"), statuses)


def _module(part: Part, env: Env, statuses: list[Status], x: Tensor) -> Tensor:
    """A replaced module under the rule that its declaration gives it."""

    def real(x: Tensor) -> Tensor:
        return run_code(part.code, env, [x], "real")

    if part.declared in MODES:
        form = "real" if env.composite == "GradientTimesInput" else "rule"
        y, said = run_code(part.code, env, [x], form), status(part.code, MODES[part.declared])
    elif part.declared == "plain":
        y, said = real(x), "sure"
    elif part.declared == "identity":
        y, said = rules.passing(real(x.detach()), x), is_elementwise(real, x)
    else:
        centred = part.declared == "norm centred"
        bias = bias_of(part, env)
        y = real(x.detach()) - (0.0 if bias is None else bias)
        inner = x - x.mean(-1, keepdim=True) if centred else x
        said = is_norm(y, inner)
        y = rules.passing(y, inner) + (0.0 if bias is None else bias)
    return _marked(y, said, statuses)


def is_elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """Whether each output depends on its own input alone, and 0 gives 0."""
    x = x.detach()[:1]
    n = x.numel()
    base, step = function(x), 1e-3
    if base.shape != x.shape:
        return "none"
    moved = function(x + step * torch.eye(n, dtype=x.dtype).view(n, *x.shape[1:]))
    change = (moved - base).reshape(n, n).abs()
    own = change.diagonal().max()
    others = (change - torch.diag(change.diagonal())).max()
    at_zero = function(torch.zeros_like(x)).abs().max()
    worst = max(float(others / (own + 1e-30)), float(at_zero))
    return "sure" if worst < EXACT else "none" if worst > NEAR else "may"


def is_norm(y: Tensor, x: Tensor) -> str:
    """Whether y is x times a gain for each feature and a scale for each position."""
    y, x = (t.detach().reshape(-1, t.shape[-1]) for t in (y, x))
    worst = 0.0
    for i in range(len(x)):
        for j in range(i):
            u, v = y[i] * x[j], y[j] * x[i]
            sine = (u * v.norm() ** 2 - v * (u @ v)).norm() / (u.norm() * v.norm() ** 2 + 1e-30)
            worst = max(worst, float(sine) ** 2)
    return "sure" if worst < EXACT else "none" if worst > NEAR else "may"

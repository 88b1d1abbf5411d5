"""Does the generator find an engine that is broken? Coverage and balance, broken in many ways.

Each mutation takes one guard of the engine away. ``python -m tests.property.mutations`` judges the
programs of one seed after another until one is wrong that is right or refused without the mutation,
and prints the table: what was broken, and the seed at which it was found. Much of what coverage
lets through is still refused by the balance check, so each is tried without that one as well. With
the journals of long runs, only programs are tried whose verdict depends on the guard.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lenslrp import graph_check, passes
from lenslrp.hooks import assignment, checks, components, graph_walk, norms, view_writes
from lenslrp.hooks.handles import Attached
from tests.property.generate import generate
from tests.property.judge import Verdict, judge

Patch = pytest.MonkeyPatch


def copy_slices_are_linear(patch: Patch) -> None:
    patch.setattr(graph_walk, "LINEAR_NODES", graph_walk.LINEAR_NODES | {"CopySlices"})


def written_products_are_linear(patch: Patch) -> None:
    patch.setattr(
        view_writes,
        "LINEAR_IN_PLACE_FUNCTIONS",
        view_writes.LINEAR_IN_PLACE_FUNCTIONS | {"mul_", "__imul__"},
    )
    patch.setattr(view_writes, "SCALING_FUNCTIONS", frozenset())


def python_functions_are_accepted(patch: Patch) -> None:
    wants = graph_walk._wants

    def accepting(node: Any, *rest: Any) -> str:
        python = isinstance(node, torch.autograd.function.BackwardCFunction)
        return "" if python else wants(node, *rest)

    patch.setattr(graph_walk, "_wants", accepting)


def products_have_one_factor(patch: Patch) -> None:
    patch.setattr(graph_walk, "_factors", lambda node, name: 1)


def quotients_are_linear(patch: Patch) -> None:
    patch.setattr(graph_walk, "QUOTIENT_NODES", frozenset())
    patch.setattr(graph_walk, "LINEAR_NODES", graph_walk.LINEAR_NODES | {"Div"})


def functions_are_linear(patch: Patch) -> None:
    patch.setattr(
        graph_walk,
        "LINEAR_NODES",
        graph_walk.LINEAR_NODES | {"Sigmoid", "Exp", "Erf", "Cos", "Sin"},
    )


def clips_are_linear(patch: Patch) -> None:
    patch.setattr(graph_walk, "_clips", lambda node: False)


def rules_off_the_path_are_ignored(patch: Patch) -> None:
    patch.setattr(graph_check, "_pools", lambda site: True)


def _walk(patch: Patch, change: Callable[[Any], None]) -> None:
    walk = graph_walk.walk

    def walking(*args: Any, **kwargs: Any) -> Any:
        found = walk(*args, **kwargs)
        change(found)
        return found

    patch.setattr(graph_walk, "walk", walking)


def misplaced_rules_are_ignored(patch: Patch) -> None:
    def forget(found: Any) -> None:
        found.misplaced.clear()
        found.leaks.clear()  # a share that never meets its operation leaks as well

    _walk(patch, forget)


def shares_may_leak(patch: Patch) -> None:
    _walk(patch, lambda found: found.leaks.clear())


def gaps_are_ignored(patch: Patch) -> None:
    _walk(patch, lambda found: found.gaps.clear())


def nothing_need_balance(patch: Patch) -> None:
    patch.setattr(passes.Pass, "_unbalanced", lambda *_: "")


def norms_are_believed(patch: Patch) -> None:
    patch.setattr(checks, "norm_form", lambda *_: "exact")


def activations_are_believed(patch: Patch) -> None:
    patch.setattr(checks, "form_of", lambda *_: "exact")


def classes_are_matched_by_inheritance(patch: Patch) -> None:
    """A sub-class counts as its base, and its values are not looked at."""

    def inherited(module: nn.Module) -> Any:
        known = {*components.ACTIVATION_FORWARDS, *norms.LAYER_NORMS}
        forwards = [getattr(base, "forward", None) for base in type(module).__mro__]
        return next((forward for forward in forwards if forward in known), forwards[0])

    patch.setattr(assignment, "known_forward", inherited)
    patch.setattr(components, "known_forward", inherited)
    patch.setattr(norms, "known_forward", inherited)
    activations_are_believed(patch)


def hooks_vanish_into_rules(patch: Patch) -> None:
    """A rule cuts the graph around a module's hooks, and not around its forward."""

    def wrap(self: Attached, module: nn.Module, apply: Any) -> None:
        inputs: list[Any] = []

        def before(_: nn.Module, args: Any) -> Any:
            inputs.append(args[0])
            return (args[0].detach(), *args[1:])

        self.undo.append(module.register_forward_pre_hook(before, prepend=True).remove)
        self.undo.append(
            module.register_forward_hook(lambda _, args, y: apply(inputs.pop(), y)).remove
        )

    patch.setattr(Attached, "wrap", wrap)


MUTATIONS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "CopySlices counts as linear": (copy_slices_are_linear, r"rule: \w+_$|write"),
    "a product written in place counts as linear": (written_products_are_linear, "rule: mul_"),
    "any function written in Python is accepted": (
        python_functions_are_accepted,
        "rule: (Tripled|Add|Clone)$",
    ),
    "a product of two live factors is accepted": (products_have_one_factor, "rule: (Mul|Bmm|Addc)"),
    "a live denominator is accepted": (quotients_are_linear, "rule: Div"),
    "sigmoid, exp, erf, cos and sin count as linear": (
        functions_are_linear,
        "rule: (Sigmoid|Exp|Erf|Cos|Sin)",
    ),
    "a clamp counts as linear whatever it clips": (clips_are_linear, "rule: Clamp"),
    "operations without a rule are ignored": (gaps_are_ignored, "no rule"),
    "rules that are off the path are ignored": (rules_off_the_path_are_ignored, "graph is cut"),
    "rules above no operation of theirs are ignored": (
        misplaced_rules_are_ignored,
        "without its operation|beside|uniform at",
    ),
    "a product's share may reach what is beside it": (shares_may_leak, "beside|uniform at"),
    "the ledger need not balance": (nothing_need_balance, "balance"),
    "norms are believed to be what their class says": (norms_are_believed, "norm|Sqrt|Pow"),
    "declared functions are believed to be element-wise": (activations_are_believed, "map each"),
    "activations are matched by inheritance": (classes_are_matched_by_inheritance, "^$|no rule"),
    "native hooks vanish into the rule": (hooks_vanish_into_rules, "^$"),
}
"""What is broken: how, and for what reason its programs are refused (or "", right) otherwise."""

BALANCE = "the ledger need not balance"
"""The second guard behind every other: what coverage lets through seldom balances."""


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """The engine with one guard taken away, for the length of the block."""
    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[name][0](patch)
        yield


Found = tuple[int, str, Verdict] | None
Task = tuple[int, str]


def search(names: tuple[str, ...], tasks: Iterable[Task]) -> Found:
    """The first seed whose program is given wrong relevance with the mutations and not without."""
    for seed, dtype in tasks:
        program = generate(seed, dtype)
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(mutated(name))
            verdict = judge(program)
        wrong = verdict.kind == "wrong" and verdict.reason != "a raw error"
        if wrong and judge(program).kind != "wrong":
            return seed, dtype, verdict
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=1000, help="how many programs at most")
    parser.add_argument("--journal", type=Path, nargs="*", default=[], help="of long runs")
    parser.add_argument("--only", default="", help="mutations with this in their name")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = [json.loads(text) for path in given.journal for text in path.read_text().splitlines()]
    print("| broken | found at seed | without the balance check as well |\n|---|---|---|")
    missed = 0
    for name, (_, reason) in MUTATIONS.items():
        if given.only not in name:
            continue
        tasks = [(seed, "float64") for seed in range(given.count)]
        if lines:  # only what the guard that is taken away has refused, or let through
            met = [line for line in lines if re.search(reason, line["reason"])]
            met = [line for line in met if reason != "^$" or "hook" in line["features"]]
            tasks = [(line["seed"], line["dtype"]) for line in met][: given.count]
        alone = search((name,), tasks)
        both = None if name == BALANCE else search((name, BALANCE), tasks)
        missed += alone is None and both is None
        print(f"| {name} | {_said(alone, len(tasks))} | {_said(both, len(tasks))} |", flush=True)
    return missed


def _said(found: Found, count: int) -> str:
    if found is None:
        return f"not in {count}"
    seed, dtype, verdict = found
    return f"{seed}{'' if dtype == 'float64' else f' ({dtype})'}: {verdict.reason}"


if __name__ == "__main__":
    sys.exit(main())

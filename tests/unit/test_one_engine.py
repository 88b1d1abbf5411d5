"""One engine runs the model: a search of the code for whatever else might."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from docs.import_graph import modules
from tests.conftest import ROOT

ENGINE = {
    f"lenslrp/{name}.py"
    for name in (
        *("sessions", "held_rules", "run", "forward", "running", "passes"),
        *("leaves", "logits", "edits"),
    )
}
"""The files that run the model, beside those of ``hooks/``."""

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("lenslrp/models/verifying.py", "reference"): (
        "the comparison before wrapping: what Hugging Face's model gives, which is no bridge yet"
    ),
    ("lenslrp/writing.py", "greedy"): (
        "generation: Hugging Face's loop, with its own key-value cache, writes the model's text"
    ),
    ("analysis/steering/sweeps.py", "_Prompts.read"): (
        "generation: TransformerLens' loop writes the continuations that are read"
    ),
    ("lenslrp/models/sounds.py", "sum_at_hook_points"): (
        "loading: transformers' own record of its layers' outputs, moved to the blocks' hook points"
    ),
    ("lenslrp/followed.py", "follow"): (
        "generation: says which tokens its passes are of, whoever runs them; it runs none itself"
    ),
}
"""What else may run a model, by file and function, and why."""

MODELS = {"model", "bridge", "wrapped", "original_model", "hf_model"}
"""What models are called, as names and as attributes."""

SESSIONS = {"Session", "session"}
HOOKS = re.compile(r"hooks|run_with_\w+|add_hook|add_perma_hook|register_\w*hook")


def _last(node: ast.AST) -> str:
    """The last name of ``a.b.c``."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _opens(node: ast.AST | None) -> bool:
    """Whether something is a call that opens a session, or such a call entered into a stack."""
    if not isinstance(node, ast.Call):
        return False
    return _last(node.func) in SESSIONS or any(_opens(argument) for argument in node.args)


def _sessions(tree: ast.AST) -> set[str]:
    """The names under which a file has sessions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and _opens(node.context_expr):
            names.add(_last(node.optional_vars) if node.optional_vars else "")
        elif isinstance(node, ast.Assign) and _opens(node.value):
            names |= {_last(target) for target in node.targets}
        elif isinstance(node, ast.arg) and node.annotation and _last(node.annotation) in SESSIONS:
            names.add(node.arg)
    return names


def runs(source: str) -> Iterator[tuple[str, int, str]]:
    """Function, line and text of every call that hooks a model or runs it."""
    tree = ast.parse(source)
    sessions = _sessions(tree)

    def is_model(node: ast.AST) -> bool:
        if isinstance(node, ast.BoolOp):
            return any(is_model(value) for value in node.values)
        return _last(node) in MODELS

    def runs_it(func: ast.AST) -> bool:
        name = _last(func)
        inside = func.value if isinstance(func, ast.Attribute) else None
        if is_model(func):
            return True
        if inside is not None and is_model(inside) and name in ("forward", "generate"):
            return True
        of_session = inside is not None and _last(inside) in sessions
        return bool(HOOKS.fullmatch(name)) and not of_session

    def visit(node: ast.AST, place: str) -> Iterator[tuple[str, int, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            place = f"{place}.{node.name}".lstrip(".")
        if isinstance(node, ast.Call) and runs_it(node.func):
            yield place, node.lineno, ast.unparse(node.func)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, place)

    yield from visit(tree, "")


def everywhere() -> Iterator[tuple[str, str, int, str]]:
    for path in modules().values():
        name = path.relative_to(ROOT).as_posix()
        if name not in ENGINE and not name.startswith("hooks/"):
            yield from ((name, *found) for found in runs(path.read_text(encoding="utf-8")))


def test_the_engine_alone_runs_the_model() -> None:
    others = [
        f"{file}:{line} in {place or 'the module'}: {call}(...)"
        for file, place, line, call in everywhere()
        if (file, place) not in EXCEPTIONS
    ]
    assert not others, "\n".join(others)


def test_exceptions_are_few_argued_and_needed() -> None:
    found = {(file, place) for file, place, _, _ in everywhere()}
    assert EXCEPTIONS.keys() <= found
    assert len(EXCEPTIONS) <= 6
    assert all(len(reason.split()) > 5 for reason in EXCEPTIONS.values())


@pytest.mark.parametrize(
    "call",
    [
        "model(tokens)",
        "self.model(tokens)",
        "question.model(tokens)",
        "bridge.original_model(tokens)",
        "(run or model)(tokens)",
        "model.forward(tokens)",
        "model.original_model.generate(tokens)",
        "model.hooks(fwd_hooks=[])",
        "model.run_with_cache(tokens)",
        "lenslrp.run_with_relevance(model, text)",
        "run_with_relevance(model, text)",
        "point.add_hook(see)",
        "module.register_forward_hook(see)",
        "module.register_full_backward_pre_hook(see)",
        "x.register_hook(see)",
    ],
)
def test_each_way_to_run_a_model_is_found(call: str) -> None:
    source = (
        f"class A:\n    def f(self):\n        with torch.no_grad():\n            y = [{call}]\n"
    )
    assert [(place, line) for place, line, _ in runs(source)] == [("A.f", 4)]


@pytest.mark.parametrize(
    "source",
    [
        "with Session(model) as s:\n    s.run_with_relevance(text)",
        "with lenslrp.session(model) as s:\n    s.run_with_relevance(text)",
        "s = stack.enter_context(Session(model))\ns.run_with_relevance(text)",
        "def f(s: Session) -> None:\n    s.run_with_relevance(text)",
        "with forward(model, batch) as run:\n    run.logits",
        "model.eval()\nhook_points(model)\nnorm(x)",
    ],
)
def test_what_the_engine_is_asked_for_is_not(source: str) -> None:
    assert not list(runs(source))

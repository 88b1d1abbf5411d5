"""What worked with 0.1 works: names, parameters, members, modules of its pages, options.

``public_interface_0_1.json`` was read off 0.1. Names may be added to the library; those of the file
stay, with their parameters under the same names and at the same positions.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import warnings
from collections.abc import Mapping
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lenslrp.hooks
import lenslrp.targets
from lenslrp.cli.commands import main
from lenslrp.former import FormerModule

FORMER = json.loads(Path(__file__).with_name("public_interface_0_1.json").read_text("utf-8"))
POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
GONE = object()
DOCUMENTED = [(module, name) for module, names in FORMER["documented"].items() for name in names]


def losses(where: str, namespace: Any, names: Mapping[str, Any]) -> list[str]:
    """What a module or class no longer has or takes, of its ``names`` in 0.1."""
    lost = []
    for name, entry in names.items():
        call, members = (
            (entry["call"], entry["members"]) if isinstance(entry, dict) else (entry, {})
        )
        try:
            value = inspect.getattr_static(namespace, name)
        except AttributeError:
            value = getattr(namespace, name, GONE)  # a module may import it when asked
        if value is GONE and name not in getattr(namespace, "__dataclass_fields__", {}):
            lost.append(f"{where}.{name} is gone")
            continue
        value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if call is not None:
            lost += [f"{where}.{name}: {loss}" for loss in refused(call, value)]
        lost += losses(f"{where}.{name}", value, members)
    return lost


def refused(call: str, function: Any) -> list[str]:
    """Calls by the signature ``call``, as in ``(a, *, b=...)``, that ``function`` does not take."""
    former = ast.parse(f"def f{call}: pass").body[0]
    assert isinstance(former, ast.FunctionDef)
    arguments = former.args
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = {a.arg for a in positional[len(positional) - len(arguments.defaults) :]}
    optional |= {
        a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d
    }
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    by_position = [p.name for p in parameters.values() if p.kind in POSITIONAL]
    by_name = {p.name for p in parameters.values() if p.kind in NAMED}

    lost = []
    for position, argument in enumerate(positional):
        if by_position[position : position + 1] != [argument.arg]:
            lost.append(f"{argument.arg} is not parameter {position}")
    lost += [
        f"{argument.arg} is not taken by name"
        for argument in [*arguments.args, *arguments.kwonlyargs]
        if argument.arg not in by_name and Parameter.VAR_KEYWORD not in kinds
    ]
    known = {argument.arg for argument in [*positional, *arguments.kwonlyargs]}
    for parameter in parameters.values():
        required = parameter.default is Parameter.empty and parameter.kind in {*POSITIONAL, *NAMED}
        if required and (parameter.name not in known or parameter.name in optional):
            lost.append(f"{parameter.name} is required")
    for many, kind in (
        (arguments.vararg, Parameter.VAR_POSITIONAL),
        (arguments.kwarg, Parameter.VAR_KEYWORD),
    ):
        if many and kind not in kinds:
            lost.append(f"{many.arg} is not taken")
    return lost


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


@pytest.mark.parametrize("module", FORMER["names"])
def test_names_parameters_and_members(module: str) -> None:
    assert losses(module, import_module(module), FORMER["names"][module]) == []


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
def test_what_pages_imported(module: str, name: str) -> None:
    home = import_module(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert getattr(home, name, GONE) is not GONE
    warned = [str(w.message) for w in caught if w.category is DeprecationWarning]
    assert [message.split(" is ")[0] for message in warned] == (
        [f"{module}.{name}"] if isinstance(home, FormerModule) else []
    )


@pytest.mark.parametrize("command", FORMER["commands"])
def test_options_of_the_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split()[1:], "--help"])
    assert ended.value.code == 0
    assert set(FORMER["commands"][command]) - options(capsys.readouterr().out) == set()


def test_a_loss_is_noticed() -> None:
    """Names, members and parameters taken away from a copy of :mod:`lenslrp.targets`."""

    def without(**changes: Any) -> list[str]:
        copy = SimpleNamespace(**{n: getattr(lenslrp.targets, n) for n in names} | changes)
        for name in [name for name, value in changes.items() if value is None]:
            delattr(copy, name)
        return losses("targets", copy, names)

    class Logit:
        def __init__(self, position: int, token: int, scale: float) -> None: ...

    names = FORMER["names"]["lenslrp.targets"]
    assert without() == []
    assert without(Logit=None) == ["targets.Logit is gone"]
    lost = without(Logit=Logit)
    assert "targets.Logit: token is not parameter 0" in lost
    assert "targets.Logit: scale is required" in lost
    assert "targets.Logit.values is gone" in lost
    assert refused("(a, b=..., *, c=...)", lambda a, b=1, *, c=2, d=3: None) == []
    assert refused("(a, b=..., *, c=...)", lambda a, b, **rest: None) == ["b is required"]
    assert refused("(a, *, c=...)", lambda a: None) == ["c is not taken by name"]
    assert refused("(a, *more)", lambda a: None) == ["more is not taken"]
    assert options("lenslrp explain [-h] [--batch-size N]") == {"-h", "--batch-size"}

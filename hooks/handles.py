"""What is attached to a model, and how it is undone: hooks, attributes, settings, weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lenslrp.errors import InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.sites import Site

Undo = Callable[[], None]


def undo_all(undo: list[Undo]) -> list[BaseException]:
    """Undo everything, the last thing first, and empty the list; returns what failed.

    A step that fails keeps no other from running. What failed, and what an interrupt cut short, is
    tried once more, so a step may run twice.
    """
    failed: list[BaseException] = []
    try:
        _undo(undo, failed)
    finally:
        _undo(undo, [])
        undo.clear()
    return failed


def _undo(undo: list[Undo], failed: list[BaseException]) -> None:
    for index in reversed(range(len(undo))):
        try:
            undo[index]()
        except BaseException as error:  # noqa: BLE001 - raised once all the rest is undone
            failed.append(error)
        else:
            del undo[index]


def raise_failed(failed: list[BaseException]) -> None:
    """Raise what :func:`undo_all` returned."""
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise BaseExceptionGroup("several steps of undoing failed", failed)


@dataclass
class Holder:
    """The thread whose passes may run what is attached; a session's calls come from any."""

    thread: int = field(default_factory=get_ident)


class ThreadBound:
    """A hook or method of a rule: for the thread that holds the model only, and never copied."""

    def __init__(self, function: Callable[..., Any], holder: Holder) -> None:
        self.function, self.holder = function, holder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if get_ident() != self.holder.thread and not _is_autograds_thread():
            raise RuntimeError(
                "this model has relevance rules attached by another thread; wait until its "
                "relevance_rules block ends, or use a model of your own"
            )
        return self.function(*args, **kwargs)

    def __reduce__(self) -> Any:  # what copy.deepcopy and pickle call
        raise InputError(
            "this model has relevance rules attached, which a copy of it would keep for good; "
            "call copy.deepcopy outside the relevance_rules block"
        )


def _is_autograds_thread() -> bool:
    """Whether this is a thread of autograd's own: on a GPU, a backward pass runs in one.

    A checkpointed block runs forward there once more, for the thread that has called backward.
    """
    threads = threading.enumerate()
    python = {t.ident for t in threads if not isinstance(t, threading._DummyThread)}
    return torch._C._current_graph_task_id() != -1 and get_ident() not in python


class Attached:
    """Sites created so far and how to undo them, in order.

    How a step is undone is noted before it is taken, so that an interrupt loses nothing.
    """

    def __init__(self, copies: bool = False, holder: Holder | None = None) -> None:
        self.copies = copies  # of what something may write to in place
        self.holder = Holder() if holder is None else holder
        self.sites: list[Site] = []
        self.undo: list[Undo] = []
        self.weights: dict[int, str] = {}  # of layers with a linear rule: address -> path
        self.wrapped: set[int] = set()  # modules that a norm's bridge wraps: their ids
        self.replaced: dict[int, Site] = {}  # wrapped norms that have their rule: id -> its site
        self.edits: list[Any] = []  # meters of the user's own hooks
        self.changed: list[str] = []  # modules whose backward hooks have changed a gradient
        self.plain: dict[int, list[bool]] = {}  # wrapped norms left plain: id -> is it running?

    def hook(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """As ``register_forward_hook``."""
        self._register(module, "_forward_hooks", hook, options)

    def first_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """A hook ahead of the user's own: what they do is above it on the graph."""
        self._register(module, "_forward_hooks", hook, {}, first=True)

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """As ``register_forward_pre_hook``."""
        self._register(module, "_forward_pre_hooks", hook, options)

    def first_pre_hook(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """Ahead of the user's own hooks on what the module is given."""
        self._register(module, "_forward_pre_hooks", hook, options, first=True)

    def _register(
        self,
        module: nn.Module,
        kind: str,
        hook: Callable[..., Any],
        options: dict[str, bool],
        *,
        first: bool = False,
    ) -> None:
        """Past torch's own functions, whose handle an interrupt could lose (and twice as fast)."""
        callback = ThreadBound(hook, self.holder)
        key = id(callback)  # torch's keys are counted from 0
        marks = {"with_kwargs": f"{kind}_with_kwargs", "always_call": f"{kind}_always_called"}
        for option in options:
            marked = getattr(module, marks[option])
            self.undo.append(partial(marked.pop, key, None))
            marked[key] = True
        hooks = getattr(module, kind)
        self.undo.append(partial(hooks.pop, key, None))
        hooks[key] = callback
        if first:
            hooks.move_to_end(key, last=False)

    def meter(self, module: nn.Module, measure: Callable[[Any], None]) -> None:
        """See what the module itself returns, ahead of any hook of the user's."""

        def hook(_: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
            measure(y)
            return y.clone() if self.copies else None  # a write into a view loses its hooks

        self.first_hook(module, hook)

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Shadow an attribute of one instance, past nn.Module's and the bridge's own setters."""
        had, old = name in module.__dict__, module.__dict__.get(name)

        def restore() -> None:
            if had:
                module.__dict__[name] = old
            else:
                module.__dict__.pop(name, None)

        self.undo.append(restore)
        module.__dict__[name] = ThreadBound(value, self.holder) if callable(value) else value

    def setting(self, config: Any, name: str, value: Any) -> None:
        """Change a setting of a configuration."""
        self.undo.append(partial(setattr, config, name, getattr(config, name)))
        setattr(config, name, value)

    def guard(self, module: nn.Module) -> None:
        """Refuse other threads' passes through a module."""
        self.pre_hook(module, _nothing)

    def freeze(self, weight: nn.Parameter) -> None:
        """Keep a weight off the graph; a backward pass that would lose its gradient is refused."""

        def thaw() -> None:
            weight.requires_grad_(True)
            # The emptied dict stays: another thread's backward pass may be reading it.
            hooks = weight._backward_hooks or {}
            for key in [key for key, hook in hooks.items() if hook is _refuse_gradient]:
                hooks.pop(key, None)

        self.undo.append(thaw)
        weight.register_hook(_refuse_gradient)
        weight.requires_grad_(False)

    def around(self, module: nn.Module, call: Callable[..., Any], name: str = "forward") -> None:
        """Have ``call(run, x, *args, **kwargs)`` in the place of a method, the module's forward.

        Hooks of the user's, on the module itself too, stay outside it and on the graph.
        """
        run = getattr(module, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            if args:
                return call(run, *args, **kwargs)
            first = next(iter(kwargs))  # a caller that names its first argument
            return call(lambda x, **rest: run(**{first: x}, **rest), kwargs.pop(first), **kwargs)

        self.attribute(module, name, method)

    def wrap(self, module: nn.Module, apply: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        """Cut the graph through ``module``; ``apply(x, y)`` puts a rule in its place.

        Where it gives ``None`` instead, the module does not compute what the rule supposes, and
        stays on the graph.
        """
        in_place = bool(getattr(module, "inplace", False))

        def call(run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            before = x.clone() if in_place else x
            y = run(before.detach().clone() if in_place else x.detach(), *args, **kwargs)
            ruled = apply(before, y)
            if ruled is None:
                return run(x, *args, **kwargs)
            return x.copy_(ruled) if in_place else ruled

        self.around(module, call)

    def region(
        self, module: nn.Module, site: Site, bias: Callable[[Tensor], Tensor | None]
    ) -> None:
        """Mark a module as plain: its inside is on the graph, and its in and out are measured.

        ``bias`` of the output is the constant in it, in a shape that the output broadcasts.
        """
        self.sites.append(site)

        def call(run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = run(F.apply(F.RegionInput, x, "plain", site), *args, **kwargs)
            return F.apply(F.RegionOutput, y, bias(y), "plain", site)

        self.around(module, call)


def _nothing(*_: Any) -> None:
    """What guards a module does nothing else."""


def _refuse_gradient(_: Tensor) -> None:
    raise RuntimeError(
        "a backward pass reached a weight of a model that has relevance rules attached, which "
        "freeze it: its gradient would be lost. Call backward before the relevance_rules block or "
        "after it"
    )

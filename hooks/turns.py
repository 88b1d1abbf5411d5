"""Threads take turns with a model: one holds it at a time, with rules attached or without.

A turn is held by a block, not by a thread: a generator that holds one may be closed, or collected,
by any thread and at any moment, also while this file's own code runs. So blocks only say what is
wanted, and :meth:`Turns._settle` attaches and detaches until the model is as the innermost block
wants it; it goes on from wherever an exception or an interrupt has stopped it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

from lenslrp.errors import InputError
from lenslrp.hooks.handles import raise_failed

PATIENCE = 1.0
"""Seconds of waiting after which a thread says so."""

logger = logging.getLogger("lenslrp")


class Attachable(Protocol):
    """What a block attaches to its model."""

    def attach(self) -> None: ...

    def detach(self) -> list[BaseException]:
        """Undo :meth:`attach`, however far it went; returns what failed."""


@dataclass(eq=False)
class Turn:
    """A block of code that has a model to itself, apart from blocks inside it.

    Attributes:
        rules: what is attached inside it.
        thread: whose passes may run what is attached.
        stays: a session's: it is there between the calls, and keeps only others from the model.
        within: the session's block that this one is a call of, from any thread.
    """

    rules: Attachable | None = None
    thread: threading.Thread = field(default_factory=threading.current_thread)
    stays: bool = False
    within: Turn | None = None


class Turns:
    """The blocks that hold one model, innermost last, and what is attached to it."""

    def __init__(self) -> None:
        self.blocks: list[Turn] = []
        self._attached: Attachable | None = None
        self._settled = True
        self._settling = False
        self._changed = threading.Condition()  # around an RLock: a collected block may come back

    def begin(self, block: Turn) -> None:
        """Wait until no other thread holds the model, then hold it."""
        with self._changed:
            waited = False
            while self._taken_from(block):
                if not self._changed.wait(PATIENCE) and not waited:
                    waited = True
                    logger.warning(
                        "%s waits for its turn with a model that %s holds (threads take turns; a "
                        "relevance_rules block, or a generator that is in one, holds a model until "
                        "it ends)",
                        block.thread.name,
                        self.blocks[-1].thread.name,
                    )
            self.blocks.append(block)
            self._settle()

    def end(self, block: Turn) -> None:
        """Hold the model no longer, from any thread; a second call does what the first left."""
        with self._changed:
            if block in self.blocks:
                self.blocks.remove(block)
            self._changed.notify_all()
            self._settle()

    def renew(self, rules: Attachable) -> None:
        """Attach the rules anew, after the model has changed."""
        with self._changed:
            self._settled = self._settled and self._attached is not rules
            self._settle()

    def _taken_from(self, block: Turn) -> bool:
        """Whether another thread holds the model; one that has ended gives no block back.

        Raises:
            InputError: by a session that is not the block's own.
        """
        holder = self.blocks[-1] if self.blocks else block
        if holder.thread is block.thread or not holder.thread.is_alive():
            return False
        for other in self.blocks:
            if other.stays and other is not block.within and other.thread is not block.thread:
                raise InputError(
                    f"{other.thread.name} has a session open on this model, which keeps its rules "
                    "attached: call that session (any thread may), or close it first "
                    "(session.close())"
                )
        return holder is not block.within

    def _settle(self) -> None:
        if self._settling:  # in the middle of it, a block was collected: the loop below sees to it
            return
        failed: list[BaseException] = []
        try:
            try:
                self._settling = True
                while not (self._settled and self._attached is self._wanted()):
                    self._settled = False
                    if self._attached is not None:
                        failed += self._attached.detach()
                    self._attached = self._wanted()
                    if self._attached is not None:
                        self._attached.attach()
                    self._settled = True
            finally:
                self._settling = False
        finally:
            self._settling = False  # once more, for an interrupt just before the first
        raise_failed(failed)

    def _wanted(self) -> Attachable | None:
        return next((b.rules for b in reversed(self.blocks) if b.rules is not None), None)


# Weak, so that it keeps no model alive.
_turns: WeakKeyDictionary[nn.Module, Turns] = WeakKeyDictionary()
_registry = threading.RLock()


def turns_of(model: nn.Module) -> Turns:
    """The blocks that hold ``model``."""
    with _registry:
        if model not in _turns:
            _turns[model] = Turns()
        return _turns[model]


def in_force(model: nn.Module) -> bool:
    """Whether relevance rules are attached to a model."""
    return any(block.rules is not None for block in turns_of(model).blocks)


@contextmanager
def turn(
    model: nn.Module, rules: Attachable | None = None, within: Turn | None = None
) -> Iterator[None]:
    """Hold ``model`` for the length of the block: other threads wait to attach rules, or to run it.

    Blocks of one thread may be nested, and left in any order; the innermost ``rules`` are attached.
    A pass that does not ask for its turn is not kept from running, unless rules are attached.
    """
    turns, block = turns_of(model), Turn(rules, within=within)
    try:
        try:
            turns.begin(block)
            yield
        finally:
            turns.end(block)
    finally:
        turns.end(block)  # an interrupt may have cut the first short

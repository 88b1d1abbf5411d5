"""Blocks that hold a model's turn: ended, nested and collected in any order, by any thread."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lenslrp
from lenslrp.hooks import install
from lenslrp.hooks.handles import Attached
from tests.unit.another_thread import PATIENCE, Worker, another_thread
from tests.unit.core.test_threads import explain, jobs, same
from tests.unit.tiny import TOKENS, changes, snapshot, tiny


def held(model: Any) -> Generator[None, None, None]:
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        yield


ENDINGS: dict[str, Callable[[Generator[None, None, None]], None]] = {
    "closed": lambda block: block.close(),
    "run to its end": lambda block: next(block, None),
    "thrown into": lambda block: _throw(block),
}


class Boom(Exception):
    pass


def _throw(block: Generator[None, None, None]) -> None:
    with contextlib.suppress(Boom):
        block.throw(Boom())


@pytest.mark.parametrize("how", ENDINGS)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a block of the other thread"])
def test_a_block_may_be_ended_by_another_thread(how: str, inside: bool) -> None:
    model = tiny("llama")
    expected = explain(model, jobs()[0])
    before = snapshot(model)
    with another_thread("one") as one, another_thread("two") as two:
        block = held(model)
        one.do(next, block)
        if inside:
            inner = held(model)
            one.do(next, inner)
        two.do(ENDINGS[how], block)
        if inside:
            assert same([one.do(explain, model, jobs()[0])], [expected])
            two.do(ENDINGS[how], inner)
        assert changes(before, model) == []
        for thread in (one, two):
            assert same([thread.do(explain, model, jobs()[0])], [expected])


def test_a_collected_block_leaves_nothing() -> None:
    model = tiny("llama")
    before = snapshot(model)
    with another_thread() as thread:
        block = held(model)
        next(block)
        cycle: list[Any] = [block]
        cycle.append(cycle)
        del block, cycle
        thread.do(gc.collect)
        assert changes(before, model) == []
        thread.do(explain, model, jobs()[0])


@pytest.mark.parametrize("moment", ["attaching", "detaching"])
def test_a_block_that_is_collected_while_another_is_attached_leaves_nothing(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector runs at any moment."""
    model = tiny("llama")
    before = snapshot(model)
    blocks = [held(model)]
    next(blocks[0])
    register, undo = Attached._register, install.undo_all

    def collecting(at: Attached, *args: Any, **options: Any) -> None:
        register(at, *args, **options)
        blocks.clear()

    def undoing(steps: Any) -> Any:
        blocks.clear()
        return undo(steps)

    if moment == "attaching":
        monkeypatch.setattr(Attached, "_register", collecting)
    else:
        monkeypatch.setattr(install, "undo_all", undoing)
    expected = explain(model, jobs()[0])
    monkeypatch.undo()
    assert blocks == []
    assert changes(before, model) == []
    assert same([explain(model, jobs()[0])], [expected])


def test_a_thread_that_has_ended_holds_a_model_no_longer() -> None:
    """Its block is left open in a generator: others go on, and what it attached is put aside."""
    model = tiny("llama")
    expected = explain(model, jobs()[0])
    before = snapshot(model)
    block = held(model)
    thread = threading.Thread(target=next, args=(block,))
    thread.start()
    thread.join(PATIENCE)
    with another_thread() as thread:
        got = thread.do(explain, model, jobs()[0])
    assert same([got], [expected])
    block.close()
    assert changes(before, model) == []


class Blocks:
    """The blocks that one thread has open, and one that it may be waiting to enter."""

    def __init__(self, thread: Worker) -> None:
        self.do, self.submit = thread.do, thread.submit
        self.open: list[Generator[None, None, None]] = []
        self.waiting: tuple[Future[Any], Generator[None, None, None]] | None = None

    def come_in(self) -> None:
        """The turn has come: what was waiting must go on now."""
        if self.waiting is not None:
            future, block = self.waiting
            future.result(PATIENCE)
            self.open.append(block)
            self.waiting = None


STEPS = ("enter", "explain", "plain", *ENDINGS)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.booleans(), st.integers(0, 7)), max_size=12))
def test_any_order_of_blocks_in_two_threads(steps: list[tuple[str, bool, int]]) -> None:
    """Blocks entered, nested, and ended by either thread in any order; a hang fails."""
    model, logits, expected = two_threads_model()
    before = snapshot(model)
    with another_thread("one") as one, another_thread("two") as two:
        workers = [Blocks(one), Blocks(two)]
        for step, second, index in steps:
            worker, other = workers[second], workers[not second]
            if worker.waiting is not None:
                continue
            if step in ENDINGS:
                owner = next((w for w in workers if w.open), None)
                if owner is not None:
                    worker.do(ENDINGS[step], owner.open.pop(index % len(owner.open)))
                    if not owner.open:
                        (other if owner is worker else worker).come_in()
            elif step == "enter":
                block = held(model)
                if other.open:
                    worker.waiting = worker.submit(next, block), block
                else:
                    worker.do(next, block)
                    worker.open.append(block)
            elif other.open:
                with pytest.raises(RuntimeError, match="attached by another thread"):
                    worker.do(model, TOKENS)
            elif step == "plain":
                assert torch.equal(worker.do(model, TOKENS), logits)
            else:
                assert same([worker.do(explain, model, jobs()[0])], [expected])
        while any(worker.open for worker in workers):
            owner = next(worker for worker in workers if worker.open)
            workers[0 if workers[0].waiting is None else 1].do(ENDINGS["closed"], owner.open.pop())
            if not owner.open:
                workers[workers.index(owner) - 1].come_in()
        assert changes(before, model) == []
        for worker in workers:
            assert same([worker.do(explain, model, jobs()[0])], [expected])


@functools.cache
def two_threads_model() -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
    model = tiny("llama")
    return model, model(TOKENS), explain(model, jobs()[0])

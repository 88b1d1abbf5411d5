"""Threads: runs on one model take turns and come out right; a stranger's pass is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from tests.unit.tiny import TOKENS, changes, own_relevance, snapshot, tiny

PATIENCE = 60.0


def jobs() -> list[tuple[Tensor, int, lenslrp.Composite]]:
    composites = [lenslrp.AttnLRP(), lenslrp.CPLRP(), lenslrp.GradientTimesInput()]
    return [(TOKENS.roll(shift, dims=1), 3 + shift, composites[shift % 3]) for shift in range(4)]


def explain(model: Any, job: tuple[Tensor, int, lenslrp.Composite]) -> tuple[Tensor, Tensor]:
    tokens, target, composite = job
    logits, kept = lenslrp.run_with_relevance(model, tokens, target, composite)
    assert abs(kept.ledger().error) < 1e-9
    return logits, kept.tokens


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in pairs)


def test_two_threads_on_one_model_equal_one_after_the_other() -> None:
    model = tiny("llama")
    serial = [explain(model, job) for job in jobs()]
    before = snapshot(model)
    with ThreadPoolExecutor(2) as pool:
        assert same(list(pool.map(lambda job: explain(model, job), jobs())), serial)
    assert changes(before, model) == []


def test_two_threads_on_two_models() -> None:
    models = [tiny("llama"), tiny("gpt2")]
    serial = [[explain(model, job) for job in jobs()] for model in models]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda model: [explain(model, job) for job in jobs()], models))
    assert all(same(got, expected) for got, expected in zip(both, serial, strict=True))


@pytest.mark.parametrize("how", ["forward", "run_with_cache", "generate"])
def test_a_foreign_thread_is_refused_while_rules_are_attached(how: str) -> None:
    model = tiny("llama")

    def stranger() -> None:
        with torch.no_grad():
            if how == "forward":
                model(TOKENS)
            elif how == "run_with_cache":
                model.run_with_cache(TOKENS)
            else:
                model.generate(TOKENS, max_new_tokens=2, verbose=False)

    expected = lenslrp.run_with_relevance(model, TOKENS, 5)[1].tokens
    with ThreadPoolExecutor(1) as pool:
        with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
            with pytest.raises(RuntimeError, match="attached by another thread; wait until"):
                pool.submit(stranger).result(PATIENCE)
            assert torch.allclose(own_relevance(model), expected, rtol=1e-12)
        pool.submit(stranger).result(PATIENCE)


def test_a_second_thread_waits_for_the_first() -> None:
    model = tiny("llama")
    expected = explain(model, jobs()[0])
    with ThreadPoolExecutor(1) as pool:
        started = threading.Event()

        def second() -> tuple[Tensor, Tensor]:
            started.set()
            return explain(model, jobs()[0])

        with lenslrp.relevance_rules(model, lenslrp.CPLRP()):
            waiting = pool.submit(second)
            assert started.wait(PATIENCE)
            assert not waiting.done()
            own_relevance(model)
            assert not waiting.done()
        assert same([waiting.result(PATIENCE)], [expected])


def test_a_failure_in_one_thread_lets_the_others_go_on() -> None:
    model = tiny("llama")
    serial = [explain(model, job) for job in jobs()]
    before = snapshot(model)

    def attempt(index: int) -> tuple[Tensor, Tensor] | None:
        if index % 2:
            with pytest.raises(lenslrp.InputError, match="vocabulary"):
                lenslrp.run_with_relevance(model, TOKENS, 10_000)
            return None
        return explain(model, jobs()[index])

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(attempt, range(4)))
    assert same([g for g in got if g is not None], serial[::2])
    assert changes(before, model) == []

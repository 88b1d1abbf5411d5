"""Threads: runs on one model take turns and come out right; a stranger's pass is refused."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lenslrp
from lenslrp import analysis
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.evaluation.features import tokens_of
from lenslrp.analysis.evaluation.model_features import heads_of
from lenslrp.analysis.passes.prompts import ExplainedPrompt, as_prompt, prompt_logits
from lenslrp.analysis.units.projection import project
from lenslrp.hooks import turns
from lenslrp.models.doctor import examine
from tests.unit.another_thread import PATIENCE, another_thread
from tests.unit.tiny import TOKENS, changes, own_relevance, plain_gradients, snapshot, tiny

FROZEN = ("does not require grad",)


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


# --- a pass of another thread that meets rules ---------------------------------------------------

PLACES = ("hook_embed", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post", "unembed.hook_in")
FAMILIES = ("llama", "gpt2", "gemma2", "neox", "native")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_meets_rules_attached_after_it_began_is_refused(
    family: str, place: str
) -> None:
    model = tiny(family)
    expected = plain_gradients(model)
    midway, attached = threading.Event(), threading.Event()

    def pause(x: Tensor, hook: Any) -> None:
        midway.set()
        assert attached.wait(PATIENCE)

    def stranger() -> None:
        with model.hooks(fwd_hooks=[(place, pause)]):
            model(TOKENS)

    with another_thread() as thread:
        running = thread.submit(stranger)
        assert midway.wait(PATIENCE)
        before = snapshot_without_hooks(model)
        with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
            attached.set()
            with pytest.raises(RuntimeError, match="attached by another thread"):
                running.result(PATIENCE)
        assert snapshot_without_hooks(model) == before
    assert equal(plain_gradients(model), expected)


def snapshot_without_hooks(model: Any) -> dict[str, Any]:
    return {key: value for key, value in snapshot(model).items() if key.endswith("frozen")}


def equal(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> bool:
    same_names = a[1].keys() == b[1].keys()
    return (
        torch.equal(a[0], b[0]) and same_names and all(torch.equal(a[1][n], b[1][n]) for n in b[1])
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pass_beside_runs_of_another_thread_is_refused_or_right(family: str) -> None:
    model = tiny(family)
    expected = plain_gradients(model)
    done = threading.Event()
    outcomes: list[bool] = []

    def stranger() -> None:
        while not done.is_set():
            try:
                outcomes.append(equal(plain_gradients(model, TOKENS, expected[1]), expected))
            except RuntimeError as error:
                # torch's own refusal: autograd.grad was asked for weights that are frozen now.
                if not any(text in str(error) for text in ("relevance rules", *FROZEN)):
                    raise

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with another_thread() as thread:
            running = thread.submit(stranger)
            for _ in range(8):
                explain(model, jobs()[0])
            done.set()
            running.result(PATIENCE)
    finally:
        done.set()
        sys.setswitchinterval(interval)
    assert all(outcomes)
    assert equal(plain_gradients(model), expected)


@pytest.mark.parametrize("thread", ["another", "own"])
def test_a_backward_pass_that_would_lose_gradients_is_refused(thread: str) -> None:
    """Rules freeze the weights: autograd drops, without a word, what a graph made before brings."""
    model = tiny("llama")
    loss = model(TOKENS).square().sum()
    with another_thread() as thread:

        def backward() -> None:
            loss.backward(retain_graph=True)

        with (
            lenslrp.relevance_rules(model, lenslrp.AttnLRP()),
            pytest.raises(RuntimeError, match="its gradient would be lost"),
        ):
            backward() if thread == "own" else thread.do(backward)
        model.zero_grad()
        thread.do(loss.backward)
    _, expected = plain_gradients(tiny("llama"))
    assert all(torch.equal(w.grad, expected[n]) for n, w in model.named_parameters())


def test_parts_of_a_model_are_refused_to_other_threads_too() -> None:
    """Also a layer that no rule touches: its weight is frozen."""
    model = tiny("llama")
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    mlp = model.blocks[0].mlp
    with another_thread() as thread, lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        for part in (mlp, mlp.gate, mlp.gate.original_component, model.blocks[0].ln1):
            with pytest.raises(RuntimeError, match="attached by another thread"):
                thread.do(part, x)
            part(x)


def test_a_checkpointed_pass_of_another_thread_is_refused() -> None:
    """Its blocks run forward once more in the backward pass, and would meet the rules there."""
    model = tiny("llama")
    block = model.blocks[0]
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    for weight in model.parameters():
        weight.requires_grad_(False)
    y = checkpoint(block.mlp, x, use_reentrant=False)
    with (
        another_thread() as thread,
        lenslrp.relevance_rules(model, lenslrp.AttnLRP()),
        pytest.raises(RuntimeError, match="attached by another thread"),
    ):
        thread.do(y.sum().backward)


class Deep(torch.autograd.Function):
    """A backward pass inside a backward pass inside ...: autograd runs the 60th in its own thread,
    as it runs all on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, at_the_end: Callable[[], None]) -> Tensor:
        ctx.left = depth, at_the_end
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        depth, at_the_end = ctx.left
        if depth == 0:
            at_the_end()
        else:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Deep.apply(x, depth - 1, at_the_end).backward()
        return g, None, None


def test_a_recomputation_in_a_thread_of_autograds_own_is_not_refused() -> None:
    model = tiny("llama")
    seen: list[int] = []

    def recompute() -> None:
        seen.append(threading.get_ident())
        model.blocks[0].mlp(torch.randn(1, 3, 16, dtype=torch.float64))

    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        x = torch.ones(1, requires_grad=True)
        Deep.apply(x, 70, recompute).backward()
    assert seen != [threading.get_ident()]


# --- waiting, and LensLRP's own passes -----------------------------------------------------------


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Blocks until a thread has said that it waits; returns what was said."""
    monkeypatch.setattr(turns, "PATIENCE", 0.01)
    said: list[str] = []
    event = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.levelname} {record.getMessage()}")
            event.set()

    def wait() -> list[str]:
        assert event.wait(PATIENCE)
        return said

    listener = Listener()
    logging.getLogger("lenslrp").addHandler(listener)
    yield wait
    logging.getLogger("lenslrp").removeHandler(listener)


def test_a_thread_that_waits_says_so_once(waiting: Callable[[], list[str]]) -> None:
    model = tiny("llama")
    expected = explain(model, jobs()[0])
    with another_thread("second") as thread:
        with lenslrp.relevance_rules(model, lenslrp.CPLRP()):
            second = thread.submit(explain, model, jobs()[0])
            (said,) = waiting()
            assert said.startswith("WARNING second waits for its turn")
            assert "MainThread holds" in said
            for _ in range(3):
                own_relevance(model)
            assert not second.done()
        assert same([second.result(PATIENCE)], [expected])
    assert len(waiting()) == 1


def prompt_of(model: Any) -> ExplainedPrompt:
    return as_prompt(model, TOKENS[0], lenslrp.targets.Logit(5))


def without_heads(model: Any) -> Any:
    return heads_of(model, prompt_of(model)).without(np.eye(4, dtype=bool)).value


def exact_patching(model: Any) -> Any:
    lengths = torch.ones_like(TOKENS).bool()
    pairs = Pairs(TOKENS, TOKENS.flip(0), lengths, torch.tensor([5, 7]), torch.tensor([6, 2]))
    return analysis.score_nodes(model, pairs, method="exact", components=["heads"]).values


OWN_PASSES: dict[str, Callable[[Any], Any]] = {
    "run_with_relevance": lambda m: lenslrp.run_with_relevance(m, TOKENS, 5)[1].tokens,
    "relevance_for_targets": lambda m: lenslrp.relevance_for_targets(m, TOKENS, [5])[0].tokens,
    "examine": lambda m: examine(m).ledger.target,
    "occlusion": lambda m: analysis.attribute("occlusion", m, TOKENS, 5).tokens,
    "integrated gradients": lambda m: analysis.attribute("smoothgrad", m, TOKENS, 5).tokens,
    "prompt_logits": lambda m: prompt_logits(m, prompt_of(m)),
    "tokens_of": lambda m: tokens_of(m, prompt_of(m)).without(np.eye(6, dtype=bool)).value,
    "heads_of": without_heads,
    "score_nodes": exact_patching,
    "project": lambda m: project(m, torch.ones(1, 16).double()),
    "fit_ridge_lens": lambda m: analysis.fit_ridge_lens(m, TOKENS.repeat(6, 1)).matrices,
}


@pytest.mark.parametrize("name", OWN_PASSES)
def test_own_passes_wait_for_their_turn(name: str, waiting: Callable[[], list[str]]) -> None:
    """They neither meet another thread's rules nor are they refused."""
    model = tiny("llama")
    expected = OWN_PASSES[name](model)
    with another_thread() as thread:
        with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
            second = thread.submit(OWN_PASSES[name], model)
            waiting()
            assert not second.done()
            own_relevance(model)
        got = second.result(PATIENCE)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)

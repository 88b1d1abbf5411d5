"""A session is many calls of ``run_with_relevance``, whatever happens to the model between them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp import targets
from lenslrp.analysis import Neuron, Scale, steer
from lenslrp.cache import RelevanceCache
from lenslrp.hooks import graph_walk
from lenslrp.hooks.install import Rules
from tests.unit.another_thread import PATIENCE, another_thread
from tests.unit.tiny import FAMILIES, TOKENS, changes, snapshot, tiny

POINT = "blocks.0.hook_resid_post"


def once(model: Any, **given: Any) -> RelevanceCache:
    return lenslrp.run_with_relevance(model, TOKENS, 5, **given)[1]


def again(session: lenslrp.Session, **given: Any) -> RelevanceCache:
    return session.run_with_relevance(TOKENS, 5, **given)[1]


def same(a: RelevanceCache, b: RelevanceCache) -> bool:
    terms = [(x.ledger_.to_dict() if x.ledger_ else None) for x in (a, b)]
    alike = all(torch.equal(a[name], b[name]) for name in a)
    return (
        a.keys() == b.keys() and alike and torch.equal(a.tokens, b.tokens) and terms[0] == terms[1]
    )


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a walk over a graph."""
    seen: list[int] = []
    walk = graph_walk.walk

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return walk(*args, **kwargs)

    monkeypatch.setattr(graph_walk, "walk", counted)
    return seen


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a time that rules are attached."""
    seen: list[int] = []
    attach = Rules.attach

    def counted(rules: Rules) -> None:
        seen.append(1)
        attach(rules)

    monkeypatch.setattr(Rules, "attach", counted)
    return seen


@pytest.mark.parametrize("family", [*FAMILIES, "native"])
@pytest.mark.parametrize("ledger", [True, False], ids=["ledger", "no ledger"])
def test_a_session_is_as_many_calls(family: str, ledger: bool) -> None:
    model = tiny(family)
    before = snapshot(model)
    expected = once(model, ledger=ledger)
    with lenslrp.session(model, ledger=ledger) as session:
        for _ in range(3):
            assert same(again(session), expected)
    assert changes(before, model) == []


def test_rules_are_attached_once_and_a_graph_walked_once(
    attached: list[int], walks: list[int]
) -> None:
    model = tiny("llama")
    with lenslrp.session(model) as session:
        for length in (6, 4, 5, 6):
            session.run_with_relevance(TOKENS[:, :length], 5, [])
    assert len(attached) == 1
    assert len(walks) == 1


def test_a_hook_of_the_same_size_is_walked_again(walks: list[int]) -> None:
    """A number of nodes tells nothing where code is anybody's."""
    model = tiny("llama")
    with lenslrp.session(model, ledger=False) as session:
        with model.hooks(fwd_hooks=[(POINT, lambda x, hook: -x)]):
            again(session)
        sine = model.hooks(fwd_hooks=[(POINT, lambda x, hook: x.sin())])
        with sine, pytest.raises(lenslrp.CoverageError, match="Sin"):
            again(session)


def negated() -> Callable[[Any], AbstractContextManager[Any]]:
    return lambda model: model.hooks(fwd_hooks=[(POINT, lambda x, hook: -2 * x)])


def steered() -> Callable[[Any], AbstractContextManager[Any]]:
    return lambda model: steer(model, [Scale(Neuron(0, 3), 4.0)])


def read() -> Callable[[Any], AbstractContextManager[Any]]:
    return lambda model: model.hooks(bwd_hooks=[(POINT, lambda g, hook: None)])


@pytest.mark.parametrize("kind", [negated, steered, read])
@pytest.mark.parametrize("when", ["before", "inside", "before and left inside"])
def test_hooks_and_steering_compose(kind: Callable[[], Any], when: str) -> None:
    model = tiny("llama")
    plain = once(model)
    with kind()(model):
        expected = once(model)
    before = snapshot(model)  # torch has marked a module that had a backward hook
    with ExitStack() as outside:
        change = outside.enter_context(ExitStack())
        if when != "inside":
            change.enter_context(kind()(model))
        with lenslrp.session(model) as session:
            if when != "inside":
                assert same(again(session), expected)
                change.close()
                assert same(again(session), plain)
            if when != "before and left inside":
                with kind()(model):
                    assert same(again(session), expected)
            assert same(again(session), plain)
    assert changes(before, model) == []


def test_a_hook_before_the_first_call_is_seen(attached: list[int]) -> None:
    model = tiny("llama")
    with lenslrp.session(model) as session, model.hooks(fwd_hooks=[(POINT, lambda x, hook: -x)]):
        again(session, names_filter=[])
    assert len(attached) == 2


def test_sessions_and_rules_nest() -> None:
    model = tiny("llama")
    before = snapshot(model)
    kinds = [lenslrp.AttnLRP(), lenslrp.CPLRP(), lenslrp.GradientTimesInput()]
    expected = [once(model, composite=kind) for kind in kinds]
    with lenslrp.session(model, kinds[0]) as first:
        assert same(again(first), expected[0])
        with lenslrp.session(model, kinds[1]) as second:
            assert same(again(second), expected[1])
            assert same(again(first), expected[0])
            assert same(once(model, composite=kinds[2]), expected[2])
            with lenslrp.relevance_rules(model, kinds[2]):
                assert same(again(second), expected[1])
        assert same(again(first), expected[0])
    assert changes(before, model) == []


def test_any_thread_may_call_and_no_other_may_open() -> None:
    model = tiny("llama")
    expected = once(model)
    with another_thread("second") as second:
        with lenslrp.session(model) as session:
            assert same(second.do(again, session), expected)
            assert same(again(session), expected)
            with pytest.raises(lenslrp.InputError, match="MainThread has a session open"):
                second.do(once, model)
            with pytest.raises(lenslrp.InputError, match="MainThread has a session open"):
                second.do(lenslrp.session, model)
            with pytest.raises(RuntimeError, match="attached by another thread"):
                second.do(model, TOKENS)
            assert same(second.do(again, session), expected)
        assert same(second.do(once, model), expected)


def test_a_second_thread_waits_for_one_call() -> None:
    model = tiny("llama")
    expected = once(model)
    order: list[str] = []
    with another_thread("second") as second, lenslrp.session(model) as session:

        def within(relevance: Tensor) -> Tensor:
            if not order:
                order.append("first")
                waiting.append(second.submit(again, session))
            return relevance

        waiting: list[Any] = []
        session.run_with_relevance(TOKENS, 5, POINT, reduce=within)
        order.append("done")
        assert same(waiting[0].result(PATIENCE), expected)


def test_an_exception_in_a_call_leaves_the_session_whole() -> None:
    model = tiny("gpt2")
    before = snapshot(model)
    expected = once(model)

    def fails(x: Tensor, hook: Any) -> Tensor:
        raise ZeroDivisionError

    with lenslrp.session(model) as session:
        with pytest.raises(lenslrp.InputError, match="vocabulary"):
            session.run_with_relevance(TOKENS, 10_000)
        failing = model.hooks(fwd_hooks=[("blocks.1.ln1.hook_scale", fails)])
        with failing, pytest.raises(ZeroDivisionError):
            again(session)
        assert same(again(session), expected)
    assert changes(before, model) == []


def test_an_interrupt_leaves_the_model_clean_and_the_session_usable() -> None:
    model = tiny("llama")
    before = snapshot(model)
    expected = once(model)
    session = lenslrp.session(model)

    def interrupts(relevance: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.run_with_relevance(TOKENS, 5, POINT, reduce=interrupts)
    assert changes(before, model) == []
    assert same(again(session), expected)
    session.close()
    session.close()
    assert changes(before, model) == []
    with pytest.raises(lenslrp.InputError, match="closed"):
        again(session)


def test_cells_of_a_notebook_need_no_block() -> None:
    model = tiny("llama")
    before = snapshot(model)
    expected = once(model)
    session = lenslrp.session(model)
    assert same(again(session), expected)
    assert not any(weight.requires_grad for weight in model.parameters())
    del session
    gc.collect()
    assert changes(before, model) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["bridge", "fused"])
def test_changed_weights_are_seen(family: str, attention: str) -> None:
    model = tiny(family)
    with lenslrp.session(model, attention=attention) as session:
        first = again(session)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
        expected = once(model, attention=attention)
        assert same(again(session), expected)
        assert not same(first, expected)


def test_a_model_that_is_converted_inside_is_explained_as_it_is() -> None:
    model = tiny("llama")
    with lenslrp.session(model) as session:
        again(session)
        model.to(torch.float32)
        found = again(session)
        assert found.dtype == "float32"
        assert same(found, once(model))


def test_train_mode_inside_is_refused() -> None:
    model = tiny("llama")
    with lenslrp.session(model) as session:
        again(session)
        model.train()
        with pytest.raises(lenslrp.InputError, match="train mode"):
            again(session)
        model.eval()
        again(session)


def test_settings_of_the_bridge_are_seen() -> None:
    model = tiny("llama")
    with lenslrp.session(model) as session:
        assert "blocks.0.attn.hook_result" not in again(session)
        model.set_use_attn_result(True)
        assert "blocks.0.attn.hook_result" in again(session)


def test_a_replaced_module_is_seen() -> None:
    model, other = tiny("llama"), tiny("llama", seed=1)
    with lenslrp.session(model) as session:
        again(session)
        block = model.blocks[1].mlp
        block.original_component.act_fn = torch.nn.GELU()
        assert same(again(session), once(model))
    assert not same(once(model), once(other))


def test_the_model_runs_as_ever_inside() -> None:
    model = tiny("llama")
    logits = model(TOKENS)
    written = model.generate(TOKENS, max_new_tokens=4, do_sample=False, verbose=False)
    with lenslrp.session(model) as session:
        assert torch.equal(model(TOKENS), logits)
        again(session)
        inside = model.generate(TOKENS, max_new_tokens=4, do_sample=False, verbose=False)
        assert torch.equal(inside, written)
        assert same(again(session), once(model))


TARGETS: dict[str, Any] = {
    "default": None,
    "logit": 5,
    "first position": targets.Logit(5, position=0),
    "difference": targets.LogitDiff(5, 7, position=-2),
    "contrastive": targets.Contrastive(5, top_k=3),
    "log-probability": targets.LogProb(5),
    "span": targets.Sequence([4, 9, 5]),
    "a row each": [targets.Logit(5, position=1), targets.LogProb(4)],
    "latent": targets.Activation("blocks.1.hook_resid_post", 3, position=1),
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "native"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("kind", TARGETS)
def test_logits_at_the_target_change_nothing(kind: str, side: str, family: str) -> None:
    model = tiny(family)
    if side == "left":  # in float64 Hugging Face's softmax is NaN there
        model.to(torch.float32)
    near = 1e-9 if side != "left" else 1e-4
    mask = torch.ones_like(TOKENS)
    if side != "none":
        mask[1, 0 if side == "left" else -1] = 0
    given = {"attention_mask": mask}
    logits, expected = lenslrp.run_with_relevance(model, TOKENS, TARGETS[kind], **given)
    with lenslrp.session(model, logits="target") as session:
        for _ in range(2):
            found, R = session.run_with_relevance(TOKENS, TARGETS[kind], **given)
            assert found.shape[1] == (3 if kind == "span" else 1)
            for row in found.flatten(0, 1):  # each is a row of all logits
                assert (logits.flatten(0, 1) - row).abs().amax(dim=1).min() < near
            assert R.keys() == expected.keys()
            for name in R:
                assert torch.allclose(R[name], expected[name], rtol=near, atol=near), name
            assert torch.allclose(R.tokens, expected.tokens, rtol=near, atol=near)
            assert abs(R.ledger().error) < near


@pytest.mark.parametrize("why", ["custom", "hook", "name"])
def test_all_logits_where_somebody_reads_them(why: str) -> None:
    model = tiny("llama")
    target: Any = targets.Custom(lambda x: x[:, 0, 5]) if why == "custom" else 5
    names = "unembed.hook_in" if why == "name" else []
    with lenslrp.session(model, logits="target") as session, ExitStack() as stack:
        if why == "hook":
            stack.enter_context(model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: -x)]))
        logits, R = session.run_with_relevance(TOKENS, target, names)
        expected, whole = lenslrp.run_with_relevance(model, TOKENS, target, names_filter=names)
        wanted = expected if why == "custom" else expected[:, -1:]
        assert torch.equal(logits if why == "custom" else logits[:, -1:], wanted)
        assert torch.equal(R.tokens, whole.tokens)


@pytest.mark.parametrize("given", [{"attention": "no"}, {"logits": "no"}])
def test_bad_choices_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(lenslrp.InputError, match="must be one of"):
        lenslrp.session(tiny("llama"), **given)  # type: ignore[arg-type]

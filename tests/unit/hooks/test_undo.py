"""Everything is undone: after the context, however it ended, nothing is changed.

The snapshot (``tiny.snapshot``) holds every hook dict in order, hook point handles, attributes,
children, ``requires_grad`` flags, modes and attention implementations of a bridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp import targets
from lenslrp.hooks.rule_types import Identity
from tests.unit.tiny import (
    TOKENS,
    changes,
    embedding_leaf,
    own_relevance,
    plain_gradients,
    snapshot,
    tiny,
)

FAMILIES = ("llama", "gpt2", "gemma2", "neox", "native")
COMPOSITES: list[Callable[[], lenslrp.Composite]] = [
    lenslrp.AttnLRP,
    lenslrp.CPLRP,
    lenslrp.GradientTimesInput,
    lenslrp.RelP,
    lenslrp.GIM,
]


class Boom(Exception):
    """Raised by hooks and functions of the user's."""


@contextmanager
def nothing_changes(model: TransformerBridge) -> Iterator[None]:
    """Whatever happens inside, the model is as before and computes as before."""
    logits, gradients = plain_gradients(model)
    before = snapshot(model)
    yield
    assert changes(before, model) == []
    logits_after, gradients_after = plain_gradients(model)
    assert torch.equal(logits_after, logits)
    assert gradients_after.keys() == gradients.keys()
    assert all(torch.equal(gradients_after[n], gradients[n]) for n in gradients)


def explain(model: TransformerBridge, target: Any = 5, **options: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(model, TOKENS, target, **options)[1]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-7)  # torch's fused kernel is no closer


def raising(error: type[BaseException]) -> Callable[..., None]:
    def hook(x: Tensor, hook: Any) -> None:
        raise error("from the user's hook")

    return hook


def raising_in_backward(error: type[BaseException]) -> Callable[..., None]:
    def in_backward(g: Tensor) -> None:
        raise error("from a tensor hook")

    def hook(x: Tensor, hook: Any) -> None:
        if x.requires_grad:
            x.register_hook(in_backward)

    return hook


@pytest.mark.parametrize("family", FAMILIES)
def test_normal_end(family: str) -> None:
    model = tiny(family)
    with nothing_changes(model):
        explain(model)
        lenslrp.relevance_for_targets(model, TOKENS, [3, 5])


def test_normal_end_of_every_composite() -> None:
    model = tiny("gemma2")
    for make in COMPOSITES:
        with nothing_changes(model):
            explain(model, composite=make())


@pytest.mark.parametrize("options", [{"attention": "fused"}, {"checkpoint": True}], ids=str)
def test_normal_end_of_the_variants(options: dict[str, Any]) -> None:
    model = tiny("llama")
    with nothing_changes(model):
        kept = explain(model, **options)
        assert close(kept.tokens, explain(model).tokens)


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exceptions_in_the_users_hooks(family: str, error: type[BaseException]) -> None:
    model = tiny(family)
    hooks: list[tuple[str, Callable[..., None], Any]] = [
        ("hook_embed", raising(error), "fwd"),
        ("blocks.1.mlp.hook_post", raising(error), "fwd"),
        ("ln_final.hook_in", raising(error), "fwd"),
        ("blocks.0.hook_resid_pre", raising_in_backward(error), "fwd"),
        ("blocks.1.attn.hook_pattern", raising_in_backward(error), "fwd"),
        ("blocks.0.attn.hook_z", raising(error), "bwd"),
    ]
    for name, hook, direction in hooks:
        model.add_hook(name, hook, dir=direction)
        before = snapshot(model)
        with pytest.raises(error, match="from"):
            explain(model)
        assert changes(before, model) == [], f"after an exception at {name} ({direction})"
        model.reset_hooks()


@pytest.mark.parametrize("options", [{"attention": "fused"}, {"checkpoint": True}], ids=str)
def test_exceptions_in_the_variants(options: dict[str, Any]) -> None:
    model = tiny("llama")
    for hook in (raising, raising_in_backward):
        model.add_hook("blocks.1.mlp.hook_post", hook(Boom))
        before = snapshot(model)
        with pytest.raises(Boom):
            explain(model, **options)
        assert changes(before, model) == []
        model.reset_hooks()


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_exception_in_the_target_function(error: type[BaseException]) -> None:
    def fn(logits: Tensor) -> Tensor:
        raise error("from the target")

    model = tiny("llama")
    with nothing_changes(model), pytest.raises(error, match="from the target"):
        explain(model, targets.Custom(fn))


@pytest.mark.parametrize("argument", ["reduce", "names_filter"])
def test_exception_in_a_reduction_or_a_filter(argument: str) -> None:
    def fn(_: Any) -> Any:
        raise Boom("from the argument")

    model = tiny("llama")
    with nothing_changes(model), pytest.raises(Boom, match="from the argument"):
        explain(model, **{argument: fn})


def test_refusals_leave_no_trace() -> None:
    model = tiny("gemma2")
    with nothing_changes(model):
        with pytest.raises(lenslrp.InputError, match="soft-cap"):
            explain(model, attention="fused")
        with pytest.raises(lenslrp.InputError, match="share"):
            explain(model, composite={"attention_qk": lenslrp.CPLRP()["attention_av"]})
        with pytest.raises(lenslrp.InputError, match="vocabulary"):
            explain(model, 10_000)
        with pytest.raises(lenslrp.InputError, match="no hook point"):
            explain(model, names_filter="blocks.0.hook_nothing")


def test_a_coverage_error_leaves_no_trace() -> None:
    class Cubed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    model = tiny("llama")
    model.blocks[1].mlp.original_component.act_fn = Cubed()
    with nothing_changes(model):
        with pytest.raises(lenslrp.CoverageError):
            explain(model)
        with pytest.warns(UserWarning, match="no rule for Pow"):
            explain(model, strict=False)
        explain(model, composite=lenslrp.AttnLRP().extended({Cubed: Identity()}))


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_weights_stay_frozen_and_the_others_do_not(fails: bool) -> None:
    model = tiny("llama")
    frozen = {n for i, (n, _) in enumerate(model.named_parameters()) if i % 3 == 0}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)
    with nothing_changes(model):
        if fails:
            with pytest.raises(lenslrp.InputError):
                explain(model, 10_000)
        else:
            explain(model)
    assert {n for n, w in model.named_parameters() if not w.requires_grad} == frozen


@pytest.mark.parametrize("family", FAMILIES)
def test_low_level_with_an_own_loss(family: str) -> None:
    # Gemma's final cap is part of an own loss, and of a target only in the ledger: leave it out.
    changed = {"final_logit_softcapping": None} if family == "gemma2" else {}
    model = tiny(family, **changed)
    expected = explain(model).tokens
    with nothing_changes(model):
        with lenslrp.relevance_rules(model, lenslrp.AttnLRP()) as rules:
            relevance = own_relevance(model)
            assert all(site.forward for site in rules.sites)
        assert torch.allclose(relevance, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_low_level_with_every_composite(family: str) -> None:
    """What a composite cuts off (the gate, the pattern with its query norms) need not fire."""
    model = tiny(family)
    composites = [make() for make in COMPOSITES]
    for composite in (*composites, lenslrp.CPLRP(gate="up")):
        expected = explain(model, composite=composite, names_filter=[]).tokens
        with lenslrp.relevance_rules(model, composite):
            assert close(own_relevance(model), expected), composite.name


def test_low_level_from_the_middle_of_the_model() -> None:
    """Rules above the place where the backward pass starts need not fire."""
    model = tiny("llama")
    target = targets.Activation("blocks.0.mlp.hook_post", 3)
    expected = explain(model, target, names_filter=[]).tokens
    leaves: list[Tensor] = []
    kept: list[Tensor] = []
    hooks = [
        embedding_leaf(leaves),
        ("blocks.0.mlp.hook_post", lambda x, hook: kept.append(x[:, -1, 3])),
    ]
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        with model.hooks(fwd_hooks=hooks):
            model(TOKENS)
        kept[0].sum().backward()
    assert leaves[0].grad is not None
    assert close((leaves[0] * leaves[0].grad).sum(dim=-1), expected)


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_low_level_ended_by_an_exception(error: type[BaseException]) -> None:
    model = tiny("llama")

    def block() -> None:
        with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
            own_relevance(model)
            raise error("in the block")

    with nothing_changes(model), pytest.raises(error, match="in the block"):
        block()


def test_weights_get_no_gradient_inside() -> None:
    model = tiny("llama")
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        own_relevance(model)
    assert all(weight.grad is None for weight in model.parameters())


def test_after_an_exception_the_next_run_is_right() -> None:
    model = tiny("llama")
    expected = explain(model)
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", raising(Boom))]), pytest.raises(Boom):
        explain(model)
    assert torch.equal(explain(model).tokens, expected.tokens)


def test_a_caught_exception_inside_the_block_does_not_disturb_the_rules() -> None:
    model = tiny("llama")
    expected = explain(model).tokens
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        hooks = [("blocks.0.mlp.gate.hook_out", raising(Boom)), ("ln_final.hook_in", raising(Boom))]
        for hook in hooks:
            with model.hooks(fwd_hooks=[hook]), pytest.raises(Boom):
                model(TOKENS)
        assert torch.allclose(own_relevance(model), expected, rtol=1e-12, atol=1e-15)


# --- nested and interleaved ----------------------------------------------------------------------


def both(model: TransformerBridge) -> tuple[Tensor, Tensor]:
    """Token relevance under AttnLRP and under CP, which differ."""
    attnlrp = explain(model).tokens
    cp = explain(model, composite=lenslrp.CPLRP()).tokens
    assert (attnlrp - cp).abs().max() > 1e-3
    return attnlrp, cp


def test_nested_contexts_the_innermost_is_in_force() -> None:
    model = tiny("llama")
    attnlrp, cp = both(model)
    with nothing_changes(model), lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        assert close(own_relevance(model), attnlrp)
        with lenslrp.relevance_rules(model, lenslrp.CPLRP(), attention="fused"):
            assert close(own_relevance(model), cp)
            with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
                assert close(own_relevance(model), attnlrp)
            assert close(own_relevance(model), cp)
        assert close(own_relevance(model), attnlrp)
        assert close(explain(model, composite=lenslrp.CPLRP()).tokens, cp)
        assert close(own_relevance(model), attnlrp)


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_after_an_exception_in_the_inner_context_the_outer_is_in_force(
    error: type[BaseException],
) -> None:
    model = tiny("llama")
    attnlrp, cp = both(model)

    def inner_block() -> None:
        with lenslrp.relevance_rules(model, lenslrp.CPLRP()):
            assert close(own_relevance(model), cp)
            raise error("in the block")

    with nothing_changes(model), lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        with pytest.raises(error, match="in the block"):
            inner_block()
        assert close(own_relevance(model), attnlrp)


def test_after_a_refused_inner_context_the_outer_is_in_force() -> None:
    model = tiny("gemma2", final_logit_softcapping=None)
    attnlrp, _ = both(model)
    with nothing_changes(model), lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        with (
            pytest.raises(lenslrp.InputError),
            lenslrp.relevance_rules(model, lenslrp.CPLRP(), attention="fused"),
        ):
            pass
        assert close(own_relevance(model), attnlrp)


def test_a_graph_keeps_the_rules_under_which_it_was_made() -> None:
    model = tiny("llama")
    attnlrp, _ = both(model)
    kept: list[Tensor] = []

    def cut(x: Tensor, hook: Any) -> Tensor:
        kept.append(x.detach().clone().requires_grad_())
        return kept[-1]

    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        with model.hooks(fwd_hooks=[("hook_embed", cut)]):
            value = model(TOKENS)[:, -1, 5].sum()
        with lenslrp.relevance_rules(model, lenslrp.CPLRP()):
            value.backward()
    assert kept[0].grad is not None
    assert close((kept[0] * kept[0].grad).sum(dim=-1), attnlrp)


def test_contexts_left_in_the_other_order() -> None:
    model = tiny("llama")
    with nothing_changes(model):
        outer, inner = ExitStack(), ExitStack()
        outer.enter_context(lenslrp.relevance_rules(model, lenslrp.AttnLRP()))
        inner.enter_context(lenslrp.relevance_rules(model, lenslrp.CPLRP()))
        outer.close()
        inner.close()


def test_two_models_and_two_composites_interleaved() -> None:
    one, two = tiny("llama"), tiny("llama", seed=1)
    attnlrp, (_, cp) = both(one)[0], both(two)
    leaves: list[Tensor] = []

    def cut(x: Tensor, hook: Any) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_())
        return leaves[-1]

    with nothing_changes(one), nothing_changes(two), ExitStack() as stack:
        stack.enter_context(lenslrp.relevance_rules(one, lenslrp.AttnLRP()))
        stack.enter_context(lenslrp.relevance_rules(two, lenslrp.CPLRP()))
        with one.hooks(fwd_hooks=[("hook_embed", cut)]):
            first = one(TOKENS)[:, -1, 5].sum()
        with two.hooks(fwd_hooks=[("hook_embed", cut)]):
            second = two(TOKENS)[:, -1, 5].sum()
        first.backward()
        second.backward()
    relevance = [
        (leaf * leaf.grad).sum(dim=-1).detach() for leaf in leaves if leaf.grad is not None
    ]
    assert close(relevance[0], attnlrp)
    assert close(relevance[1], cp)


def test_two_models_left_in_either_order() -> None:
    one, two = tiny("llama"), tiny("gpt2")
    expected = explain(two).tokens
    with nothing_changes(one), nothing_changes(two):
        first, second = ExitStack(), ExitStack()
        first.enter_context(lenslrp.relevance_rules(one, lenslrp.AttnLRP()))
        second.enter_context(lenslrp.relevance_rules(two, lenslrp.AttnLRP()))
        first.close()
        assert close(explain(two).tokens, expected)
        second.close()


def test_no_grad_around_a_run_is_kept_around_it() -> None:
    model = tiny("llama")
    expected = explain(model).tokens
    with torch.no_grad():
        assert torch.equal(explain(model).tokens, expected)
        assert not torch.is_grad_enabled()

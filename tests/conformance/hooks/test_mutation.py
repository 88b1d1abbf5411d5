"""Mutation check: no rule can go missing unnoticed.

For every site of a model, the engine is made to forget exactly the one rule that belongs there, as
a bug in ``assignment.py`` or a new version of TransformerLens would. The run must raise
``CoverageError``: what is found is the bare operation in the autograd graph, not the missing entry
in a list. ``python -m tests.conformance.hooks.test_mutation`` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lenslrp
from lenslrp.hooks import CONSTANT, Gamma, attach, attention
from lenslrp.hooks.handles import Attached
from tests.conformance.families import COMPOSITES, make, tokens

ATTENTION = ("attention_av", "softmax", "attention_qk")
MODELS = ("llama", "gpt2", "gemma2", "neox", "phi3", "native_gated")
OTHERS = (("llama", "CPLRP"), ("gemma2", "GIM"), ("llama", "GradientTimesInput"), ("gpt2", "RelP"))
Key = tuple[str, str]


class Forgetful(Attached):
    """Registers everything except hooks on one hook point, and remembers no site there."""

    def __init__(self, skip: nn.Module | None) -> None:
        super().__init__()
        self.skip = skip

    def hook(self, module: nn.Module, hook: Any, **options: bool) -> None:
        if module is not self.skip:
            super().hook(module, hook, **options)

    def first_hook(self, module: nn.Module, hook: Any) -> None:
        if module is not self.skip:
            super().first_hook(module, hook)


@contextmanager
def forgotten(model: Any, key: Key) -> Iterator[None]:
    """The engine forgets the rule at ``key``, a (hook, role) pair, and nothing else."""
    hook, role = key
    attach_row, softcap_of = attach.attach_row, attention.softcap_of
    point = model.hook_dict[hook] if role in ATTENTION else None

    def patched(at: Any, ctx: Any, row: Any) -> None:
        own = Forgetful(point)
        own.wrapped, own.weights, own.plain = at.wrapped, at.weights, at.plain
        attach_row(own, ctx, row)
        kept = [site for site in own.sites if (site.hook, site.role) != key]
        if len(kept) < len(own.sites) and role not in ATTENTION:
            for undo in reversed(own.undo):
                undo()
            own.sites, own.undo, kept = [], [], []
        if role == "attention_qk":  # one hook applies the soft-cap's rule too
            kept = [site for site in kept if (site.hook, site.role) != (hook, "softcap")]
        at.sites.extend(kept)
        at.undo.extend(own.undo)

    def no_cap(attn: Any) -> float | None:
        mine = attn.hook_attn_scores is model.hook_dict[hook]
        return None if mine else softcap_of(attn)

    with pytest.MonkeyPatch.context() as patch:
        if role == "softcap":
            patch.setattr(attention, "softcap_of", no_cap)
        else:
            patch.setattr(attach, "attach_row", patched)
        yield


def sites(model: Any, composite: Any) -> list[Key]:
    """Every (hook, role) at which a rule sits."""
    with lenslrp.relevance_rules(model, composite) as rules:
        return [(site.hook, site.role) for site in rules.sites]


def relevance(model: Any, composite: Any) -> Tensor:
    """Token relevance of one short prompt."""
    return lenslrp.run_with_relevance(model, tokens(1, 5), 5, composite, names_filter=[])[1].tokens


def mutate(model: Any, composite: Any, key: Key) -> str:
    """What a run says with one rule forgotten; fails if it says nothing."""
    with forgotten(model, key):
        assert key not in sites(model, composite), "the mutation did nothing"
        with pytest.raises(lenslrp.CoverageError) as caught:
            relevance(model, composite)
    return str(caught.value).split(". Relevance past it")[0]


def is_idle(composite: lenslrp.Composite, role: str) -> bool:
    """Whether a rule multiplies by one: a constant factor is cut elsewhere, at its own output."""
    return composite[role] == CONSTANT


def check_all(name: str, composite: Any) -> list[tuple[Key, str]]:
    """Every rule forgotten in turn, with what was said; the model works before and after."""
    model = make(name)
    expected = relevance(model, composite)
    keys = sites(model, composite)
    assert len(keys) == len(set(keys))
    found = []
    for key in keys:
        if is_idle(composite, key[1]):  # forgetting it must change nothing at all
            with forgotten(model, key):
                assert torch.equal(relevance(model, composite), expected), key
        else:
            found.append((key, mutate(model, composite, key)))
    assert torch.equal(relevance(model, composite), expected)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_forgetting_any_one_rule_is_noticed(name: str) -> None:
    found = check_all(name, lenslrp.AttnLRP())
    roles = {role for (_, role), _ in found}
    assert {"norm", "activation", *ATTENTION} <= roles
    assert ("softcap" in roles) == (name == "gemma2")
    for (hook, _), message in found:
        assert "no rule for" in message or "no operation of its kind" in message, hook


@pytest.mark.parametrize(("name", "composite"), OTHERS)
def test_the_same_under_other_composites(name: str, composite: str) -> None:
    assert len(check_all(name, COMPOSITES[composite]())) >= 8


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_linear_rule_that_is_forgotten_is_noticed(name: str) -> None:
    """A linear layer without its rule is linear all the same: the graph alone would not tell."""
    composite = {"linear": Gamma(0.25), "projection": Gamma(0.1)}
    model = make(name)
    keys = [key for key in sites(model, composite) if key[1] in ("linear", "projection")]
    assert len(keys) >= 8
    for key in keys:
        mutate(model, composite, key)


@pytest.mark.parametrize("name", ["llama", "gpt2", "native_gated"])
def test_a_pattern_that_is_not_held_constant_is_noticed(name: str) -> None:
    """CP's one act, cutting the graph at the pattern, has no site of its own."""
    model = make(name)
    point = model.blocks[1].attn.hook_pattern
    hook = Attached.hook

    def forgetful(at: Any, module: nn.Module, function: Any, **options: bool) -> None:
        if module is not point:
            hook(at, module, function, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attached, "hook", forgetful)
        with pytest.raises(lenslrp.CoverageError, match=r"blocks\.1\.attn"):
            relevance(model, lenslrp.CPLRP())


def test_a_native_attention_that_is_not_made_live_is_noticed() -> None:
    model = make("native_gated")

    def dead(at: Any, module: nn.Module, name: str, value: Any) -> None:
        if name != "forward":
            original(at, module, name, value)

    original = Attached.attribute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attached, "attribute", dead)
        with pytest.raises(lenslrp.CoverageError):
            relevance(model, lenslrp.AttnLRP())


@pytest.mark.parametrize("role", ["norm", "activation", "gate", *ATTENTION])
def test_a_rule_that_is_listed_and_never_ran_is_noticed(role: str) -> None:
    """The other way to go missing: attached to a place that the forward pass does not visit."""
    model = make("llama")
    target = next(hook for hook, r in sites(model, lenslrp.AttnLRP()) if r == role)
    elsewhere = nn.Identity()

    class Misplaced(Attached):
        def hook(self, module: nn.Module, hook: Any, **options: bool) -> None:
            super().hook(elsewhere, hook, **options)

        def pre_hook(self, module: nn.Module, hook: Any, **options: bool) -> None:
            super().pre_hook(elsewhere, hook, **options)

        def first_hook(self, module: nn.Module, hook: Any) -> None:
            super().first_hook(elsewhere, hook)

        def around(self, module: nn.Module, call: Any, name: str = "forward") -> None:
            super().around(elsewhere, call)

    attach_row = attach.attach_row

    def patched(at: Any, ctx: Any, row: Any) -> None:
        own = Misplaced()
        attach_row(own, ctx, row)
        if (target, role) not in [(site.hook, site.role) for site in own.sites]:
            for undo in reversed(own.undo):
                undo()
            attach_row(at, ctx, row)
            return
        at.sites.extend(own.sites)
        at.undo.extend(own.undo)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attach, "attach_row", patched)
        with pytest.raises(lenslrp.CoverageError):
            relevance(model, lenslrp.AttnLRP())


def main() -> None:
    """The table for docs/reference/mutation.md."""
    print("| model | rule forgotten at | role | noticed as |")
    print("|---|---|---|---|")
    for name in MODELS:
        for (hook, role), message in check_all(name, lenslrp.AttnLRP()):
            shown = message.split(": ", 1)[-1].replace("|", "\\|")
            print(f"| {name} | `{hook}` | {role} | {shown} |")


if __name__ == "__main__":
    main()

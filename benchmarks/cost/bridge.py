"""The passes of the cost benchmark that run on SmolLM2's TransformerBridge, and their bars."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from benchmarks.cost.measure import TARGET, Pass

PLAIN = "plain"


class Case(NamedTuple):
    """One way to ask for relevance.

    Attributes:
        title: what the tables call it.
        session: in a session that is open already, or a call of its own.
        logits: ``"target"`` or ``"all"``.
        every: every hook point on the path, summed over features, with the ledger; or token
            relevance and no ledger.
        bars: length -> the CPU time that is allowed, as a multiple of the plain pass's.
    """

    title: str
    session: bool
    logits: str
    every: bool
    bars: Mapping[int, float]


CASES = {
    "target-tokens": Case(
        "session, target's logits: tokens",
        True, "target", False, {12: 1.00, 64: 0.95, 256: 0.90, 1024: 0.90},
    ),
    "target-hooks": Case(
        "session, target's logits: every hook, ledger",
        True, "target", True, {12: 1.20, 64: 1.10, 256: 1.00, 1024: 1.05},
    ),
    "all-tokens": Case("session, all logits: tokens", True, "all", False, {12: 1.05}),
    "all-hooks": Case("session, all logits: every hook, ledger", True, "all", True, {12: 1.35}),
    "single-tokens": Case("single call, all logits: tokens", False, "all", False, {12: 1.30}),
    "single-hooks": Case("single call, all logits: every hook", False, "all", True, {12: 1.60}),
}  # fmt: skip


def build_bridge(
    dtype: torch.dtype = torch.float32, weights: TransformerBridge | None = None
) -> TransformerBridge:
    """The embedded SmolLM2-135M, frozen; a copy with ``weights``' memory, if given."""
    model = lenslrp.load("smollm2-135m", dtype=dtype, device="cpu", verify=False)
    model.requires_grad_(False)
    if weights is not None:
        for own, shared in zip(model.parameters(), weights.parameters(), strict=True):
            own.data = shared.data
    return model


def plain_pass(bridge: TransformerBridge) -> Pass:
    """Forward and backward without rules, all logits: Gradient x Input at the embeddings."""

    def run(tokens: Tensor) -> Tensor:
        leaves: list[Tensor] = []

        def cut(value: Tensor, hook: object) -> Tensor:
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        with bridge.hooks(fwd_hooks=[("embed.hook_out", cut)]):
            bridge(tokens, use_cache=False)[:, -1, TARGET].sum().backward()
        (leaf,) = leaves
        assert leaf.grad is not None
        return (leaf.detach() * leaf.grad).sum(-1)

    return run


def relevance_pass(
    bridge: TransformerBridge, case: Case, stack: ExitStack, attention: str = "bridge"
) -> Pass:
    """The pass of one case; a session stays open until ``stack`` is closed."""
    of_model: dict[str, Any] = {"attention": attention, "ledger": case.every}
    options: dict[str, Any] = {"names_filter": [], "logits": case.logits}
    if case.every:
        options |= {"names_filter": None, "reduce": "sum"}
    if case.session:
        session = stack.enter_context(lenslrp.session(bridge, **of_model))
        call = partial(session.run_with_relevance, **options)
    else:
        call = partial(lenslrp.run_with_relevance, bridge, **of_model, **options)

    def run(tokens: Tensor) -> Tensor:
        _, relevance = call(tokens, target=TARGET)
        return torch.as_tensor(relevance.tokens)

    return run

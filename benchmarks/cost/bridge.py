"""The passes of the cost benchmark that run on a TransformerBridge, their models and bars."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, Mamba2Config, PretrainedConfig, Qwen3NextConfig

import lenslrp
from benchmarks.cost.measure import SMOLLM2, TARGET, Pass

PLAIN, SMOLLM = "plain", "smollm2-135m"


class Case(NamedTuple):
    """One way to ask for relevance.

    Attributes:
        title: what the tables call it.
        session: in a session that is open already, or a call of its own.
        logits: ``"target"`` or ``"all"``.
        every: every hook point on the path, summed over features, with the ledger; or token
            relevance and no ledger.
        bars: length -> the CPU time that SmolLM2 is allowed, as a multiple of the plain pass's.
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


RECURRENT: Mapping[str, PretrainedConfig] = {
    "mamba2": Mamba2Config(
        vocab_size=1024, hidden_size=256, num_hidden_layers=4, state_size=64, num_heads=8,
        head_dim=64, n_groups=1, chunk_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "qwen3-next": Qwen3NextConfig(  # three gated delta nets and an attention, experts in each
        vocab_size=1024, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, linear_num_key_heads=4, linear_num_value_heads=8,
        linear_key_head_dim=64, linear_value_head_dim=64, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=256, shared_expert_intermediate_size=256,
        max_position_embeddings=8192,
    ),
}  # fmt: skip
"""Models of random weights in which the mixers take most of the time."""

MODELS = (SMOLLM, *RECURRENT)
RECURRENT_TIME, RECURRENT_MEMORY = 1.15, 1.10
"""What a case may cost on them at any length, as a multiple of the plain pass's."""


def vocabulary_of(model: str) -> int:
    """How many tokens a model knows."""
    return RECURRENT[model].vocab_size if model in RECURRENT else SMOLLM2.vocabulary


def time_bar(model: str, case: str, length: int) -> float | None:
    """The CPU time that a case is allowed, as a multiple of the plain pass's."""
    return RECURRENT_TIME if model in RECURRENT else CASES[case].bars.get(length)


def build_bridge(
    dtype: torch.dtype = torch.float32,
    weights: TransformerBridge | None = None,
    name: str = SMOLLM,
) -> TransformerBridge:
    """One of the models, frozen; a copy with ``weights``' memory, if given."""
    source: Any = name
    if name in RECURRENT:
        torch.manual_seed(0)
        source = AutoModelForCausalLM.from_config(RECURRENT[name], dtype=dtype).eval()
    model = lenslrp.load(source, dtype=dtype, device="cpu", verify=False)
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

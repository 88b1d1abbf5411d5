"""The fused attention and checkpointing give the relevance of the ordinary path.

Under ``attention="fused"`` queries and keys take a quarter and values a half, which is exact since
the softmax's backward is linear in the gradient; checkpointing recomputes the same operations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lenslrp
from lenslrp.targets import Activation, Logit, LogProb
from tests.conformance.families import COMPOSITES, FAMILIES, make, tokens

ALLOWED = [name for name, family in FAMILIES.items() if not family.fused]
REFUSED = {name: family.fused for name, family in FAMILIES.items() if family.fused}


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("composite", ["AttnLRP", "CPLRP"])
def test_fused_is_the_same_to_rounding(name: str, composite: str) -> None:
    """1e-6: the bridge's softmax is in float32 even here, the fused kernel's is not."""
    model = make(name)
    table = COMPOSITES[composite]()
    plain_logits, plain = lenslrp.run_with_relevance(model, tokens(), 5, table)
    logits, fused = lenslrp.run_with_relevance(model, tokens(), 5, table, attention="fused")
    torch.testing.assert_close(logits, plain_logits, rtol=1e-5, atol=1e-5)
    _close(fused.tokens, plain.tokens, 1e-6)
    for hook in fused.keys():  # noqa: SIM118
        value = fused[hook]
        if ".q_norm." in hook or ".k_norm." in hook:
            # The bridge norms [batch, head, pos, d_head]; some Hugging Face modules (Qwen3) do it
            # on [batch, pos, head, d_head].
            heads_first = hook in plain and value.shape == plain[hook].shape
            value = value if heads_first else value.transpose(1, 2)
        if hook in plain and plain[hook].abs().max() > 1e-9:
            assert value.shape == plain[hook].shape, hook
            _close(value, plain[hook], 1e-5)
    ledger = fused.ledger()
    assert abs(ledger.error) < 1e-9
    assert ledger.softmax == pytest.approx(plain.ledger().softmax, rel=1e-4, abs=1e-6)
    assert ledger.table["error"].abs().max() < 1e-8
    assert "blocks.0.attn.hook_pattern" in fused.coverage.off_path
    again, _ = lenslrp.run_with_relevance(model, tokens(), 5, table)
    assert torch.equal(again, plain_logits), "the attention was not put back"


@pytest.mark.parametrize("name", ALLOWED)
def test_fused_logits_are_the_delegated_bridges(name: str) -> None:
    """The same bridge, delegated to the kernel: with rules or without, the same bits."""
    model = make(name, torch.float32)
    first, _ = lenslrp.run_with_relevance(model, tokens(), 5, attention="fused", names_filter=[])
    second, _ = lenslrp.run_with_relevance(
        model, tokens(), 5, lenslrp.CPLRP(), attention="fused", names_filter=[]
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", list(REFUSED))
def test_fused_refuses_by_name(name: str) -> None:
    with pytest.raises(lenslrp.InputError, match=rf'attention="fused".*{REFUSED[name]}'):
        lenslrp.run_with_relevance(make(name), tokens(), 5, attention="fused")


@pytest.mark.parametrize("composite", ["GIM", "GradientTimesInput", "RelP"])
def test_fused_refuses_other_softmax_rules(composite: str) -> None:
    with pytest.raises(lenslrp.InputError, match=r'fused" holds for.*attention="bridge"'):
        lenslrp.run_with_relevance(
            make("llama"), tokens(), 5, COMPOSITES[composite](), attention="fused"
        )


def test_fused_has_no_patterns() -> None:
    for hook in ("attn.hook_pattern", "blocks.0.attn.hook_attn_scores"):
        with pytest.raises(lenslrp.InputError, match="forms no patterns or scores"):
            lenslrp.run_with_relevance(
                make("llama"), tokens(), 5, attention="fused", names_filter=hook
            )
    with pytest.raises(lenslrp.InputError, match="attention must be one of"):
        lenslrp.run_with_relevance(make("llama"), tokens(), 5, attention="flash")


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("composite", ["AttnLRP", "GIM"])
def test_checkpointing_changes_nothing(name: str, composite: str) -> None:
    model, table = make(name), COMPOSITES[composite]()
    logits, plain = lenslrp.run_with_relevance(model, tokens(), 5, table)
    same, saved = lenslrp.run_with_relevance(model, tokens(), 5, table, checkpoint=True)
    assert torch.equal(same, logits)
    assert sorted(saved.keys()) == sorted(plain.keys())
    for hook in plain.keys():  # noqa: SIM118
        torch.testing.assert_close(saved[hook], plain[hook], rtol=1e-12, atol=1e-12, msg=hook)
    torch.testing.assert_close(saved.tokens, plain.tokens, rtol=1e-12, atol=1e-12)
    for key, value in plain.ledger().to_dict().items():
        assert saved.ledger().to_dict()[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize(
    "targets",
    [
        [Logit(5), LogProb(7)],
        [Activation("blocks.1.mlp.hook_post", 3), Activation("blocks.0.mlp.hook_post", 2)],
        [Logit(5), Activation("blocks.1.hook_resid_mid", 3), Logit(9)],
    ],
    ids=["logits", "latent", "mixed"],
)
@pytest.mark.parametrize("options", [{}, {"checkpoint": True}], ids=["plain", "checkpoint"])
def test_k_targets_equal_k_runs(targets: list[Any], options: dict[str, Any]) -> None:
    model = make("llama")
    together = lenslrp.relevance_for_targets(model, tokens(), targets, **options)
    for target, cache in zip(targets, together, strict=True):
        _, alone = lenslrp.run_with_relevance(model, tokens(), target)
        torch.testing.assert_close(cache.tokens, alone.tokens, rtol=1e-12, atol=1e-12)
        for hook in alone.keys():  # noqa: SIM118
            torch.testing.assert_close(cache[hook], alone[hook], rtol=1e-12, atol=1e-12, msg=hook)
        assert cache.target.text == alone.target.text
        assert cache.ledger().leaves == pytest.approx(alone.ledger().leaves, rel=1e-10)
        assert abs(cache.ledger().error) < 1e-9

"""Padded batches equal single runs; every kind of target explains what it says.

A padded row is compared with the same row alone: its tokens, its target, and every residual. Where
attention is given absolute positions (GPT-2), padding on the left must not move them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.targets import Activation, Contrastive, Custom, Logit, LogitDiff, LogProb, Sequence
from tests.conformance.families import FAMILIES, VOCABULARY, make, tokens

LENGTHS = (4, 7, 6)


def _padded(side: str) -> tuple[Tensor, Tensor]:
    rows, width = tokens(len(LENGTHS), max(LENGTHS)), max(LENGTHS)
    ids = torch.zeros_like(rows)
    mask = torch.zeros_like(rows)
    for row, length in enumerate(LENGTHS):
        span = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, span] = rows[row, :length]
        mask[row, span] = 1
    return ids, mask


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_runs(name: str, side: str) -> None:
    model = make(name, torch.float32)
    ids, mask = _padded(side)
    logits, batch = lenslrp.run_with_relevance(model, ids, 5, attention_mask=mask)
    assert torch.equal(batch.attention_mask, mask.bool())
    assert (batch.tokens[~mask.bool()] == 0).all()
    assert abs(batch.ledger().error) < 5e-5
    for hook in batch.keys():  # noqa: SIM118
        assert torch.isfinite(batch[hook]).all(), hook
    for row in range(len(ids)):
        real = mask[row].bool()
        alone_logits, alone = lenslrp.run_with_relevance(model, ids[row][real][None], 5)
        torch.testing.assert_close(logits[row][real], alone_logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch.target.value[row], alone.target.value[0])
        size = float(alone["blocks.0.hook_resid_pre"].abs().max())
        for found, expected in (
            (batch.tokens[row][real], alone.tokens[0]),
            (batch["blocks.0.hook_resid_pre"][row][real], alone["blocks.0.hook_resid_pre"][0]),
            (batch["blocks.1.hook_resid_post"][row][real], alone["blocks.1.hook_resid_post"][0]),
        ):
            # 1e-6 of the largest: float32 rounds differently in a batch of another shape.
            assert float((found - expected).abs().max()) <= 2e-6 * max(1.0, size), (row, side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_under_the_fused_kernel_and_in_a_span(side: str) -> None:
    model = make("llama", torch.float32)
    ids, mask = _padded(side)
    span = Sequence((5, 9, 2))
    _, batch = lenslrp.run_with_relevance(model, ids, span, attention_mask=mask)
    _, fused = lenslrp.run_with_relevance(model, ids, 5, attention_mask=mask, attention="fused")
    for row in range(len(ids)):
        prompt = ids[row][mask[row].bool()][None]
        _, alone = lenslrp.run_with_relevance(model, prompt, span)
        real = batch.attention_mask[row]
        torch.testing.assert_close(batch.tokens[row][real], alone.tokens[0], rtol=1e-4, atol=3e-6)
        _, alone = lenslrp.run_with_relevance(model, prompt, 5)
        real = mask[row].bool()
        torch.testing.assert_close(fused.tokens[row][real], alone.tokens[0], rtol=1e-4, atol=3e-6)


# ------------------------------------------------------------------ targets


@pytest.fixture(scope="module")
def llama() -> Any:
    return make("llama")


@pytest.fixture(scope="module")
def rows(llama: Any) -> Tensor:
    """The model's logits at the last position, [batch, vocab]."""
    with torch.no_grad():
        logits: Tensor = llama(tokens())[:, -1]
    return logits


def _explain(model: Any, target: Any, **options: Any) -> lenslrp.RelevanceCache:
    _, cache = lenslrp.run_with_relevance(model, tokens(), target, names_filter=[], **options)
    assert abs(cache.ledger().error) < 1e-9
    return cache


def test_values(llama: Any, rows: Tensor) -> None:
    best = rows.clone()
    best[:, 5] = -torch.inf
    expected = {
        None: rows.amax(dim=1),
        5: rows[:, 5],
        Logit(5): rows[:, 5],
        LogitDiff(5, 9): rows[:, 5] - rows[:, 9],
        LogProb(5): rows.log_softmax(dim=1)[:, 5],
        Contrastive(5): rows[:, 5] - (rows.sum(dim=1) - rows[:, 5]) / (VOCABULARY - 1),
        Contrastive(5, top_k=3): rows[:, 5] - best.topk(3, dim=1).values.mean(dim=1),
        Custom(lambda logits: logits[:, -1, :4].sum(dim=1)): rows[:, :4].sum(dim=1),
    }
    for target, value in expected.items():
        torch.testing.assert_close(_explain(llama, target).target.value, value)


def test_linear_targets_add_up(llama: Any) -> None:
    """Relevance is linear in a target that is linear in the logits, under any rule.

    To 1e-5: the bridge's softmax, and its gradient, is in float32 whatever the model's type.
    """
    a, b = (_explain(llama, Logit(token)).tokens for token in (5, 9))
    difference = _explain(llama, LogitDiff(5, 9)).tokens
    torch.testing.assert_close(difference, a - b, rtol=1e-5, atol=1e-6)
    custom = _explain(llama, Custom(lambda x: 2 * x[:, -1, 5] + x[:, -1, 9])).tokens
    torch.testing.assert_close(custom, 2 * a + b, rtol=1e-5, atol=1e-6)
    everything = _explain(llama, Custom(lambda x: x[:, -1].sum(dim=1))).tokens
    rest = _explain(llama, Contrastive(5)).tokens
    n = VOCABULARY - 1
    torch.testing.assert_close(rest, a - (everything - a) / n, rtol=1e-5, atol=1e-6)


def test_positions(llama: Any) -> None:
    """A target in the middle sees nothing behind it, and counts real tokens only."""
    cache = _explain(llama, Logit(5, position=2))
    assert (cache.tokens[:, 3:] == 0).all()
    negative = _explain(llama, Logit(5, position=2 - tokens().shape[1]))
    assert torch.equal(cache.tokens, negative.tokens)
    with pytest.raises(lenslrp.InputError, match="position 7 is out of range"):
        _explain(llama, Logit(5, position=7))


def test_a_sequence_is_the_sum_of_its_tokens(llama: Any) -> None:
    span = (5, 9, 2)
    cache = _explain(llama, Sequence(span))
    length = tokens().shape[1]
    assert cache.tokens.shape == (2, length + 2)  # the last token is only predicted
    forced = torch.cat([tokens(), torch.tensor([span[:-1]] * 2)], dim=1)
    parts = lenslrp.relevance_for_targets(
        llama, forced, [Logit(token, position=length - 1 + i) for i, token in enumerate(span)]
    )
    total = torch.stack([part.tokens for part in parts]).sum(dim=0)
    torch.testing.assert_close(cache.tokens, total, rtol=1e-5, atol=1e-6)
    log_probs = _explain(llama, Sequence(span, of="log_prob"))
    values = torch.stack(
        [
            part.target.value
            for part in lenslrp.relevance_for_targets(
                llama, forced, [LogProb(t, position=length - 1 + i) for i, t in enumerate(span)]
            )
        ]
    )
    torch.testing.assert_close(log_probs.target.value, values.sum(dim=0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox", "native_gated"])
@pytest.mark.parametrize(
    ("hook", "unit"),
    [
        ("blocks.1.mlp.hook_post", 3),
        ("blocks.1.attn.hook_z", (1, 2)),
        ("blocks.0.hook_resid_post", 4),
    ],
)
def test_a_latent_unit(name: str, hook: str, unit: Any) -> None:
    model = make(name)
    _, activations = model.run_with_cache(tokens())
    _, cache = lenslrp.run_with_relevance(model, tokens(), Activation(hook, unit, position=4))
    index = unit if isinstance(unit, tuple) else (unit,)
    value = activations[hook][(slice(None), 4, *index)]
    torch.testing.assert_close(cache.target.value, value)
    assert abs(cache.ledger().error) < 1e-9
    assert (cache.tokens[:, 5:] == 0).all()
    # Relevance starts at that unit with all of its activation, and there only.
    expected = torch.zeros_like(cache[hook])
    expected[(slice(None), 4, *index)] = value
    torch.testing.assert_close(cache[hook], expected)
    assert cache.ledger().table["error"].abs().max() < 1e-9
    assert not cache["blocks.1.hook_resid_post"].any() or hook.endswith("1.hook_resid_post")


def test_a_target_a_row(llama: Any) -> None:
    cache = _explain(llama, [5, LogProb(9)])
    torch.testing.assert_close(cache.tokens[0], _explain(llama, 5).tokens[0])
    torch.testing.assert_close(cache.tokens[1], _explain(llama, LogProb(9)).tokens[1])
    hook = "blocks.1.mlp.hook_post"
    units = _explain(llama, [Activation(hook, 3), Activation(hook, 8)])
    torch.testing.assert_close(units.tokens[1], _explain(llama, Activation(hook, 8)).tokens[1])
    below = "blocks.0.mlp.hook_post"
    _explain(llama, [Activation(hook, 3), Activation(below, 8)])
    with pytest.raises(lenslrp.InputError, match="3 targets for a batch of 2"):
        _explain(llama, [5, 9, 2])
    with pytest.raises(lenslrp.InputError, match="cannot mix"):
        _explain(llama, [5, Activation(hook, 3)])


def test_embeddings_instead_of_tokens(llama: Any) -> None:
    embeds = llama.original_model.get_input_embeddings()(tokens()).detach()
    _, cache = lenslrp.run_with_relevance(llama, None, 5, inputs_embeds=embeds, names_filter=[])
    torch.testing.assert_close(cache.tokens, _explain(llama, 5).tokens, rtol=1e-10, atol=1e-12)

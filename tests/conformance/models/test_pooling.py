"""What a classifier's head reads: tokens' relevance equals an explicit pass, each kind of pooling.

The explicit pass (``tests/oracles``) is a second implementation in plain float64. It reads one row
without padding; the engine reads that row beside a longer one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lenslrp
from lenslrp.targets import Logit
from tests.oracles import explicit_encoders as explicit
from tests.oracles.explicit_encoders import Explicit
from tests.oracles.explicit_llama import LlamaWeights, explain

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
COMPOSITES = {False: lenslrp.AttnLRP(), True: lenslrp.CPLRP()}
LONG = torch.tensor([5, 9, 30, 7, 22, 9, 2])
SHORT = torch.tensor([8, 31, 6, 17, 2])
LABEL = 1


def made(cls: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SIZES, **changes})).double().eval()
    for weight in model.parameters():
        spread = weight.shape[-1] ** -0.5
        weight.data.normal_(0.8, 0.2) if weight.ndim == 1 else weight.data.normal_(0, 2 * spread)
    return model


def padded(padding: int = 0) -> tuple[Tensor, Tensor]:
    """Two rows, the second padded on the right."""
    tokens, mask = torch.full((2, len(LONG)), padding), torch.zeros(2, len(LONG), dtype=torch.long)
    for row, text in enumerate((LONG, SHORT)):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    return tokens, mask


def check(
    model: Any, logits_of: Callable[[Explicit], Tensor], tolerance: float, **options: Any
) -> None:
    """Both methods, the padded row: logits, tokens, positions, of both texts."""
    passes = {cp: Explicit.of(model, constant_pattern=cp, **options) for cp in COMPOSITES}
    bridge = lenslrp.load(model)
    tokens, mask = padded(model.config.pad_token_id)
    for cp, composite in COMPOSITES.items():
        logits, R = lenslrp.run_with_relevance(
            bridge, tokens, Logit(LABEL), composite=composite, attention_mask=mask
        )
        expected_logits = logits_of(passes[cp])
        torch.testing.assert_close(logits[1:], expected_logits.detach(), rtol=0, atol=tolerance)
        expected = passes[cp].relevance(expected_logits[0, LABEL])
        assert abs(R.ledger().error) < tolerance
        for name in {"tokens", "positions", "decoder_tokens", "decoder_positions"} & set(expected):
            found = getattr(R, name)[1, : len(SHORT)]
            torch.testing.assert_close(found, expected[name].sum(dim=-1)[0], rtol=0, atol=tolerance)
            assert found.abs().max() > 1e-3


def test_the_last_token_that_is_no_padding() -> None:
    """Llama's; the explicit pass carries relevance."""
    cls = hf.LlamaForSequenceClassification
    model = made(cls, num_key_value_heads=2, attention_bias=True)
    weights = LlamaWeights.copy_from(model)
    weights.tensors["lm_head.weight"] = weights.tensors.pop("score.weight")
    bridge = lenslrp.load(model)
    tokens, mask = padded()
    methods = {"attnlrp": lenslrp.AttnLRP(), "cp": lenslrp.CPLRP(gate="uniform")}
    for method, composite in methods.items():
        expected = explain(weights, SHORT[None], torch.tensor([LABEL]), method=method)  # type: ignore[arg-type]
        logits, R = lenslrp.run_with_relevance(
            bridge, tokens, Logit(LABEL), composite=composite, attention_mask=mask
        )
        torch.testing.assert_close(logits[1], expected.logits[0, -1], rtol=0, atol=1e-6)
        torch.testing.assert_close(R.tokens[1, : len(SHORT)], expected.tokens[0], rtol=0, atol=1e-6)


def test_the_first_token() -> None:
    """RoBERTa's: a dense layer and a tanh in its head."""

    def logits(e: Explicit) -> Tensor:
        x = explicit.bert(e, SHORT[None], "roberta", first_position=2)[:, 0]
        x = explicit.elementwise(torch.tanh, e.linear(x, "classifier.dense"))
        return e.linear(x, "classifier.out_proj")

    cls = hf.RobertaForSequenceClassification
    check(made(cls, pad_token_id=1, type_vocab_size=1), logits, 1e-9)


def test_a_pooler() -> None:
    """BERT's: a dense layer and a tanh on its first token."""

    def logits(e: Explicit) -> Tensor:
        x = explicit.bert(e, SHORT[None], "bert")[:, 0]
        x = explicit.elementwise(torch.tanh, e.linear(x, "bert.pooler.dense"))
        return e.linear(x, "classifier")

    check(made(hf.BertForSequenceClassification), logits, 1e-9)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_mean_over_real_tokens(pooling: str) -> None:
    """ModernBERT's, and its first token; rotations and softmax are in float32."""

    def logits(e: Explicit) -> Tensor:
        x = explicit.modern_bert(e, SHORT[None])
        x = x.mean(dim=1) if pooling == "mean" else x[:, 0]
        x = explicit.elementwise(torch.nn.functional.gelu, e.linear(x, "head.dense"))
        return e.linear(e.layer_norm(x, "head.norm", e.config.norm_eps), "classifier")

    cls = hf.ModernBertForSequenceClassification
    ends = dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 2)
    model = made(
        cls, classifier_pooling=pooling, global_attn_every_n_layers=2, local_attention=4, **ends
    )
    check(model, logits, 1e-6, softmax_dtype=torch.float32)


def test_a_mean_is_the_same_on_either_side_of_padding() -> None:
    cls = hf.ModernBertForSequenceClassification
    ends = dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 2)
    bridge = lenslrp.load(made(cls, classifier_pooling="mean", **ends))
    tokens, mask = padded()
    _, right = lenslrp.run_with_relevance(bridge, tokens, Logit(LABEL), attention_mask=mask)
    tokens[1], mask[1] = tokens[1].roll(2), mask[1].roll(2)
    _, left = lenslrp.run_with_relevance(bridge, tokens, Logit(LABEL), attention_mask=mask)
    torch.testing.assert_close(left.tokens[1].roll(-2), right.tokens[1], rtol=0, atol=1e-6)


def test_the_end_of_the_sentence() -> None:
    """BART's: the decoder's state at EOS, which reads the text once more, shifted by one."""

    def logits(e: Explicit) -> Tensor:
        written = torch.cat([torch.tensor([e.config.decoder_start_token_id]), SHORT[:-1]])
        x = explicit.bart(e, SHORT[None], written[None])[:, -1]
        x = explicit.elementwise(torch.tanh, e.linear(x, "classification_head.dense"))
        return e.linear(x, "classification_head.out_proj")

    sizes = {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "eos_token_id": 2, "decoder_start_token_id": 2, "bos_token_id": 3,
    }  # fmt: skip
    check(made(hf.BartForSequenceClassification, **sizes), logits, 1e-9)


DEBERTA: dict[str, dict[str, Any]] = {
    "v3": {
        "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
    "v2": {
        "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
    "projections of their own": {"pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "content to position": {"pos_att_type": ["c2p"], "max_relative_positions": 3},
    "position to content": {"pos_att_type": ["p2c"], "share_att_key": True, "type_vocab_size": 2},
    "absolute positions": {"relative_attention": False},
    "narrow embeddings": {"pos_att_type": ["c2p"], "embedding_size": 12},
    "v1": {"pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "v1, content to position": {"pos_att_type": ["c2p"], "max_relative_positions": 3},
    "v1, position to content": {"pos_att_type": ["p2c"], "type_vocab_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", DEBERTA)
def test_disentangled_attention(name: str) -> None:
    """DeBERTa's scores are a sum of products: half to each factor, a position's to the ledger."""
    changes = {"relative_attention": True, "type_vocab_size": 0, **DEBERTA[name]}
    first = name.startswith("v1")  # its norms are in float32
    family, tolerance = ("Deberta", 1e-6) if first else ("DebertaV2", 1e-9)
    model = made(getattr(hf, f"{family}ForSequenceClassification"), **changes)

    def logits(e: Explicit) -> Tensor:
        x = explicit.deberta(e, SHORT[None])[:, 0]
        x = explicit.elementwise(torch.nn.functional.gelu, e.linear(x, "pooler.dense"))
        return e.linear(x, "classifier")

    attnlrp = Explicit.of(model)
    check(model, logits, tolerance)
    expected = attnlrp.relevance(logits(attnlrp)[0, LABEL])
    bridge = lenslrp.load(model)
    _, R = lenslrp.run_with_relevance(bridge, SHORT[None], Logit(LABEL))
    assert abs(R.ledger().error) < 1e-9
    positions = [r.sum() for name, r in expected.items() if name[:3] in ("c2p", "p2c")]
    assert R.ledger().positional == pytest.approx(float(sum(positions)), abs=tolerance)
    assert bool(positions) == changes["relative_attention"]
    points = ("qkv.hook_out",) if first else ("q.hook_out", "k.hook_out", "v.hook_out")
    for layer in range(2):
        for point in (*points, "hook_attn_scores", "hook_pattern"):
            hook = f"blocks.{layer}.attn.{point}"
            found = R[hook].reshape(expected[hook].shape)  # the bridge has heads on an axis
            torch.testing.assert_close(found, expected[hook], rtol=0, atol=tolerance)
            assert found.abs().max() > 1e-5


def test_cp_conserves_through_disentangled_attention() -> None:
    """Without biases every residual sums to the target."""
    changes = {"relative_attention": True, "type_vocab_size": 0, **DEBERTA["v3"]}
    model = made(hf.DebertaV2ForSequenceClassification, **changes)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.zero_()
    bridge = lenslrp.load(model)
    _, R = lenslrp.run_with_relevance(bridge, SHORT[None], Logit(LABEL), composite=lenslrp.CPLRP())
    for hook in ("blocks.0.hook_in", "blocks.1.hook_in", "blocks.1.hook_out"):
        assert float(R[hook].sum()) == pytest.approx(float(R.target.value), rel=1e-9)

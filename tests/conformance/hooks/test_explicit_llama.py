"""The engine's relevance equals an explicit propagation, hook by hook, on tiny Llamas.

The oracle (``tests/oracles/explicit_llama.py``) carries relevance and uses no autograd; the
engine carries a gradient. First the oracle itself is checked: its logits are Hugging Face's, its
CP relevance is conserved at every residual where there are no biases, and its account of
target = leaves + biases + softmax closes for AttnLRP.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM

import lenslrp
from tests.oracles.explicit_llama import Explanation, LlamaWeights, explain

N_LAYERS, N_POS, VOCABULARY = 3, 6, 29
TOKENS = torch.tensor([[3, 17, 5, 17, 28, 11], [0, 9, 2, 21, 9, 14]])
TARGETS = torch.tensor([7, 22])

METHODS: dict[str, dict[str, Any]] = {
    "attnlrp": {"method": "attnlrp"},
    "cp-gate-uniform": {"method": "cp", "gate": "uniform"},
    "cp-gate-up": {"method": "cp", "gate": "up"},
}
COMPOSITES: dict[str, Any] = {
    "attnlrp": lambda: lenslrp.AttnLRP(),
    "cp-gate-uniform": lambda: lenslrp.CPLRP(gate="uniform"),
    "cp-gate-up": lambda: lenslrp.CPLRP(gate="up"),
}


class Float64LlamaRMSNorm(nn.Module):
    """Llama's RMS norm without the float32 step; the name is how the bridge recognises it."""

    def __init__(self, weight: nn.Parameter, variance_epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise in the type that comes in."""
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def make_model(kv_heads: int, *, biases: bool = False, wide: bool = False) -> Any:
    """A tiny float64 Llama with weights large enough for attention to be far from uniform."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=6,
        max_position_embeddings=32,
        attention_bias=biases,
        mlp_bias=biases,
    )
    model: Any = LlamaForCausalLM(config).double()
    model.train(False)
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(kv_heads)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            parameter.data = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise
        else:
            parameter.data = noise / parameter.shape[-1] ** 0.5
    if wide:
        for layer in model.model.layers:
            layer.input_layernorm = widen(layer.input_layernorm)
            layer.post_attention_layernorm = widen(layer.post_attention_layernorm)
        model.model.norm = widen(model.model.norm)
    return model


def widen(norm: Any) -> Float64LlamaRMSNorm:
    """Replace one norm."""
    return Float64LlamaRMSNorm(norm.weight, norm.variance_epsilon)


def softmax_in_float64(
    self: AttentionBridge, attn_scores: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The bridge's softmax without its step to float32."""
    return torch.softmax(attn_scores, dim=-1)


def explain_model(model: Any, method: str, dtype: torch.dtype = torch.float64) -> Explanation:
    """The oracle's answer; ``dtype`` is what norms and softmax are computed in."""
    weights = LlamaWeights.copy_from(model)
    options = METHODS[method]
    return explain(weights, TOKENS, TARGETS, norm_dtype=dtype, softmax_dtype=dtype, **options)


def run_engine(model: Any, method: str) -> Any:
    """The engine's answer on a bridge around ``model``."""
    bridge = build_bridge_from_module(
        model, architecture="LlamaForCausalLM", hf_config=model.config, device="cpu"
    )
    bridge.eval()
    _, cache = lenslrp.run_with_relevance(
        bridge, TOKENS, target=TARGETS.tolist(), composite=COMPOSITES[method]()
    )
    return cache


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; absolute where all of it is 0."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().item()
    return (actual.double() - expected).abs().max().item() / (scale or 1.0)


def compare(cache: Any, expected: Explanation, tolerance: float) -> None:
    """Every hook the oracle knows, the tokens, and the account; all failures in one message."""
    differences = {
        name: relative_difference(cache[name], value) for name, value in expected.relevance.items()
    }
    differences["tokens"] = relative_difference(cache.tokens, expected.tokens)
    differences["target"] = relative_difference(cache.target.value, expected.target)
    wrong = {name: diff for name, diff in differences.items() if not diff <= tolerance}
    assert not wrong, f"relative difference above {tolerance}: {wrong}"


# ------------------------------------------------------------------ the oracle itself


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_oracle_logits_are_hugging_faces(kv_heads: int, biases: bool) -> None:
    model = make_model(kv_heads, biases=biases)
    with torch.no_grad():
        reference = model(TOKENS).logits
    narrow = explain_model(model, "attnlrp", torch.float32)
    assert relative_difference(narrow.logits, reference) < 1e-6
    wide = explain_model(model, "attnlrp", torch.float64)
    assert relative_difference(wide.logits, reference) < 1e-5


@pytest.mark.parametrize("method", ["cp-gate-uniform", "cp-gate-up"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_oracle_cp_conserves_at_every_residual(
    kv_heads: int, method: str, dtype: torch.dtype
) -> None:
    explanation = explain_model(make_model(kv_heads), method, dtype)
    for name, value in explanation.relevance.items():
        if "hook_resid" in name or name in ("hook_embed", "ln_final.hook_in"):
            total = value.sum(dim=(1, 2))
            assert relative_difference(total, explanation.target) < 1e-12, name
    assert explanation.biases.abs().max() == 0
    assert explanation.softmax.abs().max() == 0


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_oracle_account_closes(kv_heads: int, method: str, biases: bool) -> None:
    explanation = explain_model(make_model(kv_heads, biases=biases), method)
    account = explanation.tokens.sum(dim=1) + explanation.softmax + explanation.biases
    torch.testing.assert_close(account, explanation.target, rtol=1e-11, atol=1e-11)
    if method == "attnlrp":
        assert (explanation.softmax / explanation.target).abs().min() > 1e-3
    if biases:
        assert (explanation.biases / explanation.target).abs().min() > 1e-3


def test_oracle_masked_entries_are_exactly_zero() -> None:
    relevance = explain_model(make_model(2), "attnlrp").relevance
    future = torch.ones(N_POS, N_POS, dtype=torch.bool).triu(1)
    for layer in range(N_LAYERS):
        for name in ("hook_pattern", "hook_attn_scores"):
            assert (relevance[f"blocks.{layer}.attn.{name}"][..., future] == 0).all()


# ------------------------------------------------------------------ the engine


@pytest.mark.parametrize("biases", [False, True], ids=["bias-free", "biases"])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_engine_equals_oracle(kv_heads: int, method: str, biases: bool) -> None:
    model = make_model(kv_heads, biases=biases)
    expected = explain_model(model, method, torch.float32)
    compare(run_engine(model, method), expected, 1e-6)


@pytest.mark.parametrize("biases", [False, True], ids=["bias-free", "biases"])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_engine_equals_oracle_in_float64_throughout(
    kv_heads: int, method: str, biases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttentionBridge, "_masked_softmax", softmax_in_float64)
    model = make_model(kv_heads, biases=biases, wide=True)
    expected = explain_model(model, method)
    compare(run_engine(model, method), expected, 1e-9)


@pytest.mark.parametrize("method", list(METHODS))
def test_ledger_terms_equal_the_oracles(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionBridge, "_masked_softmax", softmax_in_float64)
    model = make_model(2, biases=True, wide=True)
    expected = explain_model(model, method)
    ledger = run_engine(model, method).ledger()
    terms: tuple[tuple[Literal["target", "leaves", "biases", "softmax"], Tensor], ...] = (
        ("target", expected.target),
        ("leaves", expected.tokens.sum(dim=1)),
        ("biases", expected.biases),
        ("softmax", expected.softmax),
    )
    for name, value in terms:
        assert getattr(ledger, name) == pytest.approx(value.sum().item(), rel=1e-9, abs=1e-9)

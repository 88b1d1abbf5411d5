"""Quantised weights: right, or refused by the name of the module.

The modules are made up after those that users meet: packed integers in a buffer (GPTQ, AWQ), a
tensor subclass that unpacks (torchao), a kernel of its own, something added to a weight. The
packages themselves are in tests/conformance/models/test_quantised.py; packed parameters that belong
to no linear layer are in test_bad_input.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lenslrp
from lenslrp.hooks import ZPLUS, Gamma
from tests.unit.tiny import SIZES, TOKENS, changes, snapshot


class QuantLinear(nn.Module):
    """Integers in a buffer and a scale for each output; dequantised at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int32))
        self.register_buffer("scales", scale.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def dequantised(self) -> Tensor:
        weight: Tensor = self.qweight.to(self.scales.dtype) * self.scales
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.saved_tensors[0], None


class KernelLinear(QuantLinear):
    """The same with a kernel of its own, as compiled extensions have."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Kernel.apply(x, self.dequantised())
        return y if self.bias is None else y + self.bias


class AdaptedLinear(nn.Linear):
    """A linear layer that adds something to what its weight gives."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x.sum(dim=-1, keepdim=True)


class Packed(Tensor):
    """A weight that says it is float64 and is not, as torchao's are."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Packed:
        made: Packed = Tensor._make_subclass(cls, data)
        return made

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)


PLACES = ("q_proj", "o_proj", "gate_proj", "down_proj")


def llama(change: Any) -> Any:
    """A tiny Llama with biases, of whose linear layers ``change`` makes others."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=1, attention_bias=True, mlp_bias=True)
    ).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
    for layer in model.model.layers:
        for place in PLACES:
            owner = layer.self_attn if place in ("q_proj", "o_proj") else layer.mlp
            setattr(owner, place, change(getattr(owner, place)))
    return lenslrp.load(model.eval())


def rounded(linear: nn.Linear) -> nn.Linear:
    """A plain layer with the weights that quantisation leaves."""
    with torch.no_grad():
        linear.weight.copy_(QuantLinear(linear).dequantised())
    return linear


COMPOSITES: dict[str, Any] = {
    "AttnLRP": lenslrp.AttnLRP(),
    "CPLRP": lenslrp.CPLRP(),
    "GradientTimesInput": lenslrp.GradientTimesInput(),
    "gamma": {"linear": Gamma(0.1), "projection": Gamma(0.3)},
    "gamma in MLPs": {"linear": Gamma(0.1)},
    "z+": {"linear": ZPLUS, "projection": ZPLUS},
}


def require_equal(model: Any, plain: Any, composite: Any) -> None:
    """The relevance of the float model with the same weights, and a ledger that closes."""
    logits, found = lenslrp.run_with_relevance(model, TOKENS, 5, composite)
    reference, expected = lenslrp.run_with_relevance(plain, TOKENS, 5, composite)
    torch.testing.assert_close(logits, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-9, atol=1e-9)
    assert abs(found.ledger().error) < 1e-9
    assert found.ledger().biases == pytest.approx(expected.ledger().biases, rel=1e-9)


@pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)
@pytest.mark.parametrize("kind", [QuantLinear, KernelLinear])
def test_dequantised_at_every_call_is_right(kind: Any, composite: Any) -> None:
    model, plain = llama(kind), llama(rounded)
    model(TOKENS)  # TransformerLens sets some attributes at the first pass
    before = snapshot(model)
    require_equal(model, plain, composite)
    assert changes(before, model) == []


@pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)
def test_something_added_to_a_weight_is_part_of_it(composite: Any) -> None:
    def adapted(linear: nn.Linear) -> nn.Linear:
        made = AdaptedLinear(linear.in_features, linear.out_features).double()
        made.load_state_dict(linear.state_dict())
        return made

    def merged(linear: nn.Linear) -> nn.Linear:
        with torch.no_grad():
            linear.weight.add_(0.5)
        return linear

    require_equal(llama(adapted), llama(merged), composite)


@pytest.mark.parametrize(("role", "first"), [("projection", r"attn\.q"), ("linear", r"mlp\.\w+")])
def test_what_is_not_linear_is_refused_by_name(role: str, first: str) -> None:
    class Clipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clamp(-0.05, 0.05))

    def clipped(linear: nn.Linear) -> nn.Linear:
        made = Clipped(linear.in_features, linear.out_features).double()
        made.load_state_dict(linear.state_dict())
        return made

    model = llama(clipped)
    before = snapshot(model)
    message = rf"blocks\.0\.{first} is a Clipped, which does not compute x W\^T \+ b"
    with pytest.raises(lenslrp.InputError, match=message):
        lenslrp.run_with_relevance(model, TOKENS, 5, {role: Gamma(0.1)})
    assert changes(before, model) == []
    with pytest.raises(lenslrp.CoverageError, match=r"no rule for Clamp.*\(Clipped\)"):
        lenslrp.run_with_relevance(model, TOKENS, 5)


@pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)
def test_a_tensor_that_unpacks_is_right(composite: Any) -> None:
    def packed(linear: nn.Linear) -> nn.Linear:
        linear.weight = nn.Parameter(Packed(linear.weight.data), requires_grad=False)
        return linear

    require_equal(llama(packed), llama(lambda linear: linear), composite)


def test_a_packed_weight_of_another_module_is_refused_by_name() -> None:
    model = llama(lambda linear: linear)
    embedding = model.original_model.model.embed_tokens.original_component
    embedding.weight = nn.Parameter(Packed(embedding.weight.data), requires_grad=False)
    message = r"embed_tokens\.weight is quantised .*Packed.* belongs to a Embedding; .* float32"
    with pytest.raises(lenslrp.InputError, match=message):
        lenslrp.run_with_relevance(model, TOKENS, 5)

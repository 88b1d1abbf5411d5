"""What LensLRP does not know is refused by name, and a user teaches it in a line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers.models.llama.modeling_llama import LlamaAttention

import lenslrp
from lenslrp.hooks import Identity, Normalisation, Operations, Plain
from lenslrp.hooks.composites import Composite
from tests.unit.tiny import FAMILIES, TOKENS


class Swishy(nn.Module):
    """An activation that no library has."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.5 * x)


class Manhattan(nn.Module):
    """A norm by the mean of absolute values."""

    constant = False

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(width, generator=generator).double())

    def scale(self, x: Tensor) -> Tensor:
        scale = x.abs().mean(dim=-1, keepdim=True)
        return scale.detach() if self.constant else scale

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / self.scale(x)


class CentredManhattan(Manhattan):
    """The same, with the mean taken away, and a bias."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        generator = torch.Generator().manual_seed(6)
        self.bias = nn.Parameter(0.4 * torch.randn(width, generator=generator).double())

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        return self.weight * x / self.scale(x) + self.bias


class ConstantManhattan(Manhattan):
    """The oracle: calculus on a denominator that is a constant is the rule."""

    constant = True


class ConstantCentredManhattan(CentredManhattan):
    constant = True


NORMS: list[tuple[type[Manhattan], type[Manhattan], Normalisation]] = [
    (Manhattan, ConstantManhattan, Normalisation()),
    (CentredManhattan, ConstantCentredManhattan, Normalisation(centred=True)),
]


def llama() -> nn.Module:
    """A tiny Llama, not yet in a bridge, with weights far from zero."""
    torch.manual_seed(0)
    model = FAMILIES["llama"]().to(torch.float64)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(10 if "emb" in name else 6)
    return model


def changed(part: str, make: type[nn.Module], *width: int) -> nn.Module:
    """A tiny Llama with one part of each block replaced."""
    model = llama()
    for layer in model.model.layers:  # type: ignore[union-attr]
        owner = layer.mlp if part == "act_fn" else layer  # type: ignore[union-attr]
        setattr(owner, part, make(*width))
    return lenslrp.load(model)  # type: ignore[no-any-return]


def explain(model: nn.Module, composite: Composite) -> lenslrp.RelevanceCache:
    plain = model(TOKENS)
    logits, R = lenslrp.run_with_relevance(model, TOKENS, 5, composite)
    assert torch.equal(logits, plain)
    assert R.coverage.ok
    assert abs(R.ledger().error) < 1e-9
    return R


def test_unknown_activation_is_refused_by_name_and_taught() -> None:
    model = changed("act_fn", Swishy)
    with pytest.raises(lenslrp.CoverageError, match=r"blocks\.0\.mlp\.act_fn \(Swishy\)"):
        lenslrp.run_with_relevance(model, TOKENS, 5)
    R = explain(model, lenslrp.AttnLRP().extended({Swishy: Identity()}))
    assert R.ledger().plain == 0


@pytest.mark.parametrize(("norm", "constant", "rule"), NORMS)
def test_unknown_norm_is_refused_by_name(
    norm: type[Manhattan], constant: type[Manhattan], rule: Normalisation
) -> None:
    with pytest.raises(lenslrp.CoverageError, match=rf"\({norm.__name__}\)"):
        lenslrp.run_with_relevance(changed("input_layernorm", norm, 16), TOKENS, 5)


# In a NormalizationBridge (whose own idea is that it has an RMS norm), and where there is none.
@pytest.mark.parametrize(("part", "width"), [("input_layernorm", 16), ("act_fn", 24)])
@pytest.mark.parametrize(("norm", "constant", "rule"), NORMS)
@pytest.mark.parametrize("table", [lenslrp.AttnLRP, lenslrp.CPLRP, lenslrp.GradientTimesInput])
def test_unknown_norm_is_taught(
    norm: type[Manhattan],
    constant: type[Manhattan],
    rule: Normalisation,
    part: str,
    width: int,
    table: type[Composite],
) -> None:
    R = explain(changed(part, norm, width), table().extended({norm: rule}))
    oracle = explain(changed(part, constant, width), table().extended({constant: Plain()}))
    torch.testing.assert_close(R.tokens, oracle.tokens, rtol=1e-8, atol=1e-9)
    biased = norm is CentredManhattan
    assert (abs(R.ledger().biases) > 1e-3) == biased


def test_a_norm_described_wrongly_is_refused() -> None:
    model = changed("input_layernorm", CentredManhattan, 16)
    table = lenslrp.AttnLRP()
    with pytest.raises(lenslrp.InputError, match=r"CentredManhattan .*it fits .*centred=True"):
        lenslrp.run_with_relevance(
            model, TOKENS, 5, table.extended({CentredManhattan: Normalisation()})
        )
    named_wrongly = Normalisation(centred=True, bias="shift")
    with pytest.raises(lenslrp.InputError, match="no norm"):
        lenslrp.run_with_relevance(
            model, TOKENS, 5, table.extended({CentredManhattan: named_wrongly})
        )
    with pytest.raises(lenslrp.InputError, match=r"act_fn: Swishy .*no norm"):
        lenslrp.run_with_relevance(
            changed("act_fn", Swishy), TOKENS, 5, table.extended({Swishy: Normalisation()})
        )


class SigmoidAttention(LlamaAttention):
    """Every score has a sigmoid of its own, in place of one softmax over a row of them."""

    def pattern(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores).tril()

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(self.num_key_value_groups, dim=1) for t in (k, v))
        z = self.pattern(self.scaling * q @ k.transpose(2, 3)) @ v
        return self.o_proj(z.transpose(1, 2).flatten(2)), None


class DifferenceAttention(SigmoidAttention):
    """A second softmax, of a higher temperature, is subtracted from the first."""

    def pattern(self, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -1e9)
        return torch.softmax(scores, dim=-1) - 0.5 * torch.softmax(scores / 4, dim=-1)


class SoftmaxAttention(SigmoidAttention):
    """Without positions, but a softmax over the scores: attention as LensLRP knows it."""

    def pattern(self, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -1e9)
        return torch.softmax(scores, dim=-1)


ATTENTIONS = [SigmoidAttention, DifferenceAttention]


def with_attention(kind: type[SigmoidAttention]) -> nn.Module:
    """A tiny Llama, not yet in a bridge, whose attention is a user's own."""
    model = llama()
    for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr]
        own = kind(model.config, index).to(torch.float64)  # type: ignore[arg-type]
        own.load_state_dict(layer.self_attn.state_dict())  # type: ignore[union-attr]
        layer.self_attn = own  # type: ignore[union-attr]
    return model.eval()


@pytest.mark.parametrize("kind", [*ATTENTIONS, SoftmaxAttention])
def test_a_bridge_calls_the_attention_that_is_there(kind: type[SigmoidAttention]) -> None:
    model = with_attention(kind)
    with torch.no_grad():
        own = model(TOKENS).logits
        assert torch.equal(lenslrp.load(model)(TOKENS), own)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_unknown_attention_is_refused_by_name(kind: type[SigmoidAttention]) -> None:
    model = lenslrp.load(with_attention(kind))
    operation = "Sigmoid" if kind is SigmoidAttention else "Softmax"
    name = rf"{operation} in blocks\.\d\.attn \({kind.__name__}\)"
    with pytest.raises(lenslrp.CoverageError, match=name):
        lenslrp.run_with_relevance(model, TOKENS, 5)


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("table", [lenslrp.AttnLRP, lenslrp.CPLRP, lenslrp.GradientTimesInput])
def test_unknown_attention_is_taught(kind: type[SigmoidAttention], table: type[Composite]) -> None:
    model = lenslrp.load(with_attention(kind))
    taught = table().extended({kind: Operations()})
    R = explain(model, taught)
    ledger = R.ledger()
    assert (abs(ledger.softmax) > 1e-3) == (table is not lenslrp.CPLRP)
    if table is lenslrp.CPLRP:  # no biases: all of it arrives
        assert ledger.leaves == pytest.approx(ledger.target, rel=1e-9)
    if table is lenslrp.GradientTimesInput:
        leaf = model.embed(TOKENS).detach().requires_grad_()
        (g,) = torch.autograd.grad(model(leaf)[:, -1, 5].sum(), leaf)
        torch.testing.assert_close(R.tokens, (leaf * g).sum(dim=-1).detach())


def test_an_attention_with_a_softmax_of_its_own_needs_no_teaching() -> None:
    model = lenslrp.load(with_attention(SoftmaxAttention))
    R = explain(model, lenslrp.AttnLRP())
    assert "blocks.0.attn.hook_pattern" in R
    explain(model, lenslrp.CPLRP())


def test_an_attention_that_the_bridge_passes_over_is_refused_by_name() -> None:
    """Booted by TransformerLens alone, the bridge computes Llama's attention in its place."""
    model = with_attention(SoftmaxAttention)
    bridge = build_bridge_from_module(
        model, "LlamaForCausalLM", hf_config=model.config, device="cpu"
    ).eval()
    with pytest.raises(lenslrp.CoverageError, match=r"blocks\.0\.attn \(SoftmaxAttention\)"):
        lenslrp.run_with_relevance(bridge, TOKENS, 5)

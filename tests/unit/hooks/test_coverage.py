"""No silent gaps: an operation without a rule is named, or said to be uncovered.

Raw operations are hidden inside a wrapped Hugging Face MLP, activations and norms are exchanged for
classes that LensLRP has never seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.errors import CoverageError
from lenslrp.hooks import graph_walk
from lenslrp.hooks.rule_types import Identity, Plain
from tests.unit.tiny import TOKENS, embedding_leaf, tiny

Forward = Callable[[Any, Tensor], Tensor]


def post(mlp: Any, x: Tensor) -> Tensor:
    out: Tensor = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return out


def with_mlp(forward: Forward, layer: int = 0) -> TransformerBridge:
    """A tiny Llama, one of whose MLPs computes something else."""
    model = tiny("llama")
    mlp = model.blocks[layer].mlp.original_component
    mlp.forward = MethodType(forward, mlp)
    return model


def explain(model: TransformerBridge, **options: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(model, TOKENS, 5, **options)[1]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 7 * g


class Add(Doubled):
    """Bears the name of a linear operation, and is none."""


class Read(Doubled):
    """Bears the name of one of LensLRP's own, and is none."""


HIDDEN: dict[str, tuple[Forward, str]] = {
    "clamp": (lambda m, x: m.down_proj(post(m, x).clamp(-0.1, 0.1)), "Clamp"),
    "clamp of the output": (lambda m, x: m.down_proj(post(m, x)).clamp(-0.1, 0.1), "Clamp"),
    "exp": (lambda m, x: m.down_proj(post(m, x)) + torch.exp(x), "Exp"),
    "a third factor": (lambda m, x: m.down_proj(post(m, x) * m.up_proj(x)), "Mul"),
    "a factor on the output": (lambda m, x: m.down_proj(post(m, x)) * x, "Mul"),
    "a square before": (lambda m, x: m.down_proj(post(m, x * x)), "Mul"),
    "a square after": (lambda m, x: m.down_proj(post(m, x)).pow(2), "Pow"),
    "absolute value": (lambda m, x: m.down_proj(post(m, x).abs()), "Abs"),
    "functional activation": (
        lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)),
        "Silu",
    ),
    "relu": (lambda m, x: torch.relu(m.down_proj(post(m, x))), "Relu"),
    "softmax": (lambda m, x: m.down_proj(post(m, x).softmax(dim=-1)), "Softmax"),
    "tanh": (lambda m, x: m.down_proj(post(m, x)).tanh(), "Tanh"),
    "sigmoid": (lambda m, x: m.down_proj(post(m, x)).sigmoid(), "Sigmoid"),
    "maximum": (lambda m, x: torch.maximum(m.down_proj(post(m, x)), x.new_zeros(())), "Maximum"),
    "a quotient": (lambda m, x: m.down_proj(post(m, x)) / (x + 50), "Div"),
    "a constant over x": (
        lambda m, x: m.down_proj(post(m, x)) + torch.ones_like(x) / (x + 50),
        "Div",
    ),
    "functional norm": (lambda m, x: F.layer_norm(m.down_proj(post(m, x)), (16,)), "NativeLayer"),
    "matrix product": (lambda m, x: m.down_proj(post(m, x)) @ x.mT @ x / 50, "Bmm|MatMul"),
    "own function": (lambda m, x: Doubled.apply(m.down_proj(post(m, x))), "Doubled"),
    "own function named Add": (lambda m, x: Add.apply(m.down_proj(post(m, x))), "Add"),
    "own function named Read": (lambda m, x: Read.apply(m.down_proj(post(m, x))), "Read"),
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_hidden_operation_is_named(hidden: str) -> None:
    forward, operation = HIDDEN[hidden]
    model = with_mlp(forward, layer=1)
    with pytest.raises(CoverageError) as caught:
        explain(model)
    message = str(caught.value)
    assert message.startswith("LlamaForCausalLM: no rule for ")
    assert any(f"no rule for {name}" in message for name in operation.split("|"))
    assert "blocks.1.mlp" in message
    assert "composite.extended" in message
    assert "strict=False" in message


DETACHED: dict[str, Forward] = {
    "input": lambda m, x: m.down_proj(post(m, x.detach())),
    "neurons": lambda m, x: m.down_proj(post(m, x).detach()),
    "output": lambda m, x: m.down_proj(post(m, x)).detach(),
    "gate": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)).detach() * m.up_proj(x)),
    "up": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x).detach()),
    "no_grad": lambda m, x: torch.no_grad()(lambda: m.down_proj(post(m, x)))(),
}


@pytest.mark.parametrize("place", DETACHED)
def test_a_hidden_detach_is_found(place: str) -> None:
    """Nothing on the graph is wrong: a part of the graph, and of the relevance, is missing."""
    model = with_mlp(DETACHED[place])
    with pytest.raises(CoverageError, match=r"blocks\.0\.mlp"):
        explain(model)


@pytest.mark.parametrize("place", ["gate", "neurons"])
def test_a_hidden_detach_is_not_hidden_by_strict_false(place: str) -> None:
    with pytest.warns(UserWarning, match=r"blocks\.0\.mlp"):
        kept = explain(with_mlp(DETACHED[place]), strict=False)
    assert kept.coverage.uncovered
    assert not kept.coverage.ok


def test_a_rule_whose_operation_never_ran() -> None:
    def forward(mlp: Any, x: Tensor) -> Tensor:
        out: Tensor = mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x))
        return out

    with pytest.raises(CoverageError, match="never ran") as caught:
        explain(with_mlp(forward))
    assert "identity at blocks.0.mlp.act_fn" in str(caught.value)


def test_linear_surroundings_need_no_rule() -> None:
    def forward(mlp: Any, x: Tensor) -> Tensor:
        y = post(mlp, 1.5 * x.roll(1, dims=-1))
        y = torch.cat([y[..., :8], -y[..., 8:].flip(-1)], dim=-1).reshape(*y.shape)
        out: Tensor = mlp.down_proj(y) / 3 + x.mean(dim=-1, keepdim=True)
        return out

    kept = explain(with_mlp(forward))
    assert abs(kept.ledger().error) < 1e-9
    assert kept.coverage.ok


def test_low_level_verify() -> None:
    model = with_mlp(HIDDEN["clamp"][0])
    with (
        lenslrp.relevance_rules(model, lenslrp.AttnLRP()) as rules,
        model.hooks(fwd_hooks=[embedding_leaf([])]),
    ):
        logits = model(TOKENS)
        with pytest.raises(CoverageError, match="LlamaForCausalLM: no rule for Clamp"):
            rules.verify(logits)
    model = tiny("llama")
    with (
        lenslrp.relevance_rules(model, lenslrp.AttnLRP()) as rules,
        model.hooks(fwd_hooks=[embedding_leaf([])]),
    ):
        rules.verify(model(TOKENS))


def test_only_what_is_on_the_path_counts() -> None:
    """A latent unit below the hidden operation can be explained."""
    model = with_mlp(HIDDEN["clamp"][0], layer=1)
    target = lenslrp.targets.Activation("blocks.0.mlp.hook_post", 3)
    kept = lenslrp.run_with_relevance(model, TOKENS, target)[1]
    assert abs(kept.ledger().error) < 1e-9
    assert set(kept.coverage.sites["layer"]) == {0}
    with pytest.raises(CoverageError, match="Clamp"):
        explain(model)
    with pytest.raises(CoverageError, match="Clamp"):
        lenslrp.relevance_for_targets(model, TOKENS, [target, 5])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "native"])
def test_the_table_has_every_rule(family: str) -> None:
    """Norms that the bridge computes itself (GPT-2) as well as those that it delegates."""
    sites = explain(tiny(family)).coverage.sites
    assert sites["fired"].all()
    assert {"norm", "activation", "softmax", "attention_qk", "attention_av"} <= set(sites["role"])
    assert {0, 1} == set(sites["layer"].dropna())


# --- strict=False --------------------------------------------------------------------------------


def test_not_strict_warns_once_and_notes_it() -> None:
    model = with_mlp(HIDDEN["clamp"][0], layer=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits, kept = lenslrp.run_with_relevance(model, TOKENS, 5, strict=False)
    assert len(caught) == 1
    assert "no rule for Clamp" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(kept.coverage.uncovered) == 1
    assert "Clamp" in kept.coverage.uncovered[0]
    assert "blocks.1.mlp" in kept.coverage.uncovered[0]
    assert "NO RULE: Clamp" in str(kept.coverage)
    assert not kept.coverage.ok
    assert torch.isfinite(kept.tokens).all()
    assert torch.equal(logits, model(TOKENS))


def test_not_strict_warns_once_for_many_targets() -> None:
    model = with_mlp(HIDDEN["clamp"][0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        caches = lenslrp.relevance_for_targets(model, TOKENS, [3, 4, 5], strict=False)
    assert len(caught) == 1
    assert all(kept.coverage.uncovered for kept in caches)


def test_not_strict_is_silent_where_all_is_covered() -> None:
    model = tiny("llama")
    strict = explain(model)
    kept = explain(model, strict=False)
    assert torch.equal(kept.tokens, strict.tokens)
    assert kept.coverage.uncovered == []
    assert kept.coverage.ok


# --- classes that LensLRP does not know ----------------------------------------------------------


class Swish2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * x)


def with_activation() -> TransformerBridge:
    model = tiny("llama")
    for block in model.blocks:
        block.mlp.original_component.act_fn = Swish2()
    return model


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(CoverageError, match=r"LlamaForCausalLM: .*blocks\.\d\.mlp.*Swish2"):
        explain(with_activation())


def test_an_unknown_activation_under_strict_false() -> None:
    with pytest.warns(UserWarning, match="Sigmoid"):
        kept = explain(with_activation(), strict=False)
    assert any("Sigmoid" in gap for gap in kept.coverage.uncovered)
    assert torch.isfinite(kept.tokens).all()


@pytest.mark.parametrize("rule", [Identity(), Plain()], ids=["identity", "plain"])
@pytest.mark.parametrize("composite", [lenslrp.AttnLRP(), lenslrp.CPLRP(gate="up")])
def test_an_unknown_activation_with_a_rule(composite: lenslrp.Composite, rule: Any) -> None:
    kept = explain(with_activation(), composite=composite.extended({Swish2: rule}))
    assert abs(kept.ledger().error) < 1e-9
    assert kept.coverage.ok


def test_a_known_activation_can_be_given_another_rule() -> None:
    model = tiny("llama")
    activation = type(model.blocks[0].mlp.original_component.act_fn)
    kept = explain(model, composite=lenslrp.AttnLRP().extended({activation: Plain()}))
    expected = explain(model, composite={"activation": Plain()})
    assert torch.equal(kept.tokens, expected.tokens)


class OddNorm(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)


def with_norm() -> TransformerBridge:
    model = tiny("llama")
    norm = model.blocks[1].ln1
    norm.set_original_component(OddNorm(norm.original_component.weight))
    return model


def test_an_unknown_norm_is_named() -> None:
    with pytest.raises(CoverageError, match=r"LlamaForCausalLM: .*blocks\.1\..*OddNorm"):
        explain(with_norm())


def test_an_unknown_norm_under_strict_false() -> None:
    with pytest.warns(UserWarning, match="Rsqrt"):
        kept = explain(with_norm(), strict=False)
    assert any("Rsqrt" in gap for gap in kept.coverage.uncovered)
    assert torch.isfinite(kept.tokens).all()


class TwiceLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OneMoreLayerNorm(nn.LayerNorm):
    """The gain is 1 + weight, as in Nemotron's LayerNorm1P."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


@pytest.mark.parametrize("kind", [TwiceLayerNorm, OneMoreLayerNorm])
def test_a_layer_norm_with_a_forward_of_its_own_is_right_or_refused(
    kind: type[nn.LayerNorm],
) -> None:
    model = tiny("phi")
    norm = model.blocks[0].ln1
    own = kind(16, eps=norm.original_component.eps).double().eval()
    own.load_state_dict(norm.original_component.state_dict())
    norm.set_original_component(own)
    try:
        kept = explain(model)
    except CoverageError as error:
        assert kind.__name__ in str(error)  # noqa: PT017 - refused is as good as right
    else:
        assert abs(kept.ledger().error) < 1e-9


def test_a_clamp_counts_only_where_it_clips() -> None:
    """Inside its bounds it is the identity; outside it has no rule."""
    x = torch.linspace(-1.0, 1.0, 5, requires_grad=True)
    assert graph_walk.walk([(x * 2).clamp(-3, 3)]).gaps == []
    assert graph_walk.walk([x.clamp(torch.tensor(-2.0), torch.tensor(2.0))]).gaps == []
    for clipped in (x.clamp(min=-0.5), x.clamp(max=0.5), x.clamp(-0.5, 0.5)):
        assert [gap.operation for gap in graph_walk.walk([clipped]).gaps] != []


def test_a_maximum_is_linear_where_it_only_floors_masked_scores() -> None:
    """XGLM keeps masked scores from falling below the type's minimum."""
    x = torch.tensor([1.0, -3.0, 2.0], requires_grad=True)
    floor = torch.tensor(torch.finfo(torch.float32).min)
    masked = x + torch.tensor([0.0, float("-inf"), 0.0])
    assert graph_walk.walk([torch.maximum(masked, floor)]).gaps == []
    assert graph_walk.walk([torch.maximum(floor, masked)]).gaps == []
    for other in (torch.tensor(0.0), x * 2):  # a rectifier; the larger of two live values
        gaps = graph_walk.walk([torch.maximum(x, other)]).gaps
        assert [gap.operation for gap in gaps] == ["Maximum"]

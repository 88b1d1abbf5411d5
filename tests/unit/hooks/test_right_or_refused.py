"""Code that a graph, a name or a hook could hide: relevance is right, or it is refused.

References are the same arithmetic written where nothing hides it (in the MLP's own code, or out of
place), and the account of the target, which closes only where every term is measured.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformer_lens.model_bridge import TransformerBridge
from transformers.activations import XIELUActivation

import lenslrp
from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks import Identity, Normalisation, Operations, Plain
from lenslrp.hooks.checks import elementwise
from lenslrp.hooks.sites import Site
from tests.unit.tiny import FAMILIES, TOKENS, tiny

Forward = Callable[[Any, Tensor], Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def explain(model: TransformerBridge, **options: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(model, TOKENS, 5, **options)[1]


def module(forward: Forward) -> nn.Module:
    """An element of a model that computes ``forward``; it has three layers of its own to do so."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b, self.c = (nn.Linear(24, 24).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Own().eval()


def with_activation(act: nn.Module) -> TransformerBridge:
    model = tiny("llama")
    model.blocks[1].mlp.original_component.act_fn = act
    return model


def with_mlp(forward: Forward) -> TransformerBridge:
    model = tiny("llama")
    mlp = model.blocks[1].mlp.original_component
    mlp.forward = MethodType(forward, mlp)
    return model


# ------------------------------------------------------------------- writes into views


def write_tanh(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :12].tanh_()
    return y


def write_product(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :12].mul_(x[..., 12:])
    return y


def write_square(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :12].pow_(2)
    return y


def write_silu(x: Tensor) -> Tensor:
    y = x.clone()
    F.silu(y[..., :12], inplace=True)
    return y


NONLINEAR = {"tanh_": write_tanh, "mul_": write_product, "pow_": write_square, "silu": write_silu}


@pytest.mark.parametrize("options", [{}, {"ledger": False, "names_filter": []}], ids=str)
@pytest.mark.parametrize("name", NONLINEAR)
def test_a_write_into_a_view_is_named(name: str, options: dict[str, Any]) -> None:
    write = NONLINEAR[name]
    with pytest.raises(CoverageError, match=rf"no rule for {name} in blocks\.1"):
        explain(with_activation(module(lambda _, x: write(x))), **options)
    model = tiny("llama")
    with (
        model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", lambda x, hook: write(x))]),
        pytest.raises(CoverageError, match=rf"no rule for {name}"),
    ):
        explain(model, **options)


def test_a_linear_write_into_a_view_needs_no_rule() -> None:
    def written(_: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[..., :12] = 2 * x[..., 12:]
        y[:, 1] *= 0.5
        y[..., 3:5].add_(x[..., :2])
        return y

    def apart(_: Any, x: Tensor) -> Tensor:
        y = torch.cat([2 * x[..., 12:], x[..., 12:]], dim=-1)
        y = y * (1 - 0.5 * (torch.arange(x.shape[1]) == 1).to(x))[:, None]
        return y + F.pad(x[..., :2], (3, 24 - 5))

    found, expected = (explain(with_activation(module(f))) for f in (written, apart))
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-12, atol=1e-14)
    assert abs(found.ledger().error) < 1e-12


# ------------------------------------------------------------------- in place


@pytest.mark.parametrize("kind", [nn.SiLU, nn.LeakyReLU, nn.ReLU])
def test_an_activation_that_writes_in_place(kind: type[nn.Module]) -> None:
    found, expected = (
        explain(with_activation(kind(**options))) for options in ({"inplace": True}, {})
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found["blocks.1.mlp.hook_post"], expected["blocks.1.mlp.hook_post"])


@pytest.mark.parametrize("options", [{}, {"names_filter": []}, {"ledger": False}], ids=str)
def test_a_product_in_place(options: dict[str, Any]) -> None:
    def product(mlp: Any, x: Tensor) -> Tensor:
        out: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).mul_(mlp.up_proj(x)))
        return out

    found, expected = explain(with_mlp(product), **options), explain(tiny("llama"), **options)
    assert torch.equal(found.tokens, expected.tokens)


IN_PLACE: dict[str, tuple[Forward, Forward]] = {
    "mul_": (lambda s, x: s.c(s.a(x).mul_(s.b(x))), lambda s, x: s.c(s.a(x) * s.b(x))),
    "relu_": (lambda s, x: s.c(s.a(x).relu_()), lambda s, x: s.c(F.relu(s.a(x)))),
    "inplace=True": (
        lambda s, x: s.c(F.silu(s.a(x), inplace=True)),
        lambda s, x: s.c(F.silu(s.a(x))),
    ),
    "add_": (lambda s, x: s.c(s.a(x).add_(1.5)), lambda s, x: s.c(s.a(x) + 1.5)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_declared_operations_in_place(name: str) -> None:
    results = []
    for forward in IN_PLACE[name]:
        act = module(forward)
        model = with_activation(act)
        rules = lenslrp.AttnLRP().extended({type(act): Operations()})
        logits, found = lenslrp.run_with_relevance(model, TOKENS, 5, rules)
        assert torch.equal(logits, model(TOKENS))  # the value is written where the code reads it
        assert abs(found.ledger().error) < 1e-12
        results.append(found.tokens)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------- norms by their names


def norm(name: str, forward: Forward) -> type[nn.Module]:
    class Norm(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight, self.shift = weight, torch.linspace(-1, 1, 16, dtype=weight.dtype)

        def scaled(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-5)

    return type(name, (Norm,), {"forward": forward})


TREACHEROUS: dict[str, Forward] = {
    "bias": lambda n, x: n.scaled(x) + n.shift,
    "centred": lambda n, x: n.scaled(x - x.mean(dim=-1, keepdim=True)),
    "then linear": lambda n, x: n.scaled(x).cumsum(dim=-1),
    "over tokens": lambda n, x: n.scaled(x).mean(dim=1, keepdim=True).expand_as(x),
    "earlier tokens": lambda n, x: n.scaled(x.cumsum(dim=1)),
    "gain of the input": lambda n, x: n.scaled(x) * (1 + 1e-3 * x.roll(1, dims=-1)),
    "features moved": lambda n, x: n.scaled(x).flip(-1),
    "clipped": lambda n, x: n.scaled(x).clamp(-1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("place", ["ln2", "ln_final"])
@pytest.mark.parametrize("kind", TREACHEROUS)
def test_a_norm_is_one_by_what_it_computes(
    kind: str, place: str, length: int, dtype: torch.dtype
) -> None:
    def with_norm(forward: Forward) -> TransformerBridge:
        model = tiny("llama").to(dtype)
        bridge = model.ln_final if place == "ln_final" else model.blocks[1].ln2
        own = norm("TreacherousRMSNorm", forward)(bridge.original_component.weight)
        bridge.set_original_component(own)
        return model

    tokens = TOKENS[:1, :length]
    honest, plain = with_norm(lambda n, x: n.scaled(x)), tiny("llama").to(dtype)
    near = 1e-4  # Llama's own norm is in float32
    found, expected = (lenslrp.run_with_relevance(m, tokens, 5)[1].tokens for m in (honest, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=near)
    with pytest.raises(CoverageError, match=r"in (blocks\.1\.ln2|ln_final) \(Treacherous"):
        lenslrp.run_with_relevance(with_norm(TREACHEROUS[kind]), tokens, 5)


@pytest.mark.parametrize("kind", sorted(TREACHEROUS.keys() - {"centred"}))
def test_a_norm_that_is_declared_wrongly_is_refused(kind: str) -> None:
    own = norm("Declared", TREACHEROUS[kind])
    for centred in (False, True):
        model = tiny("llama")
        bridge = model.blocks[1].ln2
        bridge.set_original_component(own(bridge.original_component.weight))
        rules = lenslrp.AttnLRP().extended({own: Normalisation(centred=centred)})
        with pytest.raises(InputError, match="Declared does not return its input"):
            explain(model, composite=rules)


# ------------------------------------------------------------------- activations by their classes


class Moved(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, dims=-1)


class Summed(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(dim=1)


def replaced() -> nn.Module:
    act: Any = nn.SiLU()
    act.forward = lambda x: torch.tanh(x) + x.flip(-1)
    return act


@pytest.mark.parametrize("act", [Moved, Summed, replaced])
def test_an_activation_is_one_by_its_code(act: Callable[[], nn.Module]) -> None:
    with pytest.raises(CoverageError, match=r"no rule for (Silu|Gelu|Tanh) in blocks\.1\.mlp"):
        explain(with_activation(act()))


WRONG: dict[str, Forward] = {
    "moved": lambda _, x: F.silu(x).roll(1, dims=-1),
    "over tokens": lambda _, x: F.silu(x).cumsum(dim=1),
    "not 0 at 0": lambda _, x: torch.sigmoid(x),
    "positions by number": lambda _, x: torch.tanh(x[:, :6] + x[:, 5:6]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_activation_that_is_declared_wrongly_is_refused(kind: str) -> None:
    act = module(WRONG[kind])
    with pytest.raises(InputError, match="does not map each number by itself and 0 to 0"):
        explain(with_activation(act), composite=lenslrp.AttnLRP().extended({type(act): Identity()}))


def test_a_declared_module_answers_for_what_is_inside_it() -> None:
    act = module(lambda s, x: s.act(x) * 2)
    act.act = nn.SiLU()
    identity = lenslrp.AttnLRP().extended({type(act): Identity()})
    assert abs(explain(with_activation(act), composite=identity).ledger().error) < 1e-12
    act = module(lambda s, x: s.a(x))  # with a bias
    plain = lenslrp.AttnLRP().extended({type(act): Plain()})
    assert abs(explain(with_activation(act), composite=plain).ledger().error) < 1e-12


def test_xielu_is_bounded_where_it_is_not_quite_zero_at_zero() -> None:
    act: Any = XIELUActivation().double()
    ends = [-1e-12, 0.0, 1e-12, -1e-7, -1e-6, 1e-9, 1.0, -1.0]
    x = torch.tensor(ends, dtype=torch.float64, requires_grad=True)
    apply = elementwise(act, Identity(), Site("act", "XIELU", "activation", Identity(), 0))
    y = apply(x, act(x.detach()))
    assert y is not None
    (factor,) = torch.autograd.grad(y.sum(), x)
    assert float(factor.abs().max()) < 2
    torch.testing.assert_close(factor[-2:], (act(x) / x)[-2:].detach())


# ------------------------------------------------------------------- hooks of the user's


def place_of(model: TransformerBridge, what: str) -> nn.Module:
    block: Any = model.blocks[1]
    mlp = block.mlp.original_component
    return mlp.act_fn if what == "activation" else block.ln2.original_component


HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "adds": lambda y: y + torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype),
    "flips": lambda y: y.flip(-1),
    "sums": lambda y: y.cumsum(dim=1),
    "adds in place": lambda y: y.add_(0.5),
    "adds to a part in place": lambda y: (y[..., :3].add_(0.5), y)[1],
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("what", ["activation", "norm"])
def test_a_native_hook_is_on_the_graph(what: str, hook: str) -> None:
    """The same as the function written into the MLP's code, behind or ahead of its parts."""
    changed = HOOKS[hook]
    model = tiny("llama")
    place_of(model, what).register_forward_hook(lambda _, args, y: changed(y))
    logits, found = lenslrp.run_with_relevance(model, TOKENS, 5)
    assert abs(found.ledger().error) < 1e-12

    def written(mlp: Any, x: Tensor) -> Tensor:
        x = x if what == "activation" else changed(x * 1)
        act = mlp.act_fn(mlp.gate_proj(x))
        act = changed(act * 1) if what == "activation" else act
        out: Tensor = mlp.down_proj(act * mlp.up_proj(x))
        return out

    reference = with_mlp(written)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in the MLP's own code, nobody accounts for what is added
        expected = explain(reference, strict=False, names_filter=[]).tokens
    assert torch.equal(logits, reference(TOKENS))
    torch.testing.assert_close(found.tokens, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("what", ["activation", "norm"])
def test_a_native_hook_without_a_rule_is_refused(what: str) -> None:
    for bare, said in ((torch.tanh, "Tanh"), (torch.ones_like, "cut|no operation")):
        model = tiny("llama")
        place_of(model, what).register_forward_hook(lambda _, args, y, bare=bare: bare(y))
        with pytest.raises(CoverageError, match=said):
            explain(model)


@pytest.mark.parametrize(
    "point", ["mlp.out.hook_in", "attn.o.hook_in", "attn.hook_pattern", "hook_resid_post"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("affine", [lambda x: 1.5 * x + 0.3, lambda x: 0.3 - x])
def test_what_a_hook_adds_absorbs_as_a_bias(
    family: str, point: str, affine: Callable[[Tensor], Tensor]
) -> None:
    model = tiny(family)
    if "out.hook_in" in point and family == "gpt2":
        point = "mlp.hook_post"
    plain = explain(model).ledger()
    with model.hooks(fwd_hooks=[(f"blocks.1.{point}", lambda x, hook: affine(x))]):
        ledger = explain(model).ledger()
    assert abs(ledger.error) < 1e-7  # Gemma's softmax is in float32
    assert abs(ledger.biases - plain.biases) > 1e-6


def test_values_that_a_hook_mixes_in_are_no_constants() -> None:
    model, kept = tiny("llama"), []

    def mix(x: Tensor, hook: Any) -> Tensor:
        return torch.where(x > 0, x, kept[-1][..., : x.shape[-1]].mean(dim=-1, keepdim=True))

    hooks = [
        ("blocks.0.hook_resid_post", lambda x, hook: kept.append(x)),
        ("blocks.1.mlp.hook_post", mix),
    ]
    with model.hooks(fwd_hooks=hooks):
        assert abs(explain(model).ledger().error) < 1e-12


def double(g: Tensor) -> Tensor:
    return 2 * g


@pytest.mark.parametrize("changes", [double, lambda g: None], ids=["changed", "read"])
def test_a_gradient_that_a_hook_changes_is_no_constant(changes: Callable[..., Any]) -> None:
    def hook(x: Tensor, hook: Any) -> Tensor:
        y = x * 1
        y.register_hook(changes)
        return y

    model = tiny("llama")
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", hook)]):
        if changes is double:
            with pytest.raises(CoverageError, match="does not balance"):
                explain(model)
        else:
            assert torch.equal(explain(model).tokens, explain(tiny("llama")).tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_hook_that_changes_little_is_seen(dtype: torch.dtype) -> None:
    model = tiny("gpt2").to(dtype)
    plain = explain(model)
    module = model.blocks[1].mlp.original_component
    reading = module.register_full_backward_hook(lambda *_: None)
    assert torch.equal(explain(model, ledger=False).tokens, plain.tokens)
    reading.remove()
    module.register_full_backward_hook(lambda _, gi, go: (1.02 * gi[0],))
    for ledger in (True, False):
        with pytest.raises(CoverageError, match=r"backward hook at blocks\.1\.mlp changes"):
            explain(model, ledger=ledger)


# ------------------------------------------------------------------- shares of products

BESIDE: dict[str, Forward] = {
    "up": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x) + m.up_proj(x)),
    "gate": lambda m, x: m.down_proj((m.up_proj(x) + 1.0) * m.act_fn(m.gate_proj(x)) - x.repeat(
        1, 1, 2
    )[..., :24]),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"ledger": False}], ids=str)
@pytest.mark.parametrize("kind", BESIDE)
def test_a_term_beside_a_product_is_refused(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(CoverageError, match="also reaches something beside its operation"):
        explain(with_mlp(BESIDE[kind]), **options)


@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_a_term_beside_the_products_of_attention(point: str) -> None:
    """What a hook adds is above the rule, so that it gets all of its gradient."""
    model, kept = tiny("llama"), []

    def add(x: Tensor, hook: Any) -> Tensor:
        return x + 0.1 * kept[-1].mean(dim=-1)[:, None, None, :]

    hooks = [
        ("blocks.0.hook_resid_post", lambda x, hook: kept.append(x)),
        (f"blocks.1.attn.{point}", add),
    ]
    constant = (f"blocks.1.attn.{point}", lambda x, hook: x * torch.linspace(1, 2, 6).to(x) + 0.1)
    for own in (hooks, [constant]):
        with model.hooks(fwd_hooks=own):
            assert abs(explain(model).ledger().error) < 1e-7  # 0.1 on a score of -1e308 is nothing


def test_a_sum_of_products_is_right() -> None:
    def forward(mlp: Any, x: Tensor) -> Tensor:
        act, up = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
        out: Tensor = mlp.down_proj(0.25 * act * up + 0.75 * up * act)
        return out

    found, expected = explain(with_mlp(forward)), explain(tiny("llama"))
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-12, atol=1e-14)


class GatedMLP(nn.Module):
    """An MLP of the user's own, in the place of Llama's."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def test_a_declared_mlp_has_its_rules_from_its_declaration() -> None:
    torch.manual_seed(0)
    inner: Any = FAMILIES["llama"]().double().eval()
    plain = lenslrp.load(copy.deepcopy(inner))
    for layer in inner.model.layers:
        layer.mlp = GatedMLP(layer.mlp)
    rules = lenslrp.AttnLRP().extended({GatedMLP: Operations(gated=True)})
    found, expected = explain(lenslrp.load(inner), composite=rules), explain(plain)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-12, atol=1e-14)
    assert abs(found.ledger().error) < 1e-12


def test_an_einsum_that_contracts_nothing_is_a_product() -> None:
    results = []
    for multiply in (torch.mul, lambda a, b: torch.einsum("bti,bti->bti", a, b)):
        act = module(lambda s, x, multiply=multiply: s.c(multiply(s.a(x), s.b(x))))
        rules = lenslrp.RelP().extended({type(act): Operations()})
        results.append(explain(with_activation(act), composite=rules).tokens)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


class OuterRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.RMSNorm(16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * 2
        return out


def test_a_plain_norm_answers_for_the_norm_inside_it() -> None:
    model = tiny("llama")
    model.ln_final.set_original_component(OuterRMSNorm())
    ledger = explain(model, composite=lenslrp.GradientTimesInput()).ledger()
    assert abs(ledger.error) < 1e-9


# ------------------------------------------------------------------- one module in two places


def share_norm(layers: Any) -> None:
    layers[1].input_layernorm = layers[0].input_layernorm


def share_activation(layers: Any) -> None:
    layers[1].mlp.act_fn = layers[0].mlp.act_fn


def share_mlp(layers: Any) -> None:
    layers[1].mlp = layers[0].mlp


def share_attention(layers: Any) -> None:
    layers[1].self_attn = layers[0].self_attn


def share_linear(layers: Any) -> None:
    layers[1].mlp.up_proj = layers[0].mlp.up_proj


def share_layer(layers: Any) -> None:
    layers[1] = layers[0]


def loaded(share: Callable[[Any], None], *, copied: bool) -> TransformerBridge:
    torch.manual_seed(0)
    inner: Any = FAMILIES["llama"]().double().eval()
    share(inner.model.layers)
    if copied:
        inner.model.layers[1] = copy.deepcopy(inner.model.layers[1])
    return lenslrp.load(inner)


@pytest.mark.parametrize("composite", ["AttnLRP", "CPLRP", "GradientTimesInput"])
@pytest.mark.parametrize("share", [share_norm, share_activation])
def test_a_module_in_two_places_is_as_if_it_were_copied(
    share: Callable[[Any], None], composite: str
) -> None:
    table = getattr(lenslrp, composite)()
    found, expected = (
        explain(loaded(share, copied=copied), composite=table) for copied in (False, True)
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert abs(found.ledger().error) < 1e-12


@pytest.mark.parametrize("share", [share_mlp, share_attention, share_linear, share_layer])
def test_a_component_in_two_places_is_refused(share: Callable[[Any], None]) -> None:
    with pytest.raises(CoverageError, match=r"blocks\.1\S* \(Llama\w+|Linear\) is the same module"):
        explain(loaded(share, copied=False))


# ------------------------------------------------------------------- the balance of the books


@pytest.mark.parametrize("ledger", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_imbalance_is_refused_in_every_type(
    family: str, dtype: torch.dtype, ledger: bool
) -> None:
    model = tiny(family).to(dtype)
    balanced = explain(model, ledger=ledger)
    assert balanced.coverage.balanced
    off = {torch.float64: 1e-3, torch.float32: 2e-2}.get(dtype, 1.0)
    hooks = [("blocks.1.hook_resid_pre", lambda g, hook: g * (1 + off))]
    with model.hooks(bwd_hooks=hooks):
        with pytest.raises(CoverageError, match="the ledger does not balance"):
            explain(model, ledger=ledger)
        with pytest.warns(UserWarning, match="the ledger does not balance"):
            kept = explain(model, ledger=ledger, strict=False)
    assert not kept.coverage.ok
    assert "does not balance" in str(kept.coverage)
    assert torch.equal(explain(model, ledger=ledger).tokens, balanced.tokens)


def test_without_a_ledger_a_graph_that_is_new_is_balanced_first() -> None:
    """A constant in a module's own code: as many nodes as ever, but one."""
    model = tiny("llama")
    explain(model, ledger=False)
    mlp = model.blocks[1].mlp.original_component
    run = mlp.forward
    mlp.forward = lambda x: run(x) + 3.0
    with pytest.raises(CoverageError, match="the ledger does not balance"):
        explain(model, ledger=False)
    del mlp.forward
    with pytest.raises(InputError, match="ledger"):
        explain(model, ledger=False).ledger()


# ------------------------------------------------------------------- what is cut off


def test_values_that_are_cut_off_are_listed() -> None:
    def forward(mlp: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = x.abs().mean()
        scale = x.detach().mean() + x.data.sum() + size
        out: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * scale)
        return out

    cuts = explain(with_mlp(forward)).coverage.cuts
    assert [cut.split(" in ")[0] for cut in cuts] == ["no_grad", "detach", "data"]
    assert all("blocks.1.mlp (LlamaMLP; forward, line" in cut for cut in cuts)
    assert explain(tiny("llama")).coverage.cuts == []


# ------------------------------------------------------------------- nodes that hide a graph


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.site, ctx.opens, ctx.region = Site("a", "b", "norm", Plain(), 0), (), 0
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 7 * g


HIDING: dict[str, Forward] = {
    "Doubled": lambda _, x: Doubled.apply(x),
    "CheckpointFunction": lambda _, x: checkpoint(torch.tanh, x, use_reentrant=True),
    "Tanh": lambda _, x: torch.func.vmap(torch.tanh)(x),
    "Cos": lambda _, x: torch.func.vmap(torch.func.grad(lambda t: torch.sin(t).sum()))(x),
}


@pytest.mark.parametrize("name", HIDING)
def test_a_node_that_hides_others_is_named(name: str) -> None:
    with pytest.raises(CoverageError, match=f"no rule for {name}"):
        explain(with_activation(module(HIDING[name])))


@pytest.mark.parametrize("name", ["Doubled", "CheckpointFunction"])
def test_a_plain_module_hides_none_of_them(name: str) -> None:
    act = module(HIDING[name])
    with pytest.raises(CoverageError, match=f"no rule for {name}"):
        explain(with_activation(act), composite=lenslrp.AttnLRP().extended({type(act): Plain()}))


def test_operations_that_are_recomputed_are_refused() -> None:
    act = module(lambda _, x: checkpoint(F.gelu, x, use_reentrant=False))
    with pytest.raises(CoverageError, match="recomputed in the backward pass"):
        explain(
            with_activation(act), composite=lenslrp.AttnLRP().extended({type(act): Operations()})
        )


def test_a_norm_beside_an_overflow_is_a_norm() -> None:
    """An infinity where the target does not look changes nothing; where it does, it is said."""
    model = tiny("llama")
    tokens = torch.tensor([[3, 4, 5]])
    _, plain = lenslrp.run_with_relevance(model, tokens)
    where = 1

    def overflow(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, where, 3] = torch.inf
        return out

    handle = model.blocks[-1].mlp.hook_post.register_forward_hook(overflow)
    _, R = lenslrp.run_with_relevance(model, tokens)
    assert torch.equal(R.tokens, plain.tokens)
    where = 2
    with pytest.raises(InputError, match="the target is NaN or infinite"):
        lenslrp.run_with_relevance(model, tokens)
    handle.remove()

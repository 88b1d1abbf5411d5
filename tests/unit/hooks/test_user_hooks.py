"""The user's own hooks keep working under rules, and compose with them.

A stock TransformerLens backward hook, which knows nothing of LensLRP, reads at any hook point the
gradient whose product with the activation is the relevance there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from tests.unit.tiny import HEADS, TOKENS, embedding_leaf, own_relevance, tiny

READ = (
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_resid_pre",
    "hook_resid_post",
    "ln2.hook_in",
    "hook_attn_out",
    "hook_mlp_out",
)
COMPOSITES: dict[str, Callable[[], lenslrp.Composite]] = {
    "attnlrp": lenslrp.AttnLRP,
    "cp": lenslrp.CPLRP,
    "gim": lenslrp.GIM,
    "gradient": lenslrp.GradientTimesInput,
}


def explain(model: TransformerBridge, **options: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(model, TOKENS, 5, **options)[1]


def keeper(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(x: Tensor, hook: Any) -> None:
        kept[name] = x.detach().clone()

    return keep


@pytest.mark.parametrize(
    ("family", "composite"),
    [
        ("llama", "attnlrp"),
        ("llama", "cp"),
        ("llama", "gim"),
        ("llama", "gradient"),
        ("gpt2", "attnlrp"),
        ("gpt2", "cp"),
        ("gemma2", "attnlrp"),
        ("neox", "attnlrp"),
        ("native", "attnlrp"),
    ],
)
def test_a_stock_backward_hook_reads_the_gradient_of_relevance(family: str, composite: str) -> None:
    model = tiny(family)
    expected = explain(model, composite=COMPOSITES[composite]())
    names = [f"blocks.{layer}.{name}" for layer in (0, 1) for name in READ]
    names = [name for name in names if name in model.hook_dict]
    values: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    with model.hooks(
        fwd_hooks=[(name, keeper(values, name)) for name in names],
        bwd_hooks=[(name, keeper(gradients, name)) for name in names],
    ):
        kept = explain(model, composite=COMPOSITES[composite]())
    assert torch.equal(kept.tokens, expected.tokens)
    for name in names:
        assert name in values, f"the forward hook at {name} never ran"
        if name not in gradients:  # under CP no gradient reaches queries and keys
            assert not kept[name].any(), f"the backward hook at {name} never ran"
            continue
        x = values[name].masked_fill(values[name].isinf(), 0.0)
        assert torch.allclose(x * gradients[name], kept[name], rtol=1e-9, atol=1e-13), name


def test_hooks_added_for_good_and_to_wrapped_modules_run_once_and_stay() -> None:
    model = tiny("llama")
    expected = explain(model).tokens
    calls: list[str] = []
    model.add_hook("blocks.0.mlp.hook_post", lambda x, hook: calls.append("forward"))
    model.add_hook("blocks.0.mlp.hook_post", lambda x, hook: calls.append("backward"), dir="bwd")
    model.hook_dict["blocks.1.hook_resid_pre"].add_perma_hook(
        lambda x, hook: calls.append("permanent")
    )
    inner = model.blocks[0].mlp.original_component.act_fn
    inner.register_forward_hook(lambda module, args, y: calls.append("torch"))
    assert torch.allclose(explain(model).tokens, expected, rtol=1e-12)
    assert sorted(calls) == ["backward", "forward", "permanent", "torch"]
    model(TOKENS)[:, -1, 5].sum().backward()
    assert len(calls) == 8


def test_run_with_cache_inside_the_rules() -> None:
    model = tiny("llama")
    logits, plain = model.run_with_cache(TOKENS)
    expected = explain(model).tokens
    leaves: list[Tensor] = []
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        with model.hooks(fwd_hooks=[embedding_leaf(leaves)]):
            ruled_logits, cache = model.run_with_cache(TOKENS)
        ruled_logits[:, -1, 5].sum().backward()
        assert torch.allclose(own_relevance(model), expected, rtol=1e-12)
    assert torch.equal(ruled_logits, logits)
    assert set(cache) == set(plain)
    assert all(torch.equal(cache[name], plain[name]) for name in plain)
    (leaf,) = leaves
    assert leaf.grad is not None
    assert torch.allclose((leaf * leaf.grad).sum(dim=-1), expected, rtol=1e-12)


def test_run_with_cache_with_gradients_inside_the_rules() -> None:
    model = tiny("llama")
    names = ["blocks.0.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_pre"]
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        with model.hooks(fwd_hooks=[embedding_leaf([])]):
            loss, cache = model.run_with_cache(
                TOKENS, return_type="loss", incl_bwd=True, names_filter=lambda n: n in names
            )
        assert loss.ndim == 0

    def negated_loss(logits: Tensor) -> Tensor:
        scores = torch.log_softmax(logits[:, :-1], dim=-1)
        return -scores.gather(2, TOKENS[:, 1:, None]).mean()

    kept = lenslrp.run_with_relevance(
        model, TOKENS, lenslrp.targets.Custom(negated_loss), names_filter=names
    )[1]
    for name in names:
        product = cache[name] * cache[name + "_grad"]
        assert torch.allclose(product, kept[name], rtol=1e-9, atol=1e-13), name


def test_reset_hooks_inside_takes_the_users_hooks_and_leaves_the_rules() -> None:
    model = tiny("llama")
    expected = explain(model).tokens
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: x * 0)
        model.reset_hooks()
        assert torch.allclose(own_relevance(model), expected, rtol=1e-12)


# --- editing -------------------------------------------------------------------------------------


def edit_head(z: Tensor, hook: Any) -> Tensor:
    kept = z.clone()
    kept[:, :, 1] = 0.0
    return kept


def edit_head_in_place(z: Tensor, hook: Any) -> Tensor:
    z[:, :, 1] = 0.0
    return z


@pytest.mark.parametrize("edit", [edit_head, edit_head_in_place])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_ablated_head_has_no_relevance(family: str, edit: Callable[..., Tensor]) -> None:
    model = tiny(family)
    plain = model(TOKENS)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", edit)]):
        ablated = model(TOKENS)
        logits, kept = lenslrp.run_with_relevance(model, TOKENS, 5)
    assert torch.equal(logits, ablated)
    assert not torch.allclose(logits, plain)
    for row in range(len(TOKENS)):
        heads = kept.heads(row).loc[1]
        assert len(heads) == HEADS
        assert heads[1] == 0.0
        assert heads[0] != 0.0
    assert abs(kept.ledger().error) < 1e-9
    assert not torch.equal(explain(model).tokens, kept.tokens)


@pytest.mark.parametrize("edit", [edit_head, edit_head_in_place])
def test_an_ablating_hook_inside_the_rules(edit: Callable[..., Tensor]) -> None:
    model = tiny("llama")
    hook = ("blocks.1.attn.hook_z", edit)
    with model.hooks(fwd_hooks=[hook]):
        expected = explain(model).tokens
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()), model.hooks(fwd_hooks=[hook]):
        assert torch.allclose(own_relevance(model), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "name",
    ["hook_embed", "blocks.0.hook_resid_mid", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_v"],
)
def test_a_linear_edit_anywhere_is_part_of_the_model(name: str) -> None:
    def scale(x: Tensor, hook: Any) -> Tensor:
        return 1.5 * x

    model = tiny("llama")
    with model.hooks(fwd_hooks=[(name, scale)]):
        edited = model(TOKENS)
        logits, kept = lenslrp.run_with_relevance(model, TOKENS, 5)
    assert torch.equal(logits, edited)
    assert not torch.allclose(edited, model(TOKENS))
    assert abs(kept.ledger().error) < 1e-9


def test_an_edit_without_a_rule_is_refused_by_name() -> None:
    model = tiny("llama")
    hooks = [("blocks.1.mlp.hook_post", lambda x, hook: x.abs())]
    with (
        model.hooks(fwd_hooks=hooks),
        pytest.raises(lenslrp.CoverageError, match=r"Abs.*blocks\.1"),
    ):
        explain(model)


def test_a_backward_hook_that_cuts_the_gradient_unbalances_the_books() -> None:
    model = tiny("llama")
    hooks = [("blocks.1.hook_mlp_out", lambda g, hook: torch.zeros_like(g))]
    with model.hooks(bwd_hooks=hooks):
        with pytest.raises(lenslrp.CoverageError, match="ledger does not balance"):
            explain(model)
        with pytest.warns(UserWarning, match="ledger does not balance"):
            kept = explain(model, strict=False)
    assert "ledger does not balance" in kept.coverage.notes[0]
    assert not kept.coverage.balanced
    assert not kept.coverage.ok
    assert not kept["blocks.1.mlp.hook_post"].any()
    assert kept["blocks.1.attn.hook_z"].any()


# --- norm internals ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Backward hooks on hook_scale:UserWarning")
@pytest.mark.parametrize("point", ["hook_normalized", "hook_scale"])
@pytest.mark.parametrize("norm", ["blocks.0.ln1", "blocks.1.ln2", "ln_final"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_a_backward_hook_inside_a_norm(family: str, norm: str, point: str) -> None:
    model = tiny(family)
    expected = explain(model)
    kept: dict[str, Tensor] = {}
    with model.hooks(bwd_hooks=[(f"{norm}.{point}", keeper(kept, point))]):
        hooked = explain(model)
    assert torch.allclose(hooked.tokens, expected.tokens, rtol=1e-5, atol=1e-7)
    assert abs(hooked.ledger().error) < 1e-6
    assert (point in kept) == (point == "hook_normalized")  # the scale is a constant: no gradient


@pytest.mark.filterwarnings("ignore:Backward hooks on hook_scale:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_backward_hook_inside_a_norm_under_an_own_loss(family: str) -> None:
    model = tiny(family)
    expected = explain(model).tokens
    kept: dict[str, Tensor] = {}
    hooks = [("blocks.0.ln1.hook_normalized", keeper(kept, "normalized"))]
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()), model.hooks(bwd_hooks=hooks):
        relevance = own_relevance(model)
    assert torch.allclose(relevance, expected, rtol=1e-5, atol=1e-7)
    assert "normalized" in kept


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale:UserWarning")
@pytest.mark.parametrize("edit", ["scaled", "frozen"])
@pytest.mark.parametrize("point", ["hook_normalized", "hook_scale"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_edit_inside_a_norm_is_right_or_refused(family: str, point: str, edit: str) -> None:
    """``frozen``: values of another run patched in, which is what such edits are for."""
    model = tiny(family)
    name = f"blocks.1.ln1.{point}"
    constant = model.run_with_cache(TOKENS.flip(0))[1][name].detach()
    new = {"scaled": lambda x, hook: 2.0 * x, "frozen": lambda x, hook: constant.clone()}
    with model.hooks(fwd_hooks=[(name, new[edit])]):
        edited = model(TOKENS)
        try:
            logits, kept = lenslrp.run_with_relevance(model, TOKENS, 5)
        except lenslrp.CoverageError as error:
            named = "blocks.1.ln1" in str(error) or "blocks.1.input_layernorm" in str(error)
            assert named, error  # noqa: PT017 - refused is as good as right
        else:
            assert torch.equal(logits, edited)
            assert abs(kept.ledger().error) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_loss_of_ones_own_needs_no_leaf_of_ones_own(name: str) -> None:
    """``my_metric(model(tokens)).backward()`` in the block: the embeddings are leaves."""
    model = tiny(name)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    read: dict[str, torch.Tensor] = {}

    def keep(gradient: torch.Tensor, hook: object) -> None:
        read["g"] = gradient.detach().clone()

    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()) as rules:
        _, activations = model.run_with_cache(tokens, names_filter="hook_embed")
        with model.hooks(bwd_hooks=[("hook_embed", keep)]):
            logits = model(tokens)
            rules.verify(logits)
            logits[0, -1, 7].backward()
    _, relevance = lenslrp.run_with_relevance(model, tokens, 7)
    own = (activations["hook_embed"] * read["g"]).sum(dim=-1)
    torch.testing.assert_close(own, relevance.tokens)
    assert all(parameter.grad is None for parameter in model.parameters())

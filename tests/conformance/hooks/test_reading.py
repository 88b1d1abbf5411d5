"""A name means one thing, and a reader gives what was asked for.

``hook_resid_pre/mid/post`` read the total relevance of the residual stream, every other name the
branch that its hook point feeds. Both are compared with gradients taken explicitly under
``relevance_rules``, without a reader.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from tests.conformance.families import FAMILIES, LAYERS, VOCABULARY, make, tokens

WITH_MIDDLE = [
    name
    for name, family in FAMILIES.items()
    if not family.parallel and name != "native_attention_only"
]


@pytest.fixture(scope="module")
def llama() -> Any:
    return make("llama")


@pytest.fixture(scope="module")
def everything(llama: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(llama, tokens(), 5)[1]


# ------------------------------------------------------------------ total and branch


def _explicit(model: Any, layer: int) -> dict[str, Tensor]:
    """Relevance at the middle of a block by autograd.grad alone: total, branch, direct path."""
    kept: dict[str, Tensor] = {}
    ln2 = model.blocks[layer].ln2

    def make_leaf(_: Any, args: Any, out: Tensor) -> Tensor:
        return out.detach().requires_grad_()

    def whole(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept["total"] = args[0] if args else kwargs["hidden_states"]

    def fork(_: Any, args: Any, out: Tensor) -> Tensor:
        kept["branch"] = out.clone()
        return kept["branch"]

    def after(_: Any, args: Any, out: Tensor) -> Tensor:
        kept["post"] = out.clone()
        return kept["post"]

    with lenslrp.relevance_rules(model, lenslrp.AttnLRP(), strict=False):
        handles = [
            model.hook_dict["embed.hook_out"].register_forward_hook(make_leaf),
            ln2.register_forward_pre_hook(whole, with_kwargs=True),
            ln2.hook_in.register_forward_hook(fork),
            model.blocks[layer].hook_out.register_forward_hook(after),
        ]
        logit = model(tokens())[:, -1, 5].sum()
        for handle in handles:
            handle.remove()
        names = ("total", "branch", "post")
        grads = torch.autograd.grad(logit, [kept[name] for name in names])
    found = {name: (kept[name] * g).detach() for name, g in zip(names, grads, strict=True)}
    found["direct"] = (kept["total"] * grads[2]).detach()
    return found


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "user-backward-hook"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox_sequential", "native", "qwen3"])
def test_middle_is_total_and_ln2_is_branch(name: str, hooked: bool) -> None:
    """Also where the user's own backward hook wraps the branch in a tensor of its own."""
    model = make(name)
    expected = _explicit(model, 0)
    seen: list[Tensor] = []
    point = model.hook_dict["blocks.0.ln2.hook_in"]
    if hooked:
        point.add_hook(lambda g, hook: seen.append(g.clone()), dir="bwd")
    try:
        _, cache = lenslrp.run_with_relevance(model, tokens(), 5)
    finally:
        model.reset_hooks()
    assert len(seen) == int(hooked)
    total, branch = cache["blocks.0.hook_resid_mid"], cache["blocks.0.ln2.hook_in"]
    torch.testing.assert_close(total, expected["total"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(branch, expected["branch"], rtol=1e-12, atol=1e-12)
    # What reaches the end of the block past the MLP is the difference.
    torch.testing.assert_close(total - branch, expected["direct"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(cache["blocks.0.hook_resid_post"], expected["post"])
    assert (total - branch).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(FAMILIES))
def test_neighbouring_residuals_agree(name: str) -> None:
    """One block's end is the next one's beginning; the first is the embeddings."""
    _, cache = lenslrp.run_with_relevance(make(name), tokens(), 5)
    torch.testing.assert_close(cache["blocks.0.hook_resid_post"], cache["blocks.1.hook_resid_pre"])
    first = cache["blocks.0.hook_resid_pre"].sum()
    leaves = cache.ledger().leaves
    outside = cache.ledger().table.loc["outside"]
    assert first == pytest.approx(leaves, rel=1e-9), outside
    assert (f"blocks.{LAYERS - 1}.hook_resid_mid" in cache) == (name in WITH_MIDDLE)


def test_aliases_share_one_reading(everything: lenslrp.RelevanceCache) -> None:
    for alias, canonical in (
        ("attn.hook_q", "attn.q.hook_out"),
        ("attn.hook_z", "attn.o.hook_in"),
        ("mlp.hook_post", "mlp.out.hook_in"),
        ("mlp.hook_pre", "mlp.gate.hook_out"),
    ):
        a, b = everything[f"blocks.1.{alias}"], everything[f"blocks.1.{canonical}"]
        assert torch.equal(a.flatten(), b.flatten()), alias
    assert everything["blocks.1.attn.hook_z"].shape == (2, 7, 2, 8)
    assert everything["blocks.1.attn.hook_pattern"].shape == (2, 2, 7, 7)


# ------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        ("blocks.1.mlp.hook_post", ["blocks.1.mlp.hook_post"]),
        ("mlp.hook_post", ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]),
        ("hook_resid_mid", ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]),
        (
            ["blocks.0.attn.hook_z", "ln_final.hook_in"],
            ["blocks.0.attn.hook_z", "ln_final.hook_in"],
        ),
        (
            lambda name: name.endswith("hook_pattern"),
            ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"],
        ),
        ([], []),
    ],
    ids=["name", "suffix", "residual-suffix", "list", "predicate", "empty"],
)
def test_names_filter(
    llama: Any, everything: lenslrp.RelevanceCache, names_filter: Any, expected: list[str]
) -> None:
    _, cache = lenslrp.run_with_relevance(llama, tokens(), 5, names_filter=names_filter)
    assert sorted(cache.keys()) == sorted(expected)
    for name in expected:
        assert torch.equal(cache[name], everything[name])
    assert torch.equal(cache.tokens, everything.tokens)


def test_unknown_name_is_told_with_the_nearest(llama: Any) -> None:
    with pytest.raises(
        lenslrp.InputError,
        match=r"no hook point 'blocks\.0\.mlp\.hook_pots'.*blocks\.0\.mlp\.hook_post",
    ):
        lenslrp.run_with_relevance(llama, tokens(), 5, names_filter="blocks.0.mlp.hook_pots")
    with pytest.raises(lenslrp.InputError, match="hook_z"):
        lenslrp.run_with_relevance(llama, tokens(), 5, names_filter=["blocks.0.attn.hook_zz"])


def test_a_name_that_was_not_read_is_told(llama: Any) -> None:
    _, cache = lenslrp.run_with_relevance(llama, tokens(), 5, names_filter="attn.hook_z")
    with pytest.raises(lenslrp.InputError, match="no relevance was read at"):
        cache["blocks.0.mlp.hook_post"]
    with pytest.raises(lenslrp.InputError, match="was not read in any block"):
        cache.top()
    with pytest.raises(lenslrp.InputError, match="block; nearest of what was read: attn.hook_z;"):
        cache.top("attn.hook_zz")


def test_off_path_is_listed_and_refused_by_name(
    llama: Any, everything: lenslrp.RelevanceCache
) -> None:
    off = everything.coverage.off_path
    assert "blocks.0.ln1.hook_scale" in off
    assert not set(off) & set(everything.keys())
    assert set(off) | set(everything.keys()) == set(llama.hook_dict)
    with pytest.raises(lenslrp.InputError, match="not on the path"):
        everything["blocks.0.ln1.hook_scale"]
    with pytest.raises(lenslrp.InputError, match=r"blocks\.0\.ln1\.hook_scale.*not on the path"):
        lenslrp.run_with_relevance(llama, tokens(), 5, names_filter="blocks.0.ln1.hook_scale")


# ------------------------------------------------------------------ what is kept of it


def test_reductions(llama: Any, everything: lenslrp.RelevanceCache) -> None:
    name = "blocks.0.mlp.hook_post"
    full = everything[name]

    def run(reduce: Any) -> Tensor:
        return lenslrp.run_with_relevance(llama, tokens(), 5, names_filter=name, reduce=reduce)[1][
            name
        ]

    torch.testing.assert_close(run("sum"), full.sum(dim=-1))
    torch.testing.assert_close(run("sum_positions"), full.sum(dim=1))
    torch.testing.assert_close(run(lambda r: r.abs().amax(dim=-1)), full.abs().amax(dim=-1))
    torch.testing.assert_close(run({"mlp.hook_post": "sum"}), full.sum(dim=-1))
    torch.testing.assert_close(run({"attn.hook_z": "sum"}), full)
    torch.testing.assert_close(run({"attn.hook_z": "none", "*": "sum"}), full.sum(dim=-1))
    kept = run(lenslrp.TopK(3)).to_dense()
    assert ((kept != 0).sum(dim=-1) == 3).all()
    best = full.abs().topk(3, dim=-1).indices
    torch.testing.assert_close(kept.gather(-1, best), full.gather(-1, best))
    with pytest.raises(lenslrp.InputError, match="reduce must be one of"):
        run("mean")


def test_reduced_patterns_and_scores_have_no_nan() -> None:
    """Masked scores are -inf in native models: -inf times a gradient of 0 is relevance 0."""
    model = make("native")
    for reduce in (None, "sum", "sum_positions", lenslrp.TopK(2)):
        _, cache = lenslrp.run_with_relevance(
            model, tokens(), 5, names_filter=["attn.hook_attn_scores", "attn.hook_pattern"],
            reduce=reduce,
        )  # fmt: skip
        for name in cache.keys():  # noqa: SIM118
            value = cache[name]
            assert torch.isfinite(value.to_dense() if value.is_sparse else value).all(), name


def test_top_has_activations(llama: Any, everything: lenslrp.RelevanceCache) -> None:
    _, activations = llama.run_with_cache(tokens())
    top = everything.top("mlp.hook_post", k=5, row=1)
    assert list(top.columns) == ["layer", "position", "token", "neuron", "relevance", "activation"]
    assert (top["relevance"].abs().diff().dropna() <= 0).all()
    for record in top.itertuples():
        name = f"blocks.{record.layer}.mlp.hook_post"
        where = (1, record.position, record.neuron)
        assert record.activation == pytest.approx(float(activations[name][where]))
        assert record.relevance == pytest.approx(float(everything[name][where]))


def test_cp_reads_zero_at_patterns_and_below(llama: Any) -> None:
    _, cache = lenslrp.run_with_relevance(llama, tokens(), 5, lenslrp.CPLRP())
    for layer in range(LAYERS):
        for hook in ("hook_pattern", "hook_attn_scores", "hook_q", "hook_k"):
            name = f"blocks.{layer}.attn.{hook}"
            if name in cache:
                assert (cache[name] == 0).all(), name
        assert f"blocks.{layer}.attn.hook_pattern" in cache
        assert (cache[f"blocks.{layer}.attn.hook_v"] != 0).any()
    explicit = lenslrp.run_with_relevance(
        llama, tokens(), 5, lenslrp.CPLRP(), names_filter="attn.hook_pattern"
    )[1]
    assert (explicit["blocks.0.attn.hook_pattern"] == 0).all()


def test_tables(everything: lenslrp.RelevanceCache) -> None:
    heads = everything.heads(row=1)
    assert heads.shape == (LAYERS, 2)
    z = everything["blocks.1.attn.hook_z"][1].sum(dim=(0, 2))
    assert heads.loc[1].tolist() == pytest.approx(z.tolist())
    residual = everything.residual(row=0)
    assert list(residual.index) == [*range(LAYERS), "final"]
    assert residual.shape[1] == tokens().shape[1]
    assert residual.loc[0].tolist() == pytest.approx(everything.tokens[0].tolist())
    assert max(everything.token_ids.flatten().tolist()) < VOCABULARY

"""Several residual streams: DeepSeek V4's hyper-connections and Gemma 3n's AltUp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.edits import Edit, edit_units
from lenslrp.hooks import CONSTANT, UNIFORM, Gamma, Plain, Product, SoftmaxTemperature
from lenslrp.hooks.sites import Accounts
from lenslrp.targets import Activation
from tests.conformance import zoo
from tests.conformance.families import tokens
from tests.conformance.zoo_configs import CHANGES
from tests.oracles import explicit_streams as explicit

pytestmark = pytest.mark.filterwarnings("ignore")

HYPER, ALTUP = "DeepseekV4ForCausalLM", "Gemma3nForConditionalGeneration"


def activations(model: Any, names: list[str]) -> dict[str, Tensor]:
    """What hook points hold in a pass without rules."""
    kept: dict[str, Tensor] = {}
    hooks = [(name, lambda x, hook: kept.update({hook.name: x.detach()})) for name in names]
    with model.hooks(fwd_hooks=hooks):
        zoo.plain_logits(model)
    return kept


def close(found: Tensor, expected: Tensor) -> None:
    near = 1e-9 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=near)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_hyper_connections_is_its_twin(layer: int) -> None:
    """Both kinds of compressed attention, and experts by token and by router."""
    model, inner = zoo.build(HYPER), zoo.plain(HYPER).model
    block = f"blocks.{layer}"
    bias = f"{block}.attn.compressor.hook_block_bias"
    with zoo.Widened(), torch.no_grad():
        kept = activations(model, [f"{block}.hook_in", f"{block}.hook_out", bias])
        out, back = explicit.hyper_layer(
            inner.layers[layer],
            inner.rotary_emb,
            kept[f"{block}.hook_in"],
            zoo.prompt(model),
            kept[bias][:, 0],
        )
    close(kept[f"{block}.hook_out"], out)
    with zoo.Widened():
        _, R = zoo.explain(model, lenslrp.CPLRP())
    with torch.no_grad():
        close(R[f"{block}.hook_in"], back(R[f"{block}.hook_out"]))


def test_the_last_collapse_is_its_twin() -> None:
    model, inner = zoo.build(HYPER), zoo.plain(HYPER).model
    with zoo.Widened(), torch.no_grad():
        kept = activations(model, ["blocks.1.hook_out", "hc_head.hook_out"])
        out, back = explicit.hyper_head(inner.hc_head, kept["blocks.1.hook_out"])
    close(kept["hc_head.hook_out"], out)
    with zoo.Widened():
        _, R = zoo.explain(model, lenslrp.AttnLRP())
    with torch.no_grad():
        close(R["blocks.1.hook_out"], back(R["hc_head.hook_out"]))


@pytest.mark.parametrize("layer", [0, 1])
def test_what_compresses_keys_is_its_twin(layer: int) -> None:
    """A pattern over positions for each feature, as one of attention is under AttnLRP."""
    model, inner = zoo.build(HYPER), zoo.plain(HYPER).model
    at = f"blocks.{layer}.attn.compressor"
    with zoo.Widened(), torch.no_grad():
        kept = activations(model, [f"{at}.hook_in", f"{at}.hook_out"])
        out, back = explicit.compressed(
            inner.layers[layer].self_attn.compressor, kept[f"{at}.hook_in"], uniform=True
        )
    close(kept[f"{at}.hook_out"][:, 0], out)
    with zoo.Widened():
        _, R = zoo.explain(model, lenslrp.AttnLRP())
    with torch.no_grad():
        close(R[f"{at}.hook_in"], back(R[f"{at}.hook_out"][:, 0]))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_altup_is_its_twin(layer: int) -> None:
    """With a threshold before its activation, and without."""
    model, inner = zoo.build(ALTUP), zoo.plain(ALTUP).model.language_model
    block = f"blocks.{layer}"
    names = [f"{block}.{end}" for end in ("hook_in", "hook_out", "per_layer_projection.hook_in")]
    ids = zoo.prompt(model)
    with zoo.Widened(), torch.no_grad():
        kept = activations(model, names)
        embedded = inner.project_per_layer_inputs(
            inner.embed_tokens(ids), inner.get_per_layer_inputs(ids)
        )
        streams = kept[names[0]].movedim(0, 2)
        out, back = explicit.altup_layer(
            inner.layers[layer], inner.rotary_emb, streams, embedded[:, :, layer]
        )
    close(kept[names[1]].movedim(0, 2), out)
    with zoo.Widened():
        _, R = zoo.explain(model, lenslrp.CPLRP())
    with torch.no_grad():
        on_streams, on_embedded = back(R[names[1]])
    close(R[names[0]], on_streams)
    close(R[names[2]], 2 * on_embedded)


def test_how_streams_begin_and_end_is_its_twin() -> None:
    model, inner = zoo.build(ALTUP), zoo.plain(ALTUP).model.language_model
    names = ["blocks.1.hook_out", "ln_final.hook_in", "embed.hook_out", "blocks.0.hook_in"]
    with zoo.Widened(), torch.no_grad():
        kept = activations(model, names)
        last, to_streams = explicit.joined(inner, kept[names[0]].movedim(0, 2))
        first, to_embedding = explicit.opened(inner, kept[names[2]])
    close(kept[names[1]], last)
    close(kept[names[3]].movedim(0, 2), first)
    with zoo.Widened():
        _, R = zoo.explain(model, lenslrp.CPLRP())
    with torch.no_grad():
        close(R[names[0]], to_streams(R[names[1]]))
        given = to_embedding(R[names[3]])
    # The embedding gives every layer's own input its share as well.
    assert not torch.allclose(R["embed.hook_out"], given, rtol=1e-3)


@pytest.mark.parametrize("name", [HYPER, "DeepseekV4Model"])
def test_hyper_connections_conserve_at_every_stack(name: str) -> None:
    """Under CP-LRP and without biases, the streams of a layer hold the target together."""
    model = zoo.build(name, bias=False)
    _, R = zoo.explain(model, lenslrp.CPLRP())
    stacks = [f"blocks.{layer}.hook_{end}" for layer in (0, 1) for end in ("in", "out")]
    for name in stacks:
        assert R[name].shape == (2, 7, 3, 16)
        assert float(R[name].sum()) == pytest.approx(R.ledger().target, rel=1e-6)


def test_altup_conserves_at_every_stack() -> None:
    """Each layer's own embedding takes half of a gated product; the rest stays in the streams."""
    model = zoo.build(ALTUP, bias=False)
    _, R = zoo.explain(model, lenslrp.CPLRP())
    ledger = R.ledger()
    held = ledger.target - ledger.nonlinear_target
    for layer in (1, 0):
        block = f"blocks.{layer}"
        assert R[f"{block}.hook_out"].shape == (2, 7, 4, 16)
        assert float(R[f"{block}.hook_out"].sum()) == pytest.approx(held, rel=1e-9)
        held -= float(R[f"{block}.per_layer_projection.hook_in"].sum()) / 2
        assert float(R[f"{block}.hook_in"].sum()) == pytest.approx(held, rel=1e-9)
    torch.testing.assert_close(R["blocks.0.hook_resid_post"], R["blocks.0.hook_out"][:, :, 0])
    torch.testing.assert_close(R["blocks.1.hook_resid_pre"], R["blocks.1.hook_in"][:, :, 0])


QUARTER = Product(0.25, 0.75, "quarter")
CHOICES: dict[str, Any] = {
    "mixing weights uniform": {"recurrence": UNIFORM},
    "mixing weights by a quarter": {"recurrence": QUARTER},
    "mixing weights plain": {"recurrence": Plain()},
    "gate by a quarter": {"gate": QUARTER},
    "gate constant": {"gate": CONSTANT},
    "norm plain": {"norm": Plain()},
    "activation plain": {"activation": Plain()},
    "all in part": {"recurrence": Product(0.2, 0.3, "part"), "gate": Product(0.3, 0.3, "part")},
    "router constant": {"router": CONSTANT, "attention_av": CONSTANT},
    "softmax at a temperature": {"softmax": SoftmaxTemperature(2.0)},
}


@pytest.mark.parametrize("choice", list(CHOICES))
@pytest.mark.parametrize("name", [HYPER, ALTUP])
def test_other_rules_close(name: str, choice: str) -> None:
    model = zoo.build(name)
    logits = zoo.plain_logits(model)
    with zoo.Widened():
        _, cache = zoo.explain(model, CHOICES[choice], [])
    assert abs(cache.ledger().error) <= 1e-12, str(cache.ledger())
    ruled, plain = zoo.explain(model, CHOICES[choice], [])
    assert torch.equal(ruled, logits)
    _, default = zoo.explain(model, lenslrp.AttnLRP(), [])
    assert not torch.allclose(plain.tokens, default.tokens, rtol=1e-3)


def test_a_weighted_rule() -> None:
    """What weighs streams keeps epsilon; a layer of groups has no such rule."""
    gamma = {"linear": Gamma(0.05), "recurrence": UNIFORM}
    _, cache = zoo.explain(zoo.build(ALTUP), gamma, [])
    assert abs(cache.ledger().error) <= 1e-6
    with pytest.raises(lenslrp.InputError, match="o_a_proj is a DeepseekV4GroupedLinear, which"):
        zoo.explain(zoo.build(HYPER), gamma, [])


def test_gates_are_not_weighed_twice() -> None:
    """Gemma 3n cuts its gate off and activates it: two functions, one share."""
    model = zoo.build(ALTUP)
    _, whole = zoo.explain(model, lenslrp.CPLRP())
    _, quarter = zoo.explain(model, {**lenslrp.CPLRP().rules, "gate": QUARTER})
    for layer in (0, 1):
        hook = f"blocks.{layer}.mlp."
        for R, first in ((whole, 0.5), (quarter, 0.25)):
            total = R[f"{hook}hook_post"].sum()
            torch.testing.assert_close(R[f"{hook}gate.hook_out"].sum(), first * total)
            torch.testing.assert_close(R[f"{hook}in.hook_out"].sum(), (1 - first) * total)


def test_clipped_experts() -> None:
    """A clip leaves 0 as it is: the identity rule."""
    model = zoo.wrap(HYPER, zoo.plain(HYPER, changes={"swiglu_limit": 0.5}, bias=False))
    logits, R = zoo.explain(model, lenslrp.CPLRP(), [])
    assert torch.equal(logits, zoo.plain_logits(model))
    assert R.ledger().leaves == pytest.approx(R.ledger().target, rel=1e-6)
    other, _ = zoo.explain(zoo.build(HYPER, bias=False), lenslrp.CPLRP(), [])
    assert not torch.allclose(other, logits, rtol=1e-3)


def test_layers_that_share_keys_and_values() -> None:
    changes = {
        "text_config": {
            **CHANGES[ALTUP]["text_config"],
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
            "intermediate_size": [24] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
    }
    model = zoo.wrap(ALTUP, zoo.plain(ALTUP, changes=changes, bias=False))
    assert model.original_model.model.language_model.layers[2].self_attn.is_kv_shared_layer
    logits, R = zoo.explain(model, lenslrp.CPLRP())
    assert torch.equal(logits, zoo.plain_logits(model))
    ledger = R.ledger()
    assert ledger.leaves == pytest.approx(ledger.target - ledger.nonlinear_target, rel=1e-9)
    assert float(R["blocks.3.hook_out"].sum()) == pytest.approx(ledger.leaves, rel=1e-9)


@pytest.mark.parametrize("name", [HYPER, ALTUP])
def test_rows_of_as_many_prompts_as_streams(name: str) -> None:
    model = zoo.build(name)
    ids = tokens(model.original_model.config.get_text_config().to_dict().get("hc_mult", 4), 6)
    _, R = lenslrp.run_with_relevance(model, ids, 5)
    for row in range(len(ids)):
        _, alone = lenslrp.run_with_relevance(model, ids[row : row + 1], 5)
        for hook in ("blocks.0.hook_in", "blocks.1.hook_out", "blocks.1.ln2.hook_in"):
            near = 1e-6 * float(alone[hook].abs().max())
            torch.testing.assert_close(R[row][hook], alone[hook], rtol=1e-6, atol=near)


@pytest.mark.parametrize("name", [HYPER, ALTUP])
def test_accounts_of_rows(name: str) -> None:
    """Of as many prompts as streams, each has the account that it has alone."""
    model = zoo.build(name)
    ids = tokens(3 if name == HYPER else 4, 6)
    composite = {"recurrence": Plain(), "norm": Plain()}

    def absorbed(rows: Tensor) -> Tensor:
        accounts = Accounts(rows=len(rows))
        with lenslrp.relevance_rules(model, composite, accounts=accounts, copies=True):
            model(rows)[:, -1, 5].sum().backward()
        return torch.stack([sum_of.double() for sum_of in accounts.terms.values()]).sum(0)

    together = absorbed(ids)
    alone = torch.cat([absorbed(ids[row : row + 1]) for row in range(len(ids))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_padding() -> None:
    """On the right a row is what it is alone; on the left, windows of positions would be others."""
    ids = tokens(2, 7)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:] = False
    for name in (HYPER, ALTUP):
        model = zoo.build(name)
        _, R = lenslrp.run_with_relevance(model, ids, 5, attention_mask=mask)
        _, alone = lenslrp.run_with_relevance(model, ids[1:, :5], 5)
        near = 1e-6 * float(alone.tokens.abs().max())
        torch.testing.assert_close(R[1].tokens, alone.tokens, rtol=1e-6, atol=near)
    model = zoo.build(ALTUP, torch.float32)
    _, R = lenslrp.run_with_relevance(model, ids.flip(1), 5, attention_mask=mask.flip(1))
    _, alone = lenslrp.run_with_relevance(model, ids.flip(1)[1:, 2:], 5)
    torch.testing.assert_close(R[1].tokens, alone.tokens, rtol=1e-3, atol=1e-4)
    with pytest.raises(lenslrp.InputError, match="goes by columns, so a row that is padded on the"):
        lenslrp.run_with_relevance(zoo.build(HYPER), ids, 5, attention_mask=mask.flip(1))


@pytest.mark.parametrize("name", [HYPER, ALTUP])
def test_a_unit_of_one_stream(name: str) -> None:
    model = zoo.build(name)
    unit = Activation("blocks.0.hook_out", (2, 5))
    _, R = lenslrp.run_with_relevance(model, zoo.prompt(model), unit)
    x = activations(model, ["blocks.0.hook_out"])["blocks.0.hook_out"]
    x = x if name == HYPER else x.movedim(0, 2)
    torch.testing.assert_close(R.target.value, x[:, -1, 2, 5])
    assert abs(R.ledger().error) <= 1e-6


def test_edits_of_a_stack_are_refused() -> None:
    model = zoo.build(ALTUP)
    edits = edit_units(model, [Edit("blocks.0.hook_out", (1,))])
    with pytest.raises(lenslrp.InputError, match="several residual streams: edit the"), edits:
        pass

"""TransformerLens' modes: each is handled or refused by a message that names it.

Handled means: the logits of the same bridge in the same mode, to the last bit; everything covered;
the ledger closed to 1e-9; CP-LRP without biases conserving; the mode's own hook points readable.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import lenslrp
from lenslrp.hooks import Gamma
from lenslrp.targets import LogitDiff
from tests.conformance import modes, zoo
from tests.conformance.families import COMPOSITES, LAYERS, tokens
from tests.unit.tiny import changes, snapshot

DOCUMENTED = modes.read()
HANDLED = [key for key, cell in DOCUMENTED.items() if not cell.startswith("refused")]
REFUSED = [key for key, cell in DOCUMENTED.items() if cell.startswith("refused")]
OPT = 1e-6  # computes its softmax in float32 whatever the model's type

pytestmark = pytest.mark.filterwarnings("ignore:.*compatibility.*:UserWarning")


def explain(model: Any, family: str, *args: Any, **options: Any) -> Any:
    return lenslrp.run_with_relevance(
        model, tokens(), 5, *args, **modes.arguments(family), **options
    )


def plain(model: Any, family: str) -> torch.Tensor:
    if family == "t5":
        given = modes.arguments(family)["decoder_input"]
        with torch.no_grad():
            logits: torch.Tensor = model(tokens(), decoder_input=given)
        return logits
    with torch.no_grad():
        found: torch.Tensor = model(tokens())
    return found


def test_the_table_has_every_mode_and_family() -> None:
    assert list(DOCUMENTED) == [(mode, f) for mode in modes.MODES for f in modes.SHOWN]


@pytest.mark.parametrize(("mode", "family"), HANDLED)
def test_handled(mode: str, family: str) -> None:
    model = modes.switched(family, mode)
    logits = plain(model, family)
    before = snapshot(model)
    for composite in COMPOSITES.values():
        ruled, cache = explain(model, family, composite())
        assert torch.equal(ruled, logits)
        assert cache.coverage.ok
        assert abs(cache.ledger().error) < (OPT if family == "opt" else 1e-9), str(cache.ledger())
        read = {name for name in cache if bool(torch.isfinite(cache[name]).all())}
        assert read | set(cache.coverage.off_path) == set(model.hook_dict)
    assert changes(before, model) == []


@pytest.mark.parametrize(("mode", "family"), HANDLED)
def test_cp_conserves_without_biases(mode: str, family: str) -> None:
    model = modes.switched(family, mode, bias=False)
    _, cache = explain(model, family, lenslrp.CPLRP(), names_filter=[])
    ledger = cache.ledger()
    start = ledger.target - ledger.nonlinear_target
    # Folding a LayerNorm, or centring an unembedding, makes biases where there were none.
    assert abs(ledger.leaves + ledger.biases - start) < 1e-7 * max(1.0, abs(start)), str(ledger)
    if "compatibility" not in mode:
        assert abs(ledger.biases) < 1e-12


@pytest.mark.parametrize(("mode", "family"), REFUSED)
def test_refused_by_transformerlens(mode: str, family: str) -> None:
    with pytest.raises(NotImplementedError, match=mode.removeprefix("set_").split("(")[0]):
        modes.switched(family, mode)


@pytest.mark.parametrize(("mode", "family"), list(DOCUMENTED))
def test_the_effect_on_relevance_is_the_documented_one(mode: str, family: str) -> None:
    found, cell = modes.effect(family, mode), DOCUMENTED[mode, family]
    if found is None or cell == "the same":
        assert modes.shown(found) == cell
        return
    logit, cosine = map(float, re.findall(r"[\d.]+", cell))
    assert found.logit == pytest.approx(logit, abs=0.011)
    assert found.cosine == pytest.approx(cosine, abs=0.0011)


@pytest.mark.parametrize("family", modes.SHOWN)
def test_a_difference_of_logits_is_the_same_in_every_mode(family: str) -> None:
    """What processing adds to all logits alike drops out of a difference."""
    reference = modes.relevance(modes.BUILDS[family](), family, LogitDiff(5, 7))
    for mode in modes.MODES:
        if (mode, family) in HANDLED:
            found = modes.relevance(modes.switched(family, mode), family, LogitDiff(5, 7))
            assert (found - reference).norm() < 1e-6 * reference.norm(), mode


@pytest.mark.parametrize("mode", list(modes.HOOKS))
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mpt"])
def test_the_modes_own_hooks(mode: str, family: str) -> None:
    """Readable by name in the mode, refused by name outside it; heads sum up to what they feed."""
    model = modes.switched(family, mode)
    live = [
        f"blocks.{layer}.{place}{hook}"
        for layer in range(LAYERS)
        for hook in modes.HOOKS[mode]
        for place in ("attn.", "")
        if f"blocks.{layer}.{place}{hook}" in model.hook_dict
    ]
    if (family, mode) in {
        ("bloom", "set_use_hook_mlp_in(True)"),
        ("mpt", "set_use_split_qkv_input(True)"),
        ("mpt", "set_use_attn_in(True)"),
    }:  # TransformerLens takes the setting and never calls these
        with pytest.raises(lenslrp.InputError, match="not on the path"):
            explain(model, family, names_filter=live)
        return
    _, cache = explain(model, family, names_filter=[*live, "attn.hook_out"])
    for hook in live:
        assert cache[hook].abs().sum() > 0, hook
    with pytest.raises(lenslrp.InputError, match=live[0].replace(".", r"\.")):
        explain(modes.BUILDS[family](), family, names_filter=live)


def test_what_the_heads_read_adds_up() -> None:
    """q, k and v inputs of a Llama: all of what attention takes from the residual stream."""
    model = modes.switched("llama", "set_use_split_qkv_input(True)", bias=False)
    names = ["hook_q_input", "hook_k_input", "hook_v_input"]
    _, split = explain(model, "llama", names_filter=names)
    _, whole = explain(modes.BUILDS["llama"](bias=False), "llama", names_filter="ln1.hook_in")
    for layer in range(LAYERS):
        parts = sum(split[f"blocks.{layer}.{name}"].sum(dim=(-2, -1)) for name in names)
        taken = whole[f"blocks.{layer}.ln1.hook_in"].sum(dim=-1)
        torch.testing.assert_close(parts, taken, rtol=1e-7, atol=1e-9)


def test_results_of_heads_add_up_to_the_heads_own_relevance() -> None:
    """Summed over features, ``hook_result`` is ``hook_z``: what a head writes is what it was."""
    model = modes.switched("llama", "set_use_attn_result(True)")
    _, cache = explain(
        model, "llama", lenslrp.CPLRP(), names_filter=["attn.hook_result", "attn.hook_z"]
    )
    for layer in range(LAYERS):
        result = cache[f"blocks.{layer}.attn.hook_result"].sum(dim=-1)
        head = cache[f"blocks.{layer}.attn.hook_z"].sum(dim=-1)
        torch.testing.assert_close(result, head, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in", "use_attn_result"])
def test_head_by_head_refuses_rules_for_whole_projections(flag: str) -> None:
    model = modes.switched("llama", f"set_{flag}(True)")
    table: Any = {"projection": Gamma(0.1)}
    message = rf"blocks\.0\.attn: {flag} projects head by head, .*model\.set_{flag}\(False\)"
    for options in ({"composite": table}, {"attention": "fused"}):
        with pytest.raises(lenslrp.InputError, match=message):
            explain(model, "llama", names_filter=[], **options)
    _, cache = explain(model, "llama", {"linear": Gamma(0.1)}, names_filter=[])
    assert abs(cache.ledger().error) < 1e-8


@pytest.mark.parametrize("mode", list(modes.MODES)[4:])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_gamma_with_processed_weights(mode: str, family: str) -> None:
    """The rule reads the weights that are in force."""
    table: Any = {"linear": Gamma(0.25), "projection": Gamma(0.1)}
    model = modes.switched(family, mode)
    logits, cache = explain(model, family, table, names_filter=[])
    assert torch.equal(logits, plain(model, family))
    assert abs(cache.ledger().error) < 1e-8


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "phi3", "neox"])
def test_fused_attention_with_processed_weights(family: str) -> None:
    """Hugging Face's joint projection keeps the old weights: used there, they would be wrong."""
    model = modes.switched(family, "enable_compatibility_mode()")
    _, plain_cache = explain(model, family, names_filter=[])
    if family in ("gpt2", "phi3", "neox"):
        message = r"blocks\.0\.attn were processed \(enable_compatibility_mode\)"
        with pytest.raises(lenslrp.InputError, match=message):
            explain(model, family, names_filter=[], attention="fused")
        return
    _, fused = explain(model, family, names_filter=[], attention="fused")
    torch.testing.assert_close(fused.tokens, plain_cache.tokens, rtol=1e-5, atol=1e-6)


def test_another_activation_in_compatibility_mode_is_refused() -> None:
    """TransformerLens picks the function by its name; a module of another kind is not that one."""
    model = modes.BUILDS["llama"]()
    for block in model.blocks:
        block.mlp.original_component.act_fn = nn.GELU()
    assert explain(model, "llama", names_filter=[])[1].coverage.ok
    model.enable_compatibility_mode()
    with pytest.raises(lenslrp.InputError, match=r"blocks\.0\.mlp: in compatibility .* GELU"):
        explain(model, "llama", names_filter=[])


def test_a_bias_of_heads_is_no_positional_term() -> None:
    """Bloom adds ALiBi to its scores, and, head by head, biases to its projections."""
    reference = explain(modes.BUILDS["bloom"](), "bloom", names_filter=[])[1].ledger()
    model = modes.switched("bloom", "set_use_split_qkv_input(True)")
    ledger = explain(model, "bloom", names_filter=[])[1].ledger()
    assert abs(reference.positional) > 1e-6
    for term in ("positional", "biases", "softmax", "leaves"):
        assert getattr(ledger, term) == pytest.approx(getattr(reference, term), rel=1e-9), term


def test_the_zoo_has_the_families() -> None:
    assert {"BloomForCausalLM", "OPTForCausalLM"} <= set(zoo.registered())

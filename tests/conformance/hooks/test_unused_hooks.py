"""A hook point that fires and whose tensor nobody uses is neither read nor edited.

What is unused is told here by another means than the engine's: NaN in its place changes no logit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.analysis import Direction, steer
from lenslrp.analysis.steering.operations import Add
from lenslrp.edits import Edit, edit_units
from lenslrp.targets import Activation
from lenslrp.unused import unused
from tests.conformance import modes, zoo
from tests.conformance.families import FAMILIES, make, tokens
from tests.unit.tiny import changes, snapshot

SPLIT, JOINT = "set_use_split_qkv_input(True)", "set_use_attn_in(True)"
INSTEAD = {SPLIT: ("use_split_qkv_input", "hook_q_input"), JOINT: ("use_attn_in", "hook_attn_in")}
MORE = (
    "T5ForConditionalGeneration",
    "OPTForCausalLM",
    "MixtralForCausalLM",
    "ViTModel",
    "BertForMaskedLM",
    "GraniteForCausalLM",
)


def logits(model: Any) -> Tensor:
    if hasattr(model.original_model, "config"):
        return zoo.plain_logits(model)
    with torch.no_grad():  # native
        found: Tensor = model(tokens())
    return found


def without_effect(model: Any) -> set[str]:
    """Names of the hook points of floats that fire and whose tensor may as well be NaN."""
    plain, found = logits(model), set[str]()
    groups: dict[int, list[str]] = {}
    for name, point in model.hook_dict.items():
        groups.setdefault(id(point), []).append(name)
    for names in groups.values():
        fired: list[bool] = []

        def spoil(_: Any, args: Any, out: Any, fired: list[bool] = fired) -> Tensor | None:
            if not isinstance(out, Tensor) or not out.is_floating_point():
                return None
            fired.append(True)
            return out * torch.nan

        handle = model.hook_dict[names[0]].register_forward_hook(spoil)
        try:
            spoiled = logits(model)
        finally:
            handle.remove()
        if fired and torch.equal(spoiled, plain):
            found |= set(names)
    return found


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE])
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param) if request.param in FAMILIES else zoo.build(request.param)


@pytest.mark.filterwarnings("ignore:.*(edit|hook).*:UserWarning")
def test_one_short_pass_finds_what_has_no_effect(model: Any) -> None:
    """But for what norms show beside a wrapped norm, and positions that are a mask."""
    aside = ("hook_scale", "hook_normalized", "pos_embed.hook_in")
    expected = {name for name in without_effect(model) if not name.endswith(aside)}
    before = snapshot(model)
    assert set(unused(model, live=False)) == expected
    assert changes(before, model) == []


@pytest.mark.parametrize("mode", [SPLIT, JOINT])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi", "gemma2"])
def test_what_a_mode_routes_around(family: str, mode: str) -> None:
    model = modes.switched(family, mode)
    setting, instead = INSTEAD[mode]
    lost = [f"blocks.{layer}.attn.hook_in" for layer in range(2)]
    if family != "phi":  # its MLP reads the same norm
        lost += [f"blocks.{layer}.ln1.hook_out" for layer in range(2)]
    for composite in (lenslrp.AttnLRP(), lenslrp.CPLRP(), lenslrp.GradientTimesInput()):
        _, found = lenslrp.run_with_relevance(model, tokens(), 5, composite)
        assert set(lost) <= set(found.coverage.off_path)
        assert not set(lost) & set(found.keys())
        assert found[f"blocks.1.{instead}"].shape[:2] == tokens().shape
    message = rf"while {setting} is on.*blocks\.\d\.{instead}.*model\.set_{setting}\(False\)"
    for name in lost:
        with pytest.raises(lenslrp.InputError, match=message):
            lenslrp.run_with_relevance(model, tokens(), 5, names_filter=name)
        vector = torch.ones(model.cfg.d_model, dtype=torch.float64)
        with (
            pytest.raises(lenslrp.InputError, match=message),
            steer(model, [Add(Direction(name, vector), 1.0)]),
        ):
            model(tokens())
    getattr(model, f"set_{setting}")(False)  # what was found out goes by the setting
    _, found = lenslrp.run_with_relevance(model, tokens(), 5, names_filter=lost)
    assert all(found[name].norm() > 0 for name in lost)


def test_what_is_zero_by_right_stays() -> None:
    """Under CP queries get nothing; above a latent unit there is nothing."""
    model = make("llama")
    _, constant = lenslrp.run_with_relevance(model, tokens(), 5, lenslrp.CPLRP())
    for hook in ("hook_q", "hook_attn_scores", "hook_pattern", "q.hook_in"):
        assert not constant[f"blocks.1.attn.{hook}"].any()
    unit = Activation("blocks.0.mlp.hook_post", 3)
    _, latent = lenslrp.run_with_relevance(model, tokens(), unit)
    assert not latent["blocks.1.mlp.hook_post"].any()
    assert latent["blocks.0.mlp.hook_pre"].any()
    assert "rotary_emb.hook_in" in latent.coverage.off_path
    t5 = zoo.build("T5ForConditionalGeneration")
    _, delegated = zoo.explain(t5, lenslrp.CPLRP())
    assert not delegated["decoder_blocks.1.cross_attn.hook_attn_scores"].any()


def test_users_hooks_do_not_see_the_pass_that_looks() -> None:
    model = make("gpt2")
    model(tokens())  # TransformerLens sets some attributes at the first pass
    calls: list[str] = []
    model.add_hook("blocks.0.mlp.hook_post", lambda x, hook: calls.append("forward"))
    model.add_hook("blocks.0.hook_in", lambda g, hook: calls.append("backward"), dir="bwd")
    before = snapshot(model)
    unused(model, live=False)
    unused(model, live=True)
    assert calls == []
    assert changes(before, model) == []
    model(tokens())
    assert calls == ["forward"]


@pytest.mark.filterwarnings("ignore:.*hook.*:UserWarning")
def test_delegated_attention_is_edited_under_rules_only() -> None:
    model = zoo.build("OPTForCausalLM")
    hook = "blocks.1.attn.hook_pattern"

    def halved(pattern: Tensor) -> Tensor:
        return pattern / 2

    with (
        pytest.raises(lenslrp.InputError, match=r"Hugging Face computes .*attn\.o\.hook_in"),
        edit_units(model, [Edit(hook, function=halved)]),
    ):
        model(tokens())
    plain, _ = lenslrp.run_with_relevance(model, tokens(), 5, names_filter=[])
    with edit_units(model, [Edit(hook, function=halved)]):
        edited, _ = lenslrp.run_with_relevance(model, tokens(), 5, names_filter=[])
    assert (edited - plain).abs().max() > 1e-3


def _notes(model: Any) -> int:
    conversions = {
        id(point.hook_conversion): point.hook_conversion for point in model.hook_dict.values()
    }
    return sum(len(getattr(c, "_conversion_state", ())) for c in conversions.values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_is_left_in_conversions(name: str) -> None:
    model = make(name)
    counts = []
    for _ in range(3):
        lenslrp.run_with_relevance(model, tokens(), 5)
        lenslrp.run_with_relevance(model, tokens(), Activation("blocks.0.attn.hook_out", 3))
        doubled = Edit("blocks.0.attn.hook_out", function=lambda x: 2 * x)
        with edit_units(model, [doubled]), torch.no_grad():
            model(tokens())
        counts.append(_notes(model))
    assert counts == [0, 0, 0]

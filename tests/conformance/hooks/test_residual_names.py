"""``hook_resid_mid`` is the residual stream between attention and MLP, in every family, or refused.

The total is compared with a plain backward pass through Hugging Face's own model, and with the two
paths that it splits into: the branch to the MLP, and what goes past it to the end of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.analysis.steering.operations import Add, steer
from lenslrp.analysis.units.kinds import Direction
from lenslrp.edits import Edit, edit_units
from lenslrp.hooks import Plain
from lenslrp.targets import Activation
from tests.conformance import zoo
from tests.conformance.families import COMPOSITES, FAMILIES, make, randomise, tokens
from tests.conformance.hooks.test_reading import WITH_MIDDLE

POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM")
"""Here ``hook_resid_mid`` is the input of the MLP itself."""

NORMS_LAST = {
    "BertForMaskedLM": "blocks",
    "RobertaForMaskedLM": "blocks",
    "HubertForCTC": "blocks",
    "BartForConditionalGeneration": "encoder_blocks",
}
"""Here it is the input of the norm behind the MLP."""

RULES: Mapping[str, Any] = {**COMPOSITES, "norm: Plain": lambda: {"norm": Plain()}}
BLOCKS = {"gpt2": "transformer.h", "neox_sequential": "gpt_neox.layers"}
SECOND_NORM = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"} | {
    "gemma3": "pre_feedforward_layernorm"
}


def build(name: str) -> Any:
    return make(name) if name in FAMILIES else zoo.build(name)


@pytest.mark.parametrize("rules", ["GradientTimesInput", "norm: Plain"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "neox_sequential"])
def test_the_total_is_that_of_plain_hugging_face_code(name: str, rules: str) -> None:
    """``x * x.grad`` at the input of the second norm. With only norms plain, everything else is
    no gradient of calculus: there the sum over both paths stands for it."""
    _, found = lenslrp.run_with_relevance(make(name), tokens(), 5, RULES[rules]())
    torch.manual_seed(0)
    model = FAMILIES[name].build(True)
    randomise(model, bias=True)
    model = model.double().eval()
    model.set_attn_implementation("eager")
    layer = model.get_submodule(BLOCKS.get(name, "model.layers"))[1]
    kept: list[Tensor] = []
    norm = getattr(layer, SECOND_NORM.get(name, "post_attention_layernorm"))

    def keep(_: Any, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    norm.register_forward_pre_hook(keep)
    logits = model(tokens()).logits[:, -1, 5]
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:  # relevance starts before it
        logits = cap * torch.atanh(logits / cap)
    logits.sum().backward()
    (x,) = kept
    assert x.grad is not None
    total = found["blocks.1.hook_resid_mid"]
    branch = found["blocks.1.ln2.hook_in"]
    if rules == "GradientTimesInput":
        torch.testing.assert_close(total, (x * x.grad).detach(), rtol=1e-5, atol=1e-6)
    assert (total - branch).norm() > 1e-3 * total.norm()


@pytest.mark.parametrize("rules", list(RULES))
@pytest.mark.parametrize("name", [*WITH_MIDDLE, *POST_NORM])
def test_the_total_is_the_branch_and_what_goes_past_it(name: str, rules: str) -> None:
    model = build(name)
    branch = "mlp.hook_in" if name in POST_NORM else "ln2.hook_in"
    names = [f"blocks.1.{hook}" for hook in ("hook_resid_mid", branch, "hook_resid_post")]
    kept: dict[str, Tensor] = {}
    for hook in names[1:]:
        model.hook_dict[hook].register_forward_hook(
            lambda _, args, out, hook=hook: kept.update({hook: out.detach()})
        )
    _, found = lenslrp.run_with_relevance(model, tokens(), 5, RULES[rules](), names)
    mid, part, post = (found[hook] for hook in names)
    past = kept[names[1]].view_as(mid) * (post / kept[names[2]])
    torch.testing.assert_close(mid - part.view_as(mid), past, rtol=1e-7, atol=1e-9)
    assert past.norm() > 1e-3 * mid.norm()


@pytest.mark.parametrize("rules", list(RULES))
@pytest.mark.parametrize("name", ["llama", "gpt2", "Olmo2ForCausalLM"])
def test_a_unit_of_the_stream_is_explained_where_it_is_read(name: str, rules: str) -> None:
    """Also where a plain norm begins at its hook point, and at that hook point itself."""
    model = build(name)
    branch = "mlp.hook_in" if name in POST_NORM else "ln2.hook_in"
    for hook in ("blocks.1.hook_resid_mid", f"blocks.1.{branch}", "blocks.1.hook_resid_pre"):
        _, found = lenslrp.run_with_relevance(
            model, tokens(), Activation(hook, 3), RULES[rules](), [hook, "hook_resid_pre"]
        )
        assert abs(found.ledger().error) < 1e-9
        torch.testing.assert_close(found[hook][:, -1, 3], found.target.value)
        torch.testing.assert_close(found[hook].sum(), found.target.value.sum())
        assert found["blocks.0.hook_resid_pre"].norm() > 0


@pytest.mark.parametrize(("name", "stack"), list(NORMS_LAST.items()))
def test_what_stands_behind_the_mlp_is_not_the_middle(name: str, stack: str) -> None:
    model = zoo.build(name)
    _, found = zoo.explain(model, lenslrp.AttnLRP())
    middle = f"{stack}.0.hook_resid_mid"
    assert middle in found.coverage.off_path
    assert found[f"{stack}.0.ln1.hook_out"].norm() > 0
    with pytest.raises(lenslrp.InputError, match=rf"behind the MLP .*{stack}\.0\.ln1\.hook_out"):
        zoo.explain(model, lenslrp.AttnLRP(), middle)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", *POST_NORM, "BertForMaskedLM", "OpenAIGPTLMHeadModel"]
)
def test_an_edit_in_the_middle_is_refused(name: str) -> None:
    model = build(name)
    hook = "blocks.1.hook_resid_mid"
    v = torch.ones(model.cfg.d_model, dtype=torch.float64)
    with (
        pytest.raises(lenslrp.InputError, match=r"hook_resid_mid is the input of (mlp|ln2)"),
        steer(model, [Add(Direction(hook, v), 1.0)]),
    ):
        model(tokens())
    with (
        pytest.raises(lenslrp.InputError, match="does not stay in the residual stream"),
        edit_units(model, [Edit(hook, (3,))]),
    ):
        model(tokens())


@pytest.mark.parametrize("name", [*WITH_MIDDLE, *POST_NORM, "T5GemmaForConditionalGeneration"])
@pytest.mark.parametrize("last", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"])
def test_an_edit_of_the_stream_moves_it_or_is_refused(name: str, last: str) -> None:
    """What is added arrives, whole, at the end of the block beside what it changed on its way."""
    model = build(name)
    stack = "decoder_blocks" if lenslrp.inputs.is_encoder_decoder(model) else "blocks"
    hook = f"{stack}.1.{last}"
    shift = Edit(hook, (3,), scale=1.0, shift=2.0)
    seen: list[Tensor] = []
    given = zoo.decoder(model, "decoder_input_ids") if stack == "decoder_blocks" else {}
    watched = model.hook_dict[f"{stack}.1.hook_resid_post"]
    for edits in ((), (shift,)):
        refused = bool(edits) and last == "hook_resid_mid" and stack == "blocks"
        message = "is the input of"
        expected = pytest.raises(lenslrp.InputError, match=message) if refused else nullcontext()
        with expected, torch.no_grad(), edit_units(model, edits):
            handle = watched.register_forward_hook(lambda _, args, out: seen.append(out))
            model(tokens(), **given)
            handle.remove()
    if refused:
        return
    assert (seen[1] - seen[0])[..., 3].abs().min() > 1e-3


def test_granite_adds_what_is_read() -> None:
    """The multiplier stands behind the module: what is read is what the stream gets."""
    model = zoo.build("GraniteForCausalLM")
    names = ["hook_attn_out", "hook_mlp_out", "hook_resid_pre", "hook_resid_mid"]
    before = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    _, found = lenslrp.run_with_relevance(model, tokens(), 5, lenslrp.CPLRP(), names)
    _, seen = model.run_with_cache(tokens())
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == before
    for layer in range(2):
        kept = {name: seen[f"blocks.{layer}.{name}"] for name in names}
        torch.testing.assert_close(
            kept["hook_resid_mid"], kept["hook_resid_pre"] + kept["hook_attn_out"]
        )
        g = found[f"blocks.{layer}.hook_resid_mid"] / kept["hook_resid_mid"]
        torch.testing.assert_close(
            found[f"blocks.{layer}.hook_attn_out"], kept["hook_attn_out"] * g, rtol=1e-6, atol=1e-8
        )
        assert found[f"blocks.{layer}.hook_mlp_out"].norm() > 0
    unit = Activation("blocks.1.hook_mlp_out", 3)
    _, latent = lenslrp.run_with_relevance(model, tokens(), unit)
    torch.testing.assert_close(latent.target.value, seen["blocks.1.hook_mlp_out"][:, -1, 3])
    assert abs(latent.ledger().error) < 1e-9

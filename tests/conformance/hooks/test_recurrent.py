"""Recurrent and hybrid families: rules at every scan, gate and short convolution, or a refusal.

The rules themselves are held in test_recurrence_explicit.py, ledger, forward pass, conservation and
undoing of every family in tests/conformance/models/test_zoo.py.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations import use_kernel_func_from_hub_with_fallback
from transformers.models.mamba import modeling_mamba

import lenslrp
from lenslrp.hooks import (
    CONSTANT,
    UNIFORM,
    Plain,
    Product,
    gated_norms,
    recurrence,
    scan_points,
    scans,
)
from lenslrp.hooks.assignment import assign
from lenslrp.hooks.structure import components
from lenslrp.targets import Activation
from tests.conformance import zoo
from tests.conformance.families import tokens
from tests.conformance.hooks.test_mutation import Key, mutate, sites

pytestmark = pytest.mark.filterwarnings("ignore")

MIXERS = {
    "BambaForCausalLM": "BambaMixer",
    "FalconH1ForCausalLM": "FalconH1Mixer",
    "FalconMambaForCausalLM": "FalconMambaMixer",
    "GraniteMoeHybridForCausalLM": "GraniteMoeHybridMambaLayer",
    "JambaForCausalLM": "JambaMambaMixer",
    "Mamba2ForCausalLM": "Mamba2Mixer",
    "MambaForCausalLM": "MambaMixer",
    "NemotronHForCausalLM": "NemotronHMamba2Mixer",
    "OlmoHybridForCausalLM": "OlmoHybridGatedDeltaNet",
    "Qwen3NextForCausalLM": "GatedDeltaNetBridge",
    "Qwen3_5ForCausalLM": "GatedDeltaNetBridge",
    "Qwen3_5ForConditionalGeneration": "GatedDeltaNetBridge",
    "Qwen3_5MoeForCausalLM": "GatedDeltaNetBridge",
    "Qwen3_5MoeForConditionalGeneration": "GatedDeltaNetBridge",
    "RecurrentGemmaForCausalLM": "RecurrentGemmaRglru",
    "RwkvForCausalLM": "RwkvSelfAttention",
    "Zamba2ForCausalLM": "Zamba2MambaMixer",
}
HYBRIDS = {  # a hook of the attention in their second layer
    "BambaForCausalLM": "blocks.1.attn.hook_z",
    "FalconH1ForCausalLM": "blocks.1.attn.hook_z",
    "JambaForCausalLM": "blocks.1.attn.hook_z",
    "OlmoHybridForCausalLM": "blocks.1.attn.hook_z",
    "Qwen3NextForCausalLM": "blocks.1.attn.hook_z",
    "Qwen3_5ForCausalLM": "blocks.1.attn.hook_z",
}
ONE_OF_EACH = (  # of each kind of scan, and of what stands around it
    "MambaForCausalLM",
    "Mamba2ForCausalLM",
    "FalconH1ForCausalLM",
    "Qwen3NextForCausalLM",
    "OlmoHybridForCausalLM",
    "RecurrentGemmaForCausalLM",
    "RwkvForCausalLM",
)
STREAMS = ("DeepseekV4ForCausalLM", "Gemma3nForConditionalGeneration")
ROLES = {"recurrence", "recurrence_gate", "attention_gate", "norm", "activation"}


def explain(model: Any, target: Any = 5, names_filter: Any = (), **keywords: Any) -> Any:
    return lenslrp.run_with_relevance(
        model, tokens(), target, names_filter=list(names_filter), **keywords
    )[1]


@pytest.mark.parametrize("name", list(MIXERS))
def test_every_scan_has_its_rule(name: str) -> None:
    model = zoo.build(name)
    table = assign(model, lenslrp.AttnLRP()).table()
    scans = table[table.component == MIXERS[name]]
    assert len(scans)
    assert set(scans.role) == {"recurrence"}
    assert set(scans.rule) == {"constant"}
    assert "short_convolution" in set(table.role) or name == "RwkvForCausalLM"
    fired = explain(model).coverage.sites
    assert fired[fired.role == "recurrence"].fired.all()


def test_every_recurrent_family_of_the_zoo_is_here() -> None:
    found = []
    for name in zoo.registered():
        config = zoo.config(name)
        text = getattr(config, "text_config", None) or config
        kinds = str(getattr(text, "layer_types", "")) + str(getattr(text, "block_types", ""))
        if any(word in kinds for word in ("mamba", "linear_attention", "recurrent", "hybrid")):
            found.append(name)
    assert set(found) <= set(MIXERS)


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_the_attention_of_a_hybrid_is_readable_and_a_target(name: str) -> None:
    model = zoo.build(name)
    cache = explain(model, names_filter=[HYBRIDS[name]])
    assert float(cache[HYBRIDS[name]].abs().sum()) > 0
    cache = explain(model, target=Activation(HYBRIDS[name], (0, 1)))
    assert abs(cache.ledger().error) < 1e-5


CHOICES: dict[str, Any] = {
    "uniform": lenslrp.AttnLRP(recurrence="uniform"),
    "recurrence plain": {"recurrence": Plain()},
    "unequal shares": {"recurrence": Product(0.3, 0.5, "mine")},
    "gate constant": {"recurrence_gate": CONSTANT},
    "gate unequal": {"recurrence_gate": Product(0.1, 0.9, "mine")},
    "gate plain, norm plain": {"recurrence_gate": Plain(), "norm": Plain()},
    "sigmoid gate uniform": {"attention_gate": UNIFORM},
    "ViT": lenslrp.AttnLRPViT(),
    "RelP": lenslrp.RelP(),
    "GIM": lenslrp.GIM(),
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("choice", list(CHOICES))
def test_the_account_closes_under_other_rules(name: str, choice: str) -> None:
    model = zoo.build(name)
    logits = zoo.plain_logits(model)
    with zoo.Widened():
        _, cache = zoo.explain(model, CHOICES[choice], [])
    assert cache.ledger().imbalance < 1e-11, str(cache.ledger())
    assert torch.equal(zoo.explain(model, CHOICES[choice], [])[0], logits)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_the_operator_leaks_is_a_term_of_its_own(name: str) -> None:
    model = zoo.build(name)
    assert explain(model).ledger().recurrence == 0
    uniform = explain(model, composite=lenslrp.AttnLRP(recurrence="uniform"))
    assert abs(uniform.ledger().recurrence) > 1e-3
    with pytest.raises(lenslrp.InputError, match="uniform, constant"):
        lenslrp.AttnLRP(recurrence="half")  # type: ignore[arg-type]
    with pytest.raises(lenslrp.InputError, match="the values a share"):
        explain(model, composite={"recurrence": Product(1.0, 0.0, "none")})


def test_a_short_convolution_has_no_rule_but_epsilon() -> None:
    with pytest.raises(
        lenslrp.InputError, match="'short_convolution' takes a rule of kind Epsilon"
    ):
        lenslrp.hooks.Composite("mine", {"short_convolution": lenslrp.hooks.Gamma(0.1)})


def scan_hooks(model: Any) -> dict[str, str]:
    """The names of the points of the first scan, by their ends."""
    path, _ = scans.mixers(components(model))[0]
    return {end: f"{path}.hook_scan_{end}" for end in ("in", "out", "map")}


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("choice", ["constant", "uniform"])
def test_the_map_of_a_scan_adds_up(name: str, choice: Any) -> None:
    model = zoo.build(name)
    logits = zoo.plain_logits(model)
    hooks = scan_hooks(model)
    composite = lenslrp.AttnLRP(recurrence=choice)
    ruled, cache = zoo.explain(model, composite, list(hooks.values()))
    assert torch.equal(ruled, logits)
    relevance = {end: cache[hook] for end, hook in hooks.items()}
    by_head = {end: scan_points.by_head(relevance[end], 1) for end in ("in", "out")}
    the_map = relevance["map"]
    assert the_map.shape == (*by_head["out"].shape, tokens().shape[1])
    assert not the_map.triu(1).any()
    near = {"rtol": 1e-5, "atol": 1e-6}
    if choice == "constant":
        torch.testing.assert_close(the_map.sum(-1), by_head["out"], **near)
    if choice == "constant" or name != "RecurrentGemmaForCausalLM":  # whose operator reads it too
        torch.testing.assert_close(the_map.sum(-2), by_head["in"], **near)
    _, others = zoo.explain(model, composite)
    assert hooks["out"] in others
    assert hooks["map"] not in others  # a scan for each position: on request
    torch.testing.assert_close(others.tokens, cache.tokens)


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "OlmoHybridForCausalLM"])
def test_a_prompt_of_several_chunks(name: str) -> None:
    """Delta nets scan 64 positions at once."""
    model = zoo.build(name)
    prompt = tokens(1, 130, seed=5)
    with torch.no_grad():
        expected = model(prompt, use_cache=False)
    logits, cache = lenslrp.run_with_relevance(model, prompt, 5, lenslrp.CPLRP(), names_filter=[])
    assert torch.equal(logits, expected)
    assert abs(cache.ledger().error) < 1e-6


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_prompt_of_one_token(name: str) -> None:
    model = zoo.build(name)
    _, cache = lenslrp.run_with_relevance(model, tokens(1, 1), 5, names_filter=[])
    assert cache.ledger().imbalance < 1e-6


def call_on(model: Any, ids: Tensor, **cache: Any) -> Tensor:
    """Logits of the last of ``ids``, called as generation does; ``cache`` as the model takes it."""
    place = torch.full((len(ids), 1), ids.shape[1] - 1)
    places = (
        {"position_ids": place} if "RecurrentGemma" in type(model.original_model).__name__ else {}
    )
    out = model.original_model(ids[:, -1:], use_cache=True, **places, **cache)
    return out.logits[:, -1]


@pytest.mark.parametrize("name", list(MIXERS))
@pytest.mark.parametrize("left", [1, 2])
def test_going_on_from_a_cache_is_refused_by_name(name: str, left: int) -> None:
    """transformers scans a single token with other functions, from a state that has no graph."""
    model, ids = zoo.build(name), tokens()
    with torch.no_grad():
        out = model.original_model(ids[:, :-left], use_cache=True)
    given = {k: out[k] for k in ("cache_params", "past_key_values", "state") if k in out}
    path = scans.mixers(components(model))[0][0]
    said = rf"{path}: \w+ is given a cache, and what it holds of earlier tokens is out of reach of "
    if given:
        with pytest.raises(lenslrp.InputError, match=said):
            lenslrp.run_with_relevance(model, ids[:, -left:], 5, model_kwargs=given)
        return
    rules = lenslrp.relevance_rules(model, lenslrp.AttnLRP())
    with rules, pytest.raises(lenslrp.InputError, match=said):  # RecurrentGemma keeps its state
        call_on(model, ids)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_generating_under_rules_goes_on_from_a_cache(name: str) -> None:
    model, ids = zoo.build(name), tokens()
    logits = []
    for rules in (nullcontext(), lenslrp.relevance_rules(model, lenslrp.AttnLRP())):
        with torch.no_grad(), rules:
            out = model.original_model(ids[:, :-1], use_cache=True)
            given = {k: out[k] for k in ("cache_params", "past_key_values", "state") if k in out}
            logits.append(call_on(model, ids, **given))
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", [*MIXERS, "DeepseekV4ForCausalLM"])
def test_recomputing_each_block_changes_nothing(name: str) -> None:
    model = zoo.build(name)
    composite = lenslrp.AttnLRP(recurrence="uniform")
    kept, again = (
        lenslrp.run_with_relevance(model, tokens(), 5, composite, checkpoint=checkpoint)
        for checkpoint in (False, True)
    )
    assert torch.equal(kept[0], again[0])
    assert list(kept[1].keys()) == list(again[1].keys())
    assert all(torch.equal(kept[1][hook], again[1][hook]) for hook in kept[1])
    assert again[1].ledger().table.equals(kept[1].ledger().table)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_recomputing_each_block_holds_less(name: str) -> None:
    name = name.replace("Qwen3Next", "Qwen3_5")  # torch's grouped product asks for larger experts

    def held(checkpoint: bool) -> int:
        return lenslrp.survey(
            zoo.config(name), length=16, dtype=torch.bfloat16, checkpoint=checkpoint,
            names_filter=[], logits="target",
        ).held  # fmt: skip

    assert held(True) < 0.4 * held(False)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *STREAMS])
@pytest.mark.parametrize("choice", ["constant", "uniform"])
def test_a_session_runs_each_pass_once(name: str, choice: Any) -> None:
    """Writes into views, which scans are full of, are told by the rules: nobody has to observe."""
    model = zoo.build(name)
    with lenslrp.session(model, lenslrp.AttnLRP(recurrence=choice)) as s:
        s.run_with_relevance(tokens(), 5)
        passes: list[int] = []
        handle = model.original_model.register_forward_hook(lambda *_: passes.append(0))
        s.run_with_relevance(tokens(seed=1), 5)
        handle.remove()
    assert len(passes) == 1
    last: list[Tensor] = []  # below a soft-cap on the logits
    model.ln_final.hook_out.register_forward_hook(lambda _, args, y: last.append(y))
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP(recurrence=choice)) as rules:
        model(tokens(), use_cache=False)
        rules.verify(*last)


def recurrent_sites(model: Any, composite: Any) -> list[Key]:
    """Where rules of recurrent mixers sit, of what stands around them, and of mixed streams."""
    parts = components(model)
    recurrent = {path for path, _ in scans.mixers(parts)}
    recurrent |= {p for p, m in parts if gated_norms.is_gated_norm(m)}
    recurrent |= {p for p, m in parts if type(m).__name__ == "RwkvFeedForward"}
    recurrent |= {p for p, m in parts if "RecurrentBlock" in type(m).__name__}
    return [
        (hook, role)
        for hook, role in sites(model, composite)
        if (hook in recurrent and role in ROLES) or role == "recurrence"
    ]


CHOSEN = ("constant", "uniform")


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *STREAMS])
@pytest.mark.parametrize("choice", CHOSEN)
def test_forgetting_any_one_rule_is_noticed(name: str, choice: Any) -> None:
    model = zoo.build(name)
    composite = lenslrp.AttnLRP(recurrence=choice)
    keys = recurrent_sites(model, composite)
    assert keys
    for key in keys:
        assert "no rule for" in mutate(model, composite, key), key


def unruled(patch: pytest.MonkeyPatch) -> None:
    """The scan is called as it is."""
    patch.setattr(
        recurrence.RecurrenceIntercept,
        "scan",
        lambda self, function, given, form: function(*given.args, **given.kwargs),
    )


def ungated(patch: pytest.MonkeyPatch) -> None:
    """The product with the gate is no product."""
    patch.setattr(
        recurrence.RecurrenceIntercept, "product", lambda self, a, b, multiply=torch.mul: a * b
    )


def unactivated(patch: pytest.MonkeyPatch) -> None:
    """An activation around the scan is called as it is."""
    patch.setattr(
        recurrence.RecurrenceIntercept, "activation", lambda self, act, x, **options: act(x)
    )


def open_region(patch: pytest.MonkeyPatch) -> None:
    """What goes into a scan is not measured."""
    patch.setattr(recurrence, "enter", lambda x, share, site: x)


def closed_region(patch: pytest.MonkeyPatch) -> None:
    """What comes out of a scan is not measured."""
    patch.setattr(recurrence, "leave", lambda y, site: y)


def live_scale(patch: pytest.MonkeyPatch) -> None:
    """A gated norm's denominator stays on the graph."""
    patch.setattr(
        gated_norms.GatedNormIntercept,
        "intercept",
        lambda self, func, name, args, kwargs: func(*args, **kwargs),
    )


def unmetered(patch: pytest.MonkeyPatch) -> None:
    """What the bias of the short convolution takes is not measured."""
    patch.setattr(recurrence, "measure_bias", lambda *args: None)


DAMAGES: tuple[tuple[Callable[[pytest.MonkeyPatch], None], str, str], ...] = (
    (unruled, "MambaForCausalLM", "constant"),
    (unruled, "Mamba2ForCausalLM", "constant"),
    (unruled, "Qwen3NextForCausalLM", "constant"),
    (unruled, "RwkvForCausalLM", "constant"),
    (unruled, "MambaForCausalLM", "uniform"),
    (ungated, "FalconH1ForCausalLM", "constant"),
    (unactivated, "MambaForCausalLM", "constant"),
    (open_region, "MambaForCausalLM", "uniform"),
    (open_region, "RecurrentGemmaForCausalLM", "uniform"),
    (closed_region, "Mamba2ForCausalLM", "uniform"),
    (closed_region, "Mamba2ForCausalLM", "constant"),
    (unmetered, "MambaForCausalLM", "constant"),
    (live_scale, "Mamba2ForCausalLM", "constant"),
    (live_scale, "Qwen3NextForCausalLM", "constant"),
)


def noticed(damage: Callable[[pytest.MonkeyPatch], None], name: str, choice: Any) -> str:
    """What a run says where a part of a rule is forgotten; fails if it says nothing."""
    model = zoo.build(name)
    with pytest.MonkeyPatch.context() as patch:
        damage(patch)
        with pytest.raises(lenslrp.CoverageError) as caught:
            explain(model, composite=lenslrp.AttnLRP(recurrence=choice))
    return str(caught.value).split(". ")[0].partition(": ")[2]


@pytest.mark.parametrize(("damage", "name", "choice"), DAMAGES)
def test_a_part_of_a_rule_that_is_forgotten_is_noticed(
    damage: Callable[[pytest.MonkeyPatch], None], name: str, choice: Any
) -> None:
    assert noticed(damage, name, choice)


@pytest.fixture
def kernel() -> Iterator[Callable[..., Tensor]]:
    """A scan of another package, as transformers finds it when that package is installed."""
    package = ModuleType("fast_scans")

    def fast_scan(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    fast_scan.__module__ = "fast_scans.kernels"
    package.fast_scan = fast_scan  # type: ignore[attr-defined]
    sys.modules["fast_scans"] = package
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    yield use_kernel_func_from_hub_with_fallback("fast_scan", "fast_scans")(
        mamba_selective_scan.__wrapped__
    )
    del sys.modules["fast_scans"]


def test_a_kernel_of_another_package_is_refused_by_name(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mamba import modeling_mamba

    model = zoo.build("MambaForCausalLM")
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", kernel)
    with pytest.raises(
        lenslrp.CoverageError, match=r"blocks\.0\.mixer: mamba_selective_scan of Mam"
    ):
        explain(model)


def test_mambapy_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("MambaForCausalLM")
    monkeypatch.setattr(scans, "is_mambapy_available", lambda: True)
    explain(model)  # not used
    model.original_model.backbone.layers[0].mixer.use_mambapy = True
    with pytest.raises(lenslrp.CoverageError, match="computed by mambapy"):
        explain(model)


@pytest.mark.parametrize("name", ["MambaForCausalLM", "Qwen3NextForCausalLM"])
def test_a_scan_of_transformer_lens_is_refused_by_name(name: str) -> None:
    model = zoo.build(name)
    mixer = next(m for _, m in components(model) if hasattr(m, "eager_scan"))
    mixer.eager_scan = True
    with pytest.raises(lenslrp.CoverageError, match="set eager_scan=False"):
        explain(model)
    mixer.eager_scan = False
    with lenslrp.session(model) as s:
        mixer.eager_scan = True  # after the rules were attached
        with pytest.raises(lenslrp.CoverageError):
            s.run_with_relevance(tokens(), 5)


def test_a_mixer_behind_accelerates_hooks() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = zoo.build("MambaForCausalLM")
    expected = explain(model).tokens
    for _, mixer in scans.mixers(components(model)):
        hooks.add_hook_to_module(mixer, hooks.AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(explain(model).tokens, expected)


def test_functions_of_a_modelling_file_stay_what_they_are() -> None:
    from transformers.models.mamba import modeling_mamba

    scan, forward = modeling_mamba.mamba_selective_scan, modeling_mamba.MambaMixer.forward
    model = zoo.build("MambaForCausalLM")
    with lenslrp.relevance_rules(model, lenslrp.AttnLRP()):
        assert modeling_mamba.mamba_selective_scan is scan
        assert modeling_mamba.MambaMixer.forward is forward
        other = zoo.build("MambaForCausalLM")
        assert torch.equal(other(tokens(), use_cache=False), model(tokens(), use_cache=False))


def test_a_function_with_other_functions_behind_its_names() -> None:
    def one() -> int:
        return 1

    ruled = scans.with_functions(_calls_helper, {"_helper": one})
    assert (_calls_helper(), ruled(), ruled(offset=10)) == (2, 2, 11)


def _helper() -> int:
    return 1


def _calls_helper(offset: int = 1) -> int:
    return _helper() + offset


@pytest.mark.parametrize("name", ["RecurrentGemmaForCausalLM", "RwkvForCausalLM"])
def test_what_has_no_padding_mask_is_padded_on_the_right(name: str) -> None:
    model = zoo.build(name)
    alone = explain(model).tokens
    ids = torch.nn.functional.pad(tokens(), (0, 2))
    mask = torch.nn.functional.pad(torch.ones_like(tokens()), (0, 2))
    _, cache = lenslrp.run_with_relevance(model, ids, 5, names_filter=[], attention_mask=mask)
    torch.testing.assert_close(cache.tokens[:, :-2], alone, rtol=1e-6, atol=1e-6)
    ids, mask = ids.roll(2, 1), mask.roll(2, 1)
    with pytest.raises(lenslrp.InputError, match="put the padding on the right"):
        lenslrp.run_with_relevance(model, ids, 5, names_filter=[], attention_mask=mask)


def test_the_map_of_a_padded_row_is_that_of_the_row_alone() -> None:
    """Also where there are as many heads as positions."""
    model, name = zoo.build("Mamba2ForCausalLM"), "blocks.0.mixer.hook_scan_map"
    text, mask = torch.randint(5, 18, (2, 4)), torch.ones(2, 4, dtype=torch.long)
    mask[1, 3:] = 0
    _, R = lenslrp.run_with_relevance(model, text, 5, names_filter=[name], attention_mask=mask)
    _, alone = lenslrp.run_with_relevance(model, text[1:, :3], 5, names_filter=[name])
    assert R[name].shape == (2, 4, 4, 4)
    torch.testing.assert_close(R.rows[1][name], alone[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(lenslrp.InputError, match="no relevance starts there"):
        explain(model, target=Activation(name, (0, 1)))


def main() -> None:
    """The tables of recurrent mixers and streams for docs/reference/mutation.md."""
    print("| model | recurrence | rule forgotten at | role | noticed as |")
    print("|---|---|---|---|---|")
    for name, choice in itertools.product((*ONE_OF_EACH, *STREAMS), CHOSEN):
        model, composite = zoo.build(name), lenslrp.AttnLRP(recurrence=choice)
        for hook, role in recurrent_sites(model, composite):
            said = mutate(model, composite, (hook, role)).partition(": ")[2]
            print(f"| {name} | {choice} | `{hook}` | {role} | {said} |")
    print("\n| what is forgotten | model | recurrence | noticed as |")
    print("|---|---|---|---|")
    for damage, name, choice in DAMAGES:
        what = str(damage.__doc__).rstrip(".")
        print(f"| {what} | {name} | {choice} | {noticed(damage, name, choice)} |")


if __name__ == "__main__":
    main()


class OtherMambaMixer(modeling_mamba.MambaMixer):
    """A mixer that calls no scan: its state is a loop of its own."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        values, gates = self.in_proj(hidden_states).chunk(2, dim=-1)
        state, states = torch.zeros_like(values[:, 0]), []
        for value, gate in zip(values.unbind(1), gates.unbind(1), strict=True):
            state = state * gate.sigmoid() + value
            states.append(state)
        return self.out_proj(torch.stack(states, dim=1))


def test_a_state_in_a_loop_of_its_own_is_refused_by_name() -> None:
    model = zoo.build("MambaForCausalLM")
    model.blocks[1].mixer.original_component.__class__ = OtherMambaMixer
    refused = (
        r"^MambaForCausalLM: no rule for the recurrent mixer blocks\.1\.mixer "
        r"\(OtherMambaMixer\)\. Its state runs from token to token\."
    )
    with pytest.raises(lenslrp.CoverageError, match=refused):
        zoo.explain(model, lenslrp.AttnLRP())


def test_a_gap_beside_a_mixer_is_not_the_mixers() -> None:
    model = zoo.build("MambaForCausalLM")
    gated = [("blocks.0.hook_out", lambda x, hook: x * x.sigmoid())]
    with (
        model.hooks(fwd_hooks=gated),
        pytest.raises(
            lenslrp.CoverageError, match="^MambaForCausalLM: no rule for Mul "
        ) as refused,
    ):
        zoo.explain(model, lenslrp.AttnLRP())
    assert "recurrent" not in str(refused.value)


ROWS_BY_LAYER = ("Mamba", "Mamba2", "NemotronH", "FalconH1", "Jamba", "Rwkv", "RecurrentGemma")


@pytest.mark.parametrize("name", ROWS_BY_LAYER)
def test_the_account_has_a_row_a_layer(name: str) -> None:
    model = zoo.build(f"{name}ForCausalLM")
    _, R = zoo.explain(model, lenslrp.AttnLRP())
    table = R.ledger().table
    assert list(table.index) == [*map(str, range(model.cfg.n_layers)), "outside"]
    largest = table[["resid_in", "resid_out"]].abs().to_numpy().max()
    assert table["error"].abs().max() < 1e-6 * largest  # mixers of some compute in float32


def test_a_block_with_a_second_entrance_has_no_row_of_its_own() -> None:
    """Zamba2's shared blocks read the embeddings again."""
    _, R = zoo.explain(zoo.build("Zamba2ForCausalLM"), lenslrp.AttnLRP())
    table = R.ledger().table
    assert list(table.index) == ["all"]
    assert abs(table.loc["all", "error"]) < 1e-6 * abs(table.loc["all", "resid_out"])

"""Conditional relevance, and sites beyond neurons and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lenslrp
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.passes.conditions import through
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.analysis.units.kinds import Direction, Head, Neuron, Unit
from lenslrp.analysis.units.readers import searched_hooks
from lenslrp.errors import InputError
from tests.conformance.dictionaries import OPTIONS, build, model, texts
from tests.unit.tiny import TOKENS, changes, snapshot, tiny

FAMILIES = ["llama", "gpt2", "gemma2", "phi", "neox", "native"]
CP = lenslrp.CPLRP()


def without_biases(family: str) -> Any:
    """CP conserves exactly where there are none: what goes into a unit comes out of the tokens."""
    bridge = tiny(family)
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            if name.endswith(("bias", ".b")) or ".b_" in name:
                parameter.zero_()
    return bridge


def relevance(bridge: Any, units: list[Unit], composite: Any = None, **options: Any) -> Any:
    with through(bridge, units):
        return lenslrp.run_with_relevance(
            bridge, TOKENS, 5, composite, names_filter=["mlp.hook_post", "attn.hook_z"],
            ledger=False, **options,
        )[1]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", [Neuron(1, 7), Neuron(0, 3), Head(1, 0), Head(0, 1)], ids=str)
def test_what_enters_a_unit_is_what_the_tokens_get(family: str, unit: Any) -> None:
    bridge = without_biases(family)
    free = relevance(bridge, [], CP)
    hook = unit.hook(bridge)
    entered = (
        free[hook][..., unit.index, :] if isinstance(unit, Head) else free[hook][..., unit.index]
    )
    entered = entered.flatten(1).sum(dim=1)
    through_it = relevance(bridge, [unit], CP)
    leaves = through_it.tokens.sum(dim=1)
    if through_it.positions is not None:
        leaves = leaves + through_it.positions.sum(dim=1)
    torch.testing.assert_close(leaves, entered, rtol=1e-6, atol=1e-9)
    assert float(entered.abs().max()) > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_one_hook_are_alternatives(family: str) -> None:
    """OR: relevance through several is the sum of relevance through each."""
    bridge = tiny(family)
    some: list[list[Unit]] = [[Neuron(1, i) for i in (2, 5, 11)], [Head(1, 0), Head(1, 1)]]
    for units in some:
        together = relevance(bridge, units).tokens
        each = torch.stack([relevance(bridge, [unit]).tokens for unit in units]).sum(dim=0)
        # Hugging Face takes softmax and norms in float32 in some of these families.
        torch.testing.assert_close(together, each, rtol=1e-6, atol=1e-8)


def test_hooks_are_requirements() -> None:
    """AND: what passes through both is what the lower one gets of what passed the upper one."""
    bridge = without_biases("llama")
    upper, lower = Neuron(1, 7), Neuron(0, 3)
    after_upper = relevance(bridge, [upper], CP)
    entered = after_upper["blocks.0.mlp.hook_post"][..., 3].sum(dim=1)
    both = relevance(bridge, [upper, lower], CP).tokens.sum(dim=1)
    torch.testing.assert_close(both, entered, rtol=1e-6, atol=1e-12)
    assert float(entered.abs().max()) > 0
    alone = relevance(bridge, [lower], CP).tokens.sum(dim=1)
    assert not torch.allclose(both, alone)


def test_conditions_are_undone_also_after_an_error() -> None:
    bridge = tiny("llama")
    before = snapshot(bridge)
    relevance(bridge, [Neuron(1, 7), Head(0, 1)])
    assert changes(before, bridge) == []
    with pytest.raises(InputError), through(bridge, [Neuron(1, 7), Neuron(9, 7)]):
        pass
    with pytest.raises(ZeroDivisionError), through(bridge, [Neuron(1, 7)]):
        1 / 0  # noqa: B018
    assert changes(before, bridge) == []


def test_what_cannot_be_a_condition_is_refused() -> None:
    bridge = tiny("llama")
    direction = Direction("blocks.1.hook_resid_post", torch.ones(16))
    for unit in (direction, Neuron(0, 1, expert=2)):
        with (
            pytest.raises(InputError, match=r"a condition is a Neuron of a dense MLP or a Head"),
            through(bridge, [unit]),
        ):
            pass


def test_relmax_under_conditions_is_of_the_conditional_relevance(tmp_path: Path) -> None:
    bridge = model()
    units = (Neuron(1, 7), Neuron(1, 9))
    d = build(tmp_path / "d", through=units, criteria=("relmax",), keep_work=True)
    row = d[0, 3].examples("relmax").iloc[0]
    document = d.texts.documents([int(row.doc)])[int(row.doc)]
    goal = lenslrp.targets.Logit(document.aim_token, document.aim_position)
    with through(bridge, units):
        _, R = lenslrp.run_with_relevance(
            bridge, document.tokens[None], goal, names_filter="mlp.hook_post", ledger=False
        )
    found = R["blocks.0.mlp.hook_post"][0, row.position, 3]
    assert row.score == pytest.approx(float(found), rel=1e-5)
    # In the layer of the condition, the units that do not pass have no relevance.
    assert d[1, 7].examples("relmax")["score"].iloc[0] != 0
    assert set(d[1, 8].examples("relmax")["score"]) == {0.0}
    assert d.plan.through == ("blocks.1.mlp.hook_post[7]", "blocks.1.mlp.hook_post[9]")
    d.close()


def coder(**changes_: Any) -> SparseCoder:
    generator = torch.Generator().manual_seed(3)
    given: dict[str, Any] = {
        "hook": "blocks.0.hook_resid_post",
        "W_enc": torch.randn(16, 40, generator=generator),
        "b_enc": torch.randn(40, generator=generator),
        "W_dec": torch.randn(40, 16, generator=generator),
        "b_dec": torch.zeros(16),
    }
    return SparseCoder(**{**given, **changes_})


def test_features_and_directions_are_searched_like_neurons(tmp_path: Path) -> None:
    bridge = model()
    sae, axis = coder(), Direction("blocks.1.hook_resid_pre", torch.arange(16.0))
    d = NeuronDictionary.build(
        bridge, texts(), tmp_path / "d", **{**OPTIONS, "sites": [sae, axis], "progress": False}
    )
    assert len(d) == 41
    for name, criterion in (("blocks.0.hook_resid_post[sae 5]", "relmax"),):
        assert d[name].name == name
        row = d[name].examples(criterion).iloc[0]
        document = d.texts.documents([int(row.doc)])[int(row.doc)]
        goal = lenslrp.targets.Logit(document.aim_token, document.aim_position)
        _, R = lenslrp.run_with_relevance(
            bridge, document.tokens[None], goal, names_filter="blocks.0.hook_resid_post"
        )
        _, cache = bridge.run_with_cache(document.tokens[None])
        x = cache["blocks.0.hook_resid_post"][0, row.position]
        g = R["blocks.0.hook_resid_post"][0, row.position] / x
        expected = float(sae.encode(x)[5] * (g @ sae.W_dec[5].double()))
        assert row.score == pytest.approx(expected, rel=1e-4)
    row = d["blocks.1.hook_resid_pre[directions]", 1, 0].examples("actmax").iloc[0]
    document = d.texts.documents([int(row.doc)])[int(row.doc)]
    _, cache = bridge.run_with_cache(document.tokens[None])
    x = cache["blocks.1.hook_resid_pre"][0, row.position]
    assert row.score == pytest.approx(float(x @ torch.arange(16.0).double()), rel=1e-5)
    d.close()


def test_sites_that_cannot_be_searched_are_refused() -> None:
    transcoder = coder(W_dec=torch.randn(40, 8), b_dec=torch.zeros(8))
    for given, message in (
        ([transcoder], "is a transcoder"),
        (["mlp.hook_post", "mlp.hook_post"], "one or more different ones"),
        (["mlp.hook_expert_post"], "experts' neurons cannot be searched yet"),
    ):
        with pytest.raises(InputError, match=message):
            searched_hooks(given)

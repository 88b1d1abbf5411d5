"""CP-LRP without biases conserves at every residual hook, ``hook_resid_mid`` included.

With the attention pattern constant every remaining rule conserves, and a bias is the only leak
(Ali et al. 2022). Each row of the batch conserves by itself. 1e-9; 1e-7 is allowed where Hugging
Face computes the norm in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lenslrp
from lenslrp.targets import Contrastive
from tests.conformance.families import FAMILIES, LAYERS, make, tokens

CONSERVING = [name for name, family in FAMILIES.items() if not family.constants]
RESIDUALS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, make(request.param, bias=False)


def _start(model: Any, cache: lenslrp.RelevanceCache) -> torch.Tensor:
    """The target without what a final soft-cap adds: relevance starts before it."""
    cap = model.cfg.output_logits_soft_cap
    if not cap or cap <= 0:
        return cache.target.value
    return cap * torch.atanh(cache.target.value / cap)


@pytest.mark.parametrize("case", CONSERVING, indirect=True)
@pytest.mark.parametrize("gate", ["uniform", "up"])
def test_every_residual_holds_the_whole_target(case: tuple[str, Any], gate: Any) -> None:
    name, model = case
    _, cache = lenslrp.run_with_relevance(model, tokens(), 5, lenslrp.CPLRP(gate=gate))
    start = _start(model, cache)
    hooks = [key for key in cache.keys() if key.rsplit(".", 1)[-1] in RESIDUALS]  # noqa: SIM118
    middle = not FAMILIES[name].parallel and name != "native_attention_only"
    assert len(hooks) == LAYERS * (3 if middle else 2), hooks
    tolerance = 1e-7 if FAMILIES[name].float32_norm else 1e-9
    for hook in hooks:
        total = cache[hook].flatten(1).sum(dim=1)
        torch.testing.assert_close(total, start, rtol=tolerance, atol=tolerance, msg=hook)
    leaves = cache.tokens.sum(dim=1)
    leaves = leaves if cache.positions is None else leaves + cache.positions.sum(dim=1)
    torch.testing.assert_close(leaves, start, rtol=tolerance, atol=tolerance)
    assert cache.ledger().biases == 0


@pytest.mark.parametrize("case", list(FAMILIES), indirect=True)
def test_final_norm_and_contrastive_targets_conserve(case: tuple[str, Any]) -> None:
    _, model = case
    if model.cfg.output_logits_soft_cap and model.cfg.output_logits_soft_cap > 0:
        pytest.skip("a difference of capped logits has no single start before the cap")
    _, cache = lenslrp.run_with_relevance(model, tokens(), Contrastive(5), lenslrp.CPLRP())
    for hook in ("ln_final.hook_in", "unembed.hook_in", f"blocks.{LAYERS - 1}.hook_resid_post"):
        torch.testing.assert_close(
            cache[hook].flatten(1).sum(dim=1), cache.target.value, rtol=1e-7, atol=1e-7, msg=hook
        )


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.parallel])
def test_parallel_blocks_have_no_middle(name: str) -> None:
    model = make(name)
    for asked in ("blocks.0.hook_resid_mid", "hook_resid_mid"):
        message = rf"no hook point '{asked}' .* parallel blocks, .* ask for hook_resid_pre or "
        with pytest.raises(lenslrp.InputError, match=message):
            lenslrp.run_with_relevance(model, tokens(), 5, names_filter=asked)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "native"])
def test_biases_are_the_only_leak(name: str) -> None:
    _, cache = lenslrp.run_with_relevance(make(name), tokens(), 5, lenslrp.CPLRP())
    ledger = cache.ledger()
    assert abs(ledger.biases / ledger.target) > 1e-3
    assert ledger.leaves + ledger.biases == pytest.approx(ledger.target, rel=1e-9)

"""The ledger balances: leaves and every term add up to the target, for every family and composite.

In float64 to 1e-9 relative; this includes the families whose norms and softmax Hugging Face
computes in float32, because terms are measured from the values that were really used. In float32
to ``FLOAT32``: each of some hundred sites rounds once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.hooks import AlphaBeta, Gamma
from lenslrp.hooks.sites import LEDGER_TERMS, Accounts, Site
from lenslrp.targets import Contrastive, Logit, LogProb
from tests.conformance.families import COMPOSITES, FAMILIES, LAYERS, make, tokens

FLOAT64, FLOAT32 = 1e-9, 5e-5
TARGETS = [Logit(5), Contrastive(5), LogProb(5)]
OWN: dict[str, Any] = {
    "gamma": {"linear": Gamma(0.25), "projection": Gamma(0.1)},
    "alpha-beta": {"linear": AlphaBeta(2.0, 1.0), "projection": AlphaBeta(1.0, 0.0)},
}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    name, dtype = request.param
    return make(name, dtype)


def families(dtype: torch.dtype = torch.float64, only: tuple[str, ...] = ()) -> Any:
    """Parametrise the module-wide model: one build a family."""
    names = only or tuple(FAMILIES)
    cases = [pytest.param((name, dtype), id=name) for name in names]
    return pytest.mark.parametrize("model", cases, indirect=True)


def require_balance(cache: lenslrp.RelevanceCache, tolerance: float) -> None:
    """In total, and in every row of the table."""
    ledger = cache.ledger()
    table = ledger.table
    size = max(1.0, abs(ledger.target), float(table[["resid_in", "resid_out"]].abs().max().max()))
    assert abs(ledger.error) <= tolerance, str(ledger)
    assert table["error"].abs().max() <= tolerance * size, table.to_string()
    assert [str(layer) for layer in table.index] == [*map(str, range(LAYERS)), "outside"]
    for term in LEDGER_TERMS:
        assert table[term].sum() == pytest.approx(getattr(ledger, term), rel=1e-9, abs=1e-12)
    assert ledger.target == pytest.approx(float(cache.target.value.double().sum()), rel=1e-12)


@families()
@pytest.mark.parametrize("composite", list(COMPOSITES))
def test_balances_in_float64(model: Any, composite: str) -> None:
    caches = lenslrp.relevance_for_targets(
        model, tokens(), TARGETS, COMPOSITES[composite](), names_filter=[]
    )
    for cache in caches:
        require_balance(cache, FLOAT64)
        assert abs(cache.ledger().biases) > 1e-6 or not has_biases(model)
    assert abs(caches[2].ledger().nonlinear_target) > 1e-3


def has_biases(model: Any) -> bool:
    return any("bias" in name for name, _ in model.original_model.named_parameters())


@families()
@pytest.mark.parametrize("composite", list(OWN))
def test_balances_under_weighted_linear_rules(model: Any, composite: str) -> None:
    _, cache = lenslrp.run_with_relevance(model, tokens(), 5, OWN[composite], names_filter=[])
    require_balance(cache, 1e-8)


@families(torch.float32)
def test_balances_in_float32(model: Any) -> None:
    for composite in ("AttnLRP", "CPLRP", "GIM"):
        for cache in lenslrp.relevance_for_targets(
            model, tokens(), TARGETS, COMPOSITES[composite](), names_filter=[]
        ):
            require_balance(cache, FLOAT32)


@families(only=("llama", "gpt2", "gemma2", "neox"))
def test_a_batch_is_the_sum_of_its_rows(model: Any) -> None:
    both = lenslrp.run_with_relevance(model, tokens(), 5, names_filter=[])[1].ledger()
    rows = [
        lenslrp.run_with_relevance(model, row[None], 5, names_filter=[])[1].ledger()
        for row in tokens()
    ]
    for term in ("target", "leaves", *LEDGER_TERMS):
        total = sum(getattr(row, term) for row in rows)
        assert getattr(both, term) == pytest.approx(total, rel=1e-9, abs=1e-9), term


# ------------------------------------------------- each term is measured by its own site

BREAKS = [
    ("llama", "biases", "AttnLRP"),
    ("gpt2", "biases", "AttnLRP"),
    ("neox", "biases", "CPLRP"),
    ("native", "biases", "gamma"),
    ("llama", "softmax", "AttnLRP"),
    ("gemma2", "softmax", "GIM"),
    ("native_gated", "softmax", "AttnLRP"),
    ("qwen3", "plain", "GradientTimesInput"),
    ("gpt2", "plain", "RelP"),
    ("phi", "plain", "GIM"),
    ("gemma2", "stabiliser", "saturated"),
]


def composite_for(name: str) -> Any:
    if name == "saturated":
        return lenslrp.AttnLRP()
    return COMPOSITES[name]() if name in COMPOSITES else OWN[name]


def build(name: str, composite: str) -> Any:
    model = make(name)
    if composite == "saturated":  # scores far beyond the cap, in a type that cannot tell how far
        for block in model.blocks:
            block.attn.q.original_component.weight.data *= 40
    return model


@pytest.mark.filterwarnings("ignore:the ledger does not balance:UserWarning")
@pytest.mark.parametrize(("family", "term", "composite"), BREAKS)
def test_breaking_one_site_breaks_the_balance(
    family: str, term: str, composite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site by site: what one of them fails to report is missing, and nothing makes up for it."""
    model, table = build(family, composite), composite_for(composite)
    told: dict[tuple[str, str], float] = {}
    add = Accounts.add

    def listen(self: Accounts, term_: str, site: Site, amount: Tensor) -> None:
        key = (site.hook, site.role)
        if term_ == term:
            told[key] = told.get(key, 0.0) + float(amount.sum())
        add(self, term_, site, amount)

    with monkeypatch.context() as patch:
        patch.setattr(Accounts, "add", listen)
        ledger = lenslrp.run_with_relevance(model, tokens(), 5, table, names_filter=[])[1].ledger()
    assert abs(ledger.error) < 1e-8
    assert sum(told.values()) == pytest.approx(getattr(ledger, term), rel=1e-9, abs=1e-12)
    large = [key for key, amount in told.items() if abs(amount) > 1e-5]
    assert large, f"no site reports {term} here: {told}"
    for broken in large[:: max(1, len(large) // 4)]:

        def deaf(
            self: Accounts, term_: str, site: Site, amount: Tensor, broken: Any = broken
        ) -> None:
            if term_ != term or (site.hook, site.role) != broken:
                add(self, term_, site, amount)

        with monkeypatch.context() as patch:
            patch.setattr(Accounts, "add", deaf)
            _, cache = lenslrp.run_with_relevance(
                model, tokens(), 5, table, names_filter=[], strict=False
            )
        broken_ledger = cache.ledger()
        missing = broken_ledger.target - broken_ledger.accounted
        assert abs(broken_ledger.error) > 1e-6, broken
        assert missing == pytest.approx(told[broken], rel=1e-6), broken


def test_a_nonlinear_target_is_a_term_of_its_own() -> None:
    """Log-probability and a final soft-cap: what they add is what the raw logits do not have."""
    model = make("gemma2")
    raw, log_prob = (
        cache.ledger()
        for cache in lenslrp.relevance_for_targets(model, tokens(), [Logit(5), LogProb(5)])
    )
    for ledger in (raw, log_prob):
        without = ledger.target - (ledger.accounted - ledger.nonlinear_target)
        assert without == pytest.approx(ledger.nonlinear_target, rel=1e-9)
        assert abs(ledger.nonlinear_target / ledger.target) > 1e-3


def test_no_ledger_when_none_is_kept() -> None:
    _, cache = lenslrp.run_with_relevance(make("llama"), tokens(), 5, ledger=False)
    with pytest.raises(lenslrp.InputError, match="ledger=False"):
        cache.ledger()

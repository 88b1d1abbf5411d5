"""Composites are tables: what each says, what a user may write into one, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lenslrp
from lenslrp.errors import InputError
from lenslrp.hooks import (
    CONSTANT,
    ROLES,
    UNIFORM,
    ZPLUS,
    AlphaBeta,
    Composite,
    Epsilon,
    Gamma,
    Identity,
    Normalisation,
    Plain,
    Product,
    SoftCap,
    Softmax,
    SoftmaxTemperature,
)
from tests.conformance import zoo
from tests.unit.tiny import TOKENS, tiny

ATTNLRP: dict[str, Any] = {
    "norm": Normalisation(),
    "activation": Identity(),
    "gate": UNIFORM,
    "softmax": Softmax(),
    "attention_qk": UNIFORM,
    "attention_av": UNIFORM,
    "attention_gate": CONSTANT,
    "softcap": SoftCap(),
    "linear": Epsilon(),
    "projection": Epsilon(),
    "convolution": Epsilon(),
    "router": UNIFORM,
    "recurrence": CONSTANT,
    "recurrence_gate": UNIFORM,
    "short_convolution": Epsilon(),
    "position": Epsilon(),
}
PLAIN = dict.fromkeys([role for role, kinds in ROLES.items() if Plain in kinds], Plain())
TABLES: list[tuple[Composite, dict[str, Any]]] = [
    (lenslrp.AttnLRP(), {}),
    (lenslrp.AttnLRP(router="constant"), {"router": CONSTANT}),
    (lenslrp.AttnLRP(recurrence="uniform"), {"recurrence": UNIFORM}),
    (lenslrp.CPLRP(), {"attention_av": CONSTANT, "router": CONSTANT}),
    (lenslrp.CPLRP(gate="up"), {"attention_av": CONSTANT, "router": CONSTANT, "gate": CONSTANT}),
    (lenslrp.CPLRP(router="uniform"), {"attention_av": CONSTANT}),
    (lenslrp.GradientTimesInput(), PLAIN),
    (
        lenslrp.RelP(),
        {r: Plain() for r in ("softmax", "attention_qk", "attention_av", "softcap")},
    ),
    (lenslrp.GIM(), {"softmax": SoftmaxTemperature(2.0), "activation": Plain()}),
    (lenslrp.GIM(temperature=3.0), {"softmax": SoftmaxTemperature(3.0), "activation": Plain()}),
    (lenslrp.AttnLRPViT(), {"convolution": Gamma(0.25), "linear": Gamma(0.05)}),
]


@pytest.mark.parametrize(("composite", "differs"), TABLES, ids=lambda x: getattr(x, "name", ""))
def test_the_tables(composite: Composite, differs: dict[str, Any]) -> None:
    assert dict(composite.rules) == {**ATTNLRP, **differs}
    assert set(composite.rules) == set(ROLES)


def test_names_are_distinct() -> None:
    makers: list[Any] = [
        lenslrp.AttnLRP,
        lenslrp.CPLRP,
        lenslrp.GradientTimesInput,
        lenslrp.RelP,
        lenslrp.GIM,
        lenslrp.AttnLRPViT,
    ]
    names = [make().name for make in makers]
    assert len(set(names)) == len(names)


def test_what_is_recommended() -> None:
    assert lenslrp.recommended(tiny()).name == lenslrp.AttnLRP().name
    vision = zoo.build("ViTForImageClassification")
    assert lenslrp.recommended(vision).name == lenslrp.AttnLRPViT().name
    with pytest.raises(lenslrp.InputError, match="TransformerBridge"):
        lenslrp.recommended(vision.original_model)


def explain(composite: Any, family: str = "llama", **changes: Any) -> lenslrp.RelevanceCache:
    model = tiny(family, **changes)
    return lenslrp.run_with_relevance(model, TOKENS, 5, composite)[1]


def test_a_dict_literal_is_a_composite_over_attnlrp() -> None:
    assert torch.equal(explain({}).tokens, explain(lenslrp.AttnLRP()).tokens)
    assert torch.equal(explain({"attention_av": CONSTANT}).tokens, explain(lenslrp.CPLRP()).tokens)
    assert torch.equal(explain(PLAIN).tokens, explain(lenslrp.GradientTimesInput()).tokens)
    kept = explain({**lenslrp.AttnLRP().rules, "activation": Plain()})
    sites = kept.coverage.sites.set_index("role")["rule"]
    assert set(sites["activation"]) == {"plain"}
    assert set(sites["norm"]) == {"normalisation"}
    assert kept.coverage.ok
    assert kept.composite.name == "custom"


@pytest.mark.parametrize(
    "rules",
    [
        {"linear": Gamma(0.25)},
        {"linear": ZPLUS},
        {"linear": AlphaBeta(2.0, 1.0), "projection": Gamma(0.1)},
        {"softmax": SoftmaxTemperature(2.0)},
        {"gate": Product(0.25, 0.75, "quarter")},
        {"attention_av": Product(0.25, 0.75, "quarter")},
        {"norm": Plain()},
        {"softcap": Plain()},
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_ledger_balances_for_tables_of_the_users_own(family: str, rules: Any) -> None:
    kept = explain(rules, family)
    assert abs(kept.ledger().error) < 1e-6
    assert kept.coverage.ok


def test_a_rule_of_the_users_own() -> None:
    class Halved:
        """A linear rule: half of the gradient passes, the layer's bias takes nothing."""

        name = "halved"

        def backward(
            self, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            return 0.5 * g @ weight, torch.zeros_like(g)

    kept = explain({"projection": Halved()})
    assert abs(kept.ledger().error) < 1e-9
    rules = kept.coverage.sites.set_index("role")["rule"]
    assert set(rules["projection"]) == {"halved"}


# --- refused -------------------------------------------------------------------------------------


def test_an_unknown_role_names_the_roles() -> None:
    with pytest.raises(InputError, match=r"unknown role 'gates'; the roles are norm, .*position"):
        Composite("mine", {"gates": UNIFORM})
    with pytest.raises(InputError, match="unknown role 'gates'"):
        explain({"gates": UNIFORM})


@pytest.mark.parametrize(
    ("role", "rule", "kinds"),
    [
        ("gate", Identity(), "Product, Plain"),
        ("norm", UNIFORM, "Normalisation, Plain"),
        ("activation", Gamma(), "Identity, Plain"),
        ("softmax", SoftCap(), "Softmax, SoftmaxTemperature, SoftmaxRule, Plain"),
        ("linear", Plain(), "Epsilon"),
        ("linear", 3, "Epsilon"),
        ("norm", "identity", "Normalisation, Plain"),
        ("activation", None, "Identity, Plain"),
        ("norm", Plain, "Normalisation, Plain"),
        ("linear", Gamma, "Epsilon"),
        ("projection", AlphaBeta, "Epsilon"),
    ],
)
def test_a_rule_of_the_wrong_kind_names_the_right_ones(role: str, rule: Any, kinds: str) -> None:
    with pytest.raises(InputError, match=f"role '{role}' takes a rule of kind {kinds}"):
        Composite("mine", {role: rule})


@pytest.mark.parametrize("composite", ["AttnLRP", 3, lenslrp.AttnLRP, lenslrp.hooks])
def test_something_that_is_no_composite(composite: Any) -> None:
    message = r"a composite is AttnLRP\(\), CPLRP\(\), .* mapping from role to rule, not"
    with pytest.raises(InputError, match=message):
        explain(composite)
    with (
        pytest.raises(InputError, match=message),
        lenslrp.relevance_rules(tiny("llama"), composite),
    ):
        pass


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.0, 0.0), (0.0, -1.0)])
def test_alpha_minus_beta_is_one(alpha: float, beta: float) -> None:
    message = rf"alpha - beta must be 1 and beta >= 0, got alpha={alpha}, beta={beta}"
    with pytest.raises(InputError, match=message):
        AlphaBeta(alpha, beta)


@pytest.mark.parametrize("gamma", [-0.25, float("nan")])
def test_gamma_is_not_negative(gamma: float) -> None:
    with pytest.raises(InputError, match="gamma"):
        Gamma(gamma)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        lenslrp.GIM(temperature=temperature)


def test_choices_are_named() -> None:
    with pytest.raises(InputError, match="router must be one of uniform, constant, not 'half'"):
        lenslrp.AttnLRP(router="half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gate must be one of uniform, up, not 'down'"):
        lenslrp.CPLRP(gate="down")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("attention_av", "values a share"),
        ("gate", "`up` a share"),
        ("attention_qk", "the same share"),
    ],
)
def test_products_that_give_nothing_to_the_second_factor(role: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        explain({role: Product(1.0, 0.0, "first")})


# --- modules of the user's own -------------------------------------------------------------------


class Swish2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * x)


def test_extended_adds_and_changes_nothing_else() -> None:
    composite = lenslrp.CPLRP()
    extended = composite.extended({Swish2: Identity()})
    assert extended.rules == composite.rules
    assert extended.name == composite.name
    assert composite.modules == {}
    assert extended.extended({nn.Softsign: Plain()}).modules.keys() == {Swish2, nn.Softsign}


@pytest.mark.parametrize("rule", [Epsilon(), UNIFORM, Identity, None])
def test_a_module_takes_an_elementwise_rule(rule: Any) -> None:
    with pytest.raises(InputError, match=r"Swish2.*Identity, Plain"):
        lenslrp.AttnLRP().extended({Swish2: rule})


@pytest.mark.parametrize("key", ["Swish2", Swish2(), torch.sigmoid], ids=["name", "module", "fn"])
def test_a_module_rule_is_for_a_class(key: Any) -> None:
    with pytest.raises(InputError, match="class"):
        lenslrp.AttnLRP().extended({key: Identity()})

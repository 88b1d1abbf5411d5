"""Composites: tables from the role of an operation to the rule that governs it.

A user's own composite is a dict literal over the same roles::

    mine = Composite("mine", {**AttnLRP().rules, "activation": Plain()})

or any mapping from role to rule given where a composite is expected. Roles that a table leaves
out get the rule of AttnLRP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lenslrp.errors import InputError
from lenslrp.hooks.linear_rules import Epsilon, Gamma, LinearRule
from lenslrp.hooks.rule_types import (
    CONSTANT,
    UNIFORM,
    Identity,
    Normalisation,
    Operations,
    Plain,
    Product,
    Rule,
    SoftCap,
    Softmax,
    SoftmaxRule,
    SoftmaxTemperature,
)

ROLES: Mapping[str, tuple[type, ...]] = {
    "norm": (Normalisation, Plain),
    "activation": (Identity, Plain),
    "gate": (Product, Plain),
    "softmax": (Softmax, SoftmaxTemperature, SoftmaxRule, Plain),
    "attention_qk": (Product, Plain),
    "attention_av": (Product, Plain),
    "attention_gate": (Product, Plain),
    "softcap": (SoftCap, Plain),
    "linear": (Epsilon, LinearRule),
    "projection": (Epsilon, LinearRule),
    "convolution": (Epsilon, LinearRule),
    "router": (Product, Plain),
    "recurrence": (Product, Plain),
    "recurrence_gate": (Product, Plain),
    "short_convolution": (Epsilon,),
    "position": (Epsilon,),
}
"""Every role that an operation can have, and the kinds of rule that can govern it."""

MODULE_RULES = (Identity, Normalisation, Operations, Plain)
"""The kinds of rule that a module class of a user's own can be given."""

ATTNLRP: Mapping[str, Rule] = {
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


@dataclass(frozen=True)
class Composite:
    """A named table from role to rule, and optional rules for module classes of the user's own.

    Args:
        name: what reports call it.
        rules: role -> rule; roles left out get AttnLRP's rule.
        modules: class of a module -> rule, for classes LensLRP does not know: ``Identity()`` for
            an element-wise activation, ``Normalisation(centred=...)`` for a norm, ``Operations()``
            for a module that computes in plain Python, or ``Plain()``.

    Raises:
        InputError: a role that does not exist, or a rule of a kind that cannot govern its role.

    Examples:
        >>> mine = Composite("mine", {**AttnLRP().rules, "linear": Gamma(0.05)})
        >>> mine["linear"].name, mine["attention_av"].name
        ('gamma', 'uniform')
    """

    name: str
    rules: Mapping[str, Rule]
    modules: Mapping[type, Rule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role, rule in self.rules.items():
            if role not in ROLES:
                raise InputError(f"unknown role {role!r}; the roles are {', '.join(ROLES)}")
            if isinstance(rule, type) or not isinstance(rule, ROLES[role]):
                kinds = ", ".join(kind.__name__ for kind in ROLES[role])
                raise InputError(f"role {role!r} takes a rule of kind {kinds}, not {rule!r}")
        for cls, rule in self.modules.items():
            if not isinstance(cls, type):
                raise InputError(f"a module rule is for a class, not {cls!r}")
            if isinstance(rule, type) or not isinstance(rule, MODULE_RULES):
                raise InputError(
                    f"{cls.__name__} takes an element-wise rule, Identity, Plain, "
                    f"Normalisation if it is a norm, or Operations, not {rule!r}"
                )
        object.__setattr__(self, "rules", {**ATTNLRP, **self.rules})

    def __getitem__(self, role: str) -> Rule:
        return self.rules[role]

    def extended(self, modules: Mapping[type, Rule]) -> Composite:
        """The same composite with rules for more module classes.

        Args:
            modules: class of a module -> rule, as for ``Composite``.

        Raises:
            InputError: a rule of a kind that a module class cannot be given.
        """
        return Composite(self.name, self.rules, {**self.modules, **modules})


def as_composite(composite: Composite | Mapping[str, Rule]) -> Composite:
    """A composite as given, or a user's mapping made into one."""
    if isinstance(composite, Composite):
        return composite
    if isinstance(composite, Mapping):
        return Composite("custom", composite)
    raise InputError(
        f"a composite is AttnLRP(), CPLRP(), ... or a mapping from role to rule, not {composite!r}"
    )


def _choose_product(choice: str, choices: Mapping[str, Product], keyword: str) -> Product:
    if choice not in choices:
        raise InputError(f"{keyword} must be one of {', '.join(choices)}, not {choice!r}")
    return choices[choice]


SHARES: Mapping[str, Product] = {"uniform": UNIFORM, "constant": CONSTANT}


def AttnLRP(
    *,
    router: Literal["uniform", "constant"] = "uniform",
    recurrence: Literal["uniform", "constant"] = "constant",
) -> Composite:
    """AttnLRP (Achtibat et al. 2024, 2402.05602): the default.

    Epsilon for linear layers (Eq. 8), identity for activations (Eq. 9), half to each factor of a
    product (Prop. 3.2-3.3), the plain Jacobian for the softmax (Prop. 3.1), norms with a constant
    denominator (Prop. 3.4).

    Args:
        router: ``"uniform"``: half of an expert's relevance to its router's weight;
            ``"constant"``: all to the expert.
        recurrence: ``"constant"``: what a recurrent mixer computes to carry its state (decays,
            keys, queries, steps) is constant, and its values get all; ``"uniform"``: half to each.
            Likewise of weights that mix several residual streams, and of the streams.

    Raises:
        InputError: another choice.
    """
    return Composite(
        "AttnLRP",
        {
            "router": _choose_product(router, SHARES, "router"),
            "recurrence": _choose_product(recurrence, SHARES, "recurrence"),
        },
    )


def CPLRP(
    *,
    gate: Literal["uniform", "up"] = "uniform",
    router: Literal["uniform", "constant"] = "constant",
) -> Composite:
    """CP-LRP (Ali et al. 2022, 2202.07304): the pattern is constant, values get everything.

    The rest is AttnLRP. Queries, keys and what feeds them get no relevance, nor does what a
    recurrent mixer computes to carry its state, or a layer to mix its residual streams.

    Args:
        gate: ``"uniform"``: half to gate and ``up``; ``"up"``: everything through ``up`` and
            nothing through the gate, as LXT's map does.
        router: as for :func:`AttnLRP`.

    Raises:
        InputError: another choice.
    """
    return Composite(
        "CP-LRP",
        {
            "attention_av": CONSTANT,
            "gate": _choose_product(gate, {"uniform": UNIFORM, "up": CONSTANT}, "gate"),
            "router": _choose_product(router, SHARES, "router"),
            "recurrence": CONSTANT,
        },
    )


def GradientTimesInput() -> Composite:
    """Gradient x Input: every operation has its plain gradient, so relevance is ``x * dt/dx``.

    The ledger says how much of the target each kind of operation gains or loses.
    """
    nonlinear = [role for role, kinds in ROLES.items() if Plain in kinds]
    return Composite("Gradient x Input", {role: Plain() for role in nonlinear})


def RelP() -> Composite:
    """RelP (2508.21258): AttnLRP's rules for norms, activations and gates; attention plain.

    Softmax, both attention products and soft-caps have their plain gradient.
    """
    plain = dict.fromkeys(("softmax", "attention_qk", "attention_av", "softcap"), Plain())
    return Composite("RelP", plain)


def GIM(*, temperature: float = 2.0) -> Composite:
    """GIM (2505.17630): AttnLRP with the softmax at a temperature, and activations plain.

    Args:
        temperature: of the softmax in the backward pass, above 0.

    Raises:
        InputError: a temperature that is not above 0.
    """
    return Composite("GIM", {"softmax": SoftmaxTemperature(temperature), "activation": Plain()})


def AttnLRPViT() -> Composite:
    """AttnLRP's composite for vision transformers (2402.05602, App. B.4).

    Gamma 0.25 on the patch convolution and 0.05 on linear layers, epsilon on queries, keys, values
    and outputs of attention. The default for image classifiers.
    """
    return Composite("AttnLRP-ViT", {"convolution": Gamma(0.25), "linear": Gamma(0.05)})

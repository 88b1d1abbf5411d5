"""Methods of attribution under one interface: AttnLRP, its kin and its rivals.

    attribute("integrated_gradients", model, "The capital of France is", " Paris").tokens

:data:`METHODS` is the table. Each method gives every unit of the input (a token, a patch) one
number; the larger, the more the unit spoke for the target. Only those that say so
(``docs/reference/baselines.md``) are in units of the target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslrp.analysis.attribution.attention import (
    atman,
    attention_rollout,
    gradient_x_attention_rollout,
)
from lenslrp.analysis.attribution.gradient import integrated_gradients, smoothgrad
from lenslrp.analysis.attribution.perturbation import kernel_shap, occlusion
from lenslrp.analysis.attribution.positional import pa_lrp
from lenslrp.analysis.attribution.softmax_ablations import (
    DistributedBiasAtSoftmax,
    IdentityAtSoftmax,
)
from lenslrp.analysis.passes.problems import CHUNK, AttributionProblem, PassCount, resolve
from lenslrp.errors import InputError
from lenslrp.extras import EXTRAS, require
from lenslrp.hooks.composites import (
    CPLRP,
    GIM,
    AttnLRP,
    AttnLRPViT,
    Composite,
    GradientTimesInput,
    RelP,
)
from lenslrp.hooks.rule_types import Plain
from lenslrp.targets import Explained

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Scores = Callable[..., Tensor]
"""``(question, *, seed, **options)`` to relevance of the units [batch, units], or of the pixels."""


@dataclass(frozen=True)
class Method:
    """One way to give the units of an input relevance.

    Attributes:
        name: its key in :data:`METHODS`.
        function: what it computes.
        citation: where it comes from.
        needs: ``"patterns"`` (attention that the bridge can make live), ``"captum"``.
        deterministic: whether the seed makes no difference.
    """

    name: str
    function: Scores
    citation: str
    needs: tuple[str, ...] = ()
    deterministic: bool = True

    def __call__(
        self, model: TransformerBridge, tokens: Any, target: Any = None, **context: Any
    ) -> Float[Tensor, "batch units"]:
        """Relevance of the tokens; arguments as for :func:`attribute`."""
        return attribute(self, model, tokens, target, **context).tokens

    @property
    def options(self) -> tuple[str, ...]:
        """What it can be told."""
        given = inspect.signature(self.function).parameters.values()
        own = (p.name for p in given if p.kind is p.KEYWORD_ONLY)
        return tuple(name for name in own if name not in ("seed", "composite"))


@dataclass(frozen=True, eq=False)
class Attribution:
    """What a method found.

    Attributes:
        tokens: relevance of each unit: a token (for an encoder-decoder, the encoder's), or a patch
            of an image, row by row. 0 for padding.
        mask: True where a unit is real.
        str_tokens: what the units are called.
        method: its name.
        target: what exactly was explained, and its value.
        passes: forward and backward passes of one sequence that one explanation took.
        pixels: for an image, where the method goes down to them; ``tokens`` are their sums.
        grid: rows and columns of an image's patches.
    """

    tokens: Float[Tensor, "batch units"]
    mask: Bool[Tensor, "batch units"]
    str_tokens: list[list[str]]
    method: str
    target: Explained
    passes: PassCount
    pixels: Float[Tensor, "batch channel height width"] | None = None
    grid: tuple[int, int] | None = None

    @property
    def patches(self) -> Float[Tensor, "batch rows columns"] | None:
        """The same as an image's grid; ``None`` for text."""
        return None if self.grid is None else self.tokens.unflatten(1, self.grid)


def attribute(
    method: str | Method | Composite,
    model: TransformerBridge,
    input: Any = None,
    target: Any = None,
    *,
    seed: int = 0,
    prepend_bos: bool | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    decoder_input: Any = None,
    pixel_values: Tensor | None = None,
    chunk: int = CHUNK,
    **options: Any,
) -> Attribution:
    """Relevance of every token (or patch) for a target, by any method.

    Args:
        method: a name in :data:`METHODS`, a :class:`Method`, or a composite of rules.
        model, input, target, and the keywords up to ``pixel_values``: as for
            :func:`lenslrp.run_with_relevance`.
        seed: for methods that draw random numbers; what a row gets depends on its content and the
            seed, not on the batch it is in.
        chunk: how many sequences run through the model at once.
        options: the method's own, see ``Method.options``.

    Raises:
        InputError: an unknown method or option; what cannot be explained.
        MissingExtraError: the method needs a package that is not installed.
        CoverageError: an operation on the path has no rule, for methods that attach rules.
    """
    chosen = as_method(method)
    question = resolve(
        model,
        input,
        target,
        prepend_bos=prepend_bos,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        decoder_input=decoder_input,
        pixel_values=pixel_values,
        chunk=chunk,
    )
    return answer(chosen, question, seed=seed, **options)


def answer(
    method: str | Method | Composite, question: AttributionProblem, *, seed: int = 0, **options: Any
) -> Attribution:
    """What a method says of an input and a target that are resolved already; see
    :func:`attribute`."""
    chosen = as_method(method)
    unknown = [name for name in options if name not in chosen.options]
    if unknown:
        known = ", ".join(chosen.options) or "none"
        raise InputError(f"{chosen.name} has no option {unknown[0]!r}; its options: {known}")
    found = chosen.function(question, seed=seed, **options).detach()
    found = found.to(torch.promote_types(question.inputs.dtype, torch.float32))
    pixels = found if found.shape == question.inputs.shape and found.ndim == 4 else None
    tokens = question.summed(found) if found.ndim > 2 else found
    return Attribution(
        tokens.masked_fill(~question.mask, 0.0),
        question.mask,
        question.units,
        chosen.name,
        question.explained,
        question.passes,
        pixels,
        question.grid,
    )


def as_method(method: str | Method | Composite) -> Method:
    """A method as given, by its name, or of a composite.

    Raises:
        InputError: an unknown name, or anything else.
        MissingExtraError: it needs a package that is not installed.
    """
    if isinstance(method, Composite):
        return Method(method.name, partial(rules, composite=method), "a composite of rules")
    if isinstance(method, str) and method in METHODS:
        method = METHODS[method]
    if not isinstance(method, Method):
        raise InputError(f"no method {method!r}; the methods are {', '.join(METHODS)}")
    for package in EXTRAS.keys() & method.needs:
        require(package, method.name)
    return method


def rules(question: AttributionProblem, *, seed: int, composite: Composite) -> Tensor:
    """Relevance under a composite's rules: one forward and one backward pass."""
    cache = question.relevance(composite)
    return cache.tokens if cache.pixels is None else cache.pixels


def random(question: AttributionProblem, *, seed: int) -> Float[Tensor, "batch units"]:
    """Standard normal numbers: what a method that knows nothing says."""
    batch, units = question.mask.shape
    found = torch.zeros(batch, units)
    for row in range(batch):
        real = question.mask[row].cpu()
        found[row, real] = torch.randn(int(real.sum()), generator=question.generator(row, seed))
    return found.to(question.inputs.device)


def _rules(name: str, composite: Composite, citation: str) -> Method:
    return Method(name, partial(rules, composite=composite), citation)


def epsilon_lrp() -> Composite:
    """LRP as it was before transformers: epsilon for linear layers, identity for activations.

    What it had no rule for (softmax, products, norms) has the plain gradient, as in the LRP that
    Ali et al. 2022 compare theirs with.
    """
    table = {**GradientTimesInput().rules, "activation": AttnLRP()["activation"]}
    return Composite("epsilon-LRP", table)


_ATTNLRP = "Achtibat et al. 2024, arXiv:2402.05602"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("random", random, "chance", deterministic=False),
        _rules(
            "gradient_x_input",
            GradientTimesInput(),
            "Shrikumar et al. 2016, arXiv:1605.01713",
        ),
        Method(
            "integrated_gradients",
            integrated_gradients,
            "Sundararajan et al. 2017, arXiv:1703.01365",
            needs=("captum",),
        ),
        Method(
            "smoothgrad",
            smoothgrad,
            "Smilkov et al. 2017, arXiv:1706.03825",
            deterministic=False,
        ),
        Method(
            "attention_rollout",
            attention_rollout,
            "Abnar & Zuidema 2020, arXiv:2005.00928",
            needs=("patterns",),
        ),
        Method(
            "gradient_x_attention_rollout",
            gradient_x_attention_rollout,
            "Chefer et al. 2021, arXiv:2103.15679",
            needs=("patterns",),
        ),
        Method("atman", atman, "Deb et al. 2023, arXiv:2301.08110", needs=("patterns",)),
        Method("occlusion", occlusion, "Zeiler & Fergus 2014, arXiv:1311.2901"),
        Method(
            "kernel_shap",
            kernel_shap,
            "Lundberg & Lee 2017, arXiv:1705.07874",
            deterministic=False,
        ),
        _rules("epsilon_lrp", epsilon_lrp(), "Bach et al. 2015, PLoS ONE 10(7)"),
        _rules("cp_lrp", CPLRP(), "Ali et al. 2022, arXiv:2202.07304"),
        _rules("relp", RelP(), "Rezaei Jafari et al. 2025, arXiv:2508.21258"),
        _rules("gim", GIM(), "Edin et al. 2025, arXiv:2505.17630"),
        _rules("attnlrp", AttnLRP(), _ATTNLRP),
        Method("attnlrp_positional", pa_lrp, "Bakish et al. 2025, arXiv:2506.02138"),
        _rules("attnlrp_gamma", AttnLRPViT(), f"{_ATTNLRP}, App. B.4"),
        _rules(
            "attnlrp_plain_activation",
            Composite("AttnLRP, plain activation", {"activation": Plain()}),
            f"{_ATTNLRP}, less its identity rule",
        ),
        _rules("attnlrp_softmax_identity", IdentityAtSoftmax(), f"{_ATTNLRP}, an ablation"),
        _rules(
            "attnlrp_softmax_distributed",
            DistributedBiasAtSoftmax(),
            f"{_ATTNLRP}, an ablation",
        ),
    )
}
